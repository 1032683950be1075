"""What `qkit inspect` shows: the rows as the model will see them, token by token, and which tokens carry loss."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

from qkit import data, model
from qkit.errors import DataError
from qkit.recipe import Recipe

if TYPE_CHECKING:
    from rich.console import RenderableType


@dataclass(frozen=True)
class Token:
    """One token of the row: its id, its text, and whether it carries loss."""

    id: int
    text: str
    trained: bool


@dataclass(frozen=True)
class Inspection:
    """One row, and counts over all rows of its split. Token counts include dropped rows' tokens in no figure but `dropped`."""

    split: str
    rows: int
    dropped: int
    tokens: int
    labelled_tokens: int
    longest: int
    chat_template: str
    end_of_turn: str
    place: str
    row: int
    row_tokens: tuple[Token, ...]


def inspect(how: Recipe, split: str, row: int) -> Inspection:
    """Read and tokenize a split as the data stage would, and take one row apart.

    Raises:
        DataError: no such split, or no such row.
    """
    if split not in data.SPLITS:
        raise DataError(f"--split {split}: there are {', '.join(data.SPLITS)}")
    tokenizer = model.tokenizer_of(how.model)
    ledger: list[data.LedgerRow] = []
    rows = list(data.kept(data.tokenized(how, split, tokenizer), ledger, how.data.max_length, split))
    chosen = next(islice(rows, row, None), None) if row >= 0 else None
    if chosen is None:
        raise DataError(f"--row {row}: the split {split} has {len(rows)} rows, counted from 0")
    counts = data.counts(rows)
    return Inspection(
        split=split,
        rows=counts["rows"],
        dropped=len(ledger) - len(rows),
        tokens=counts["tokens"],
        labelled_tokens=counts["labelled_tokens"],
        longest=max(len(r.input_ids) for r in rows),
        chat_template=str(tokenizer.chat_template),
        end_of_turn=str(tokenizer.convert_ids_to_tokens(data.turn_end(tokenizer))),
        place=chosen.place,
        row=row,
        row_tokens=tuple(
            Token(token, tokenizer.decode([token]), index >= chosen.start)
            for index, token in enumerate(chosen.input_ids)
        ),
    )


def to_dict(seen: Inspection) -> dict[str, Any]:
    """For `--json`."""
    return asdict(seen)


def screen(seen: Inspection) -> RenderableType:
    """Counts, then the row: what carries loss is green and underlined, the context is dim."""
    from rich.console import Group
    from rich.text import Text

    share = seen.labelled_tokens / seen.tokens
    head = Text(
        f"{seen.split}: {seen.rows} rows ({seen.dropped} dropped), {seen.tokens:,} tokens, "
        f"{seen.labelled_tokens:,} of them ({share:.0%}) carry loss; the longest row has {seen.longest}\n"
        f"the turn ends with {seen.end_of_turn}\n"
        f"row {seen.row} ({seen.place}): {len(seen.row_tokens)} tokens; those that carry loss are underlined\n"
    )
    body = Text()
    for token in seen.row_tokens:
        body.append(token.text, style="green underline" if token.trained else "dim")
    ids = Text("\n" + " ".join(str(token.id) for token in seen.row_tokens), style="dim")
    return Group(head, body, ids)
