"""What becomes of rows longer than data.max_length: the error that drops one, its end cut off, or pieces of a text.

encode.py compares lengths and decides which (`_conversation_row`, `_text_rows`); removing the oldest turns renders the conversation again, so
that is there too (`_without_oldest_turns`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from qkit.core.batching import IGNORED
from qkit.recipe.schema import Data
from qkit.tasks._conversation.rows import EncodedRow, Refused


def too_long(row: EncodedRow, section: Data) -> Refused:
    return Refused(f"has {row.whole_tokens} tokens, data.max_length is {section.max_length}", "length", row)


def cut_end(row: EncodedRow, max_length: int) -> EncodedRow:
    """The first `max_length` tokens of a row.

    Raises:
        Refused: no answer would be left.
    """
    kept = replace(row, input_ids=row.input_ids[:max_length], labels=row.labels[:max_length])
    if row.start >= max_length or not kept.labelled:
        raise Refused(f"has {row.start} tokens before its answer, data.max_length is {max_length}", "length", row)
    cut = row.whole_tokens - max_length
    finding = (
        "answer_cut",
        f"its answer is truncated: {cut} of {row.whole_tokens} tokens are removed, including the end of the turn",
    )
    return replace(kept, findings=(*row.findings, finding))


def pieces(row: EncodedRow, max_length: int) -> Iterator[EncodedRow]:
    """A row in pieces. Each begins with the last token of the piece before as context, so that every token is trained on exactly once."""
    for begin in range(0, len(row.input_ids) - 1, max_length - 1):
        ids = row.input_ids[begin : begin + max_length]
        labels = [IGNORED, *row.labels[begin + 1 : begin + max_length]]
        yield replace(row, input_ids=ids, labels=labels, whole_tokens=len(ids), continues=begin > 0)
