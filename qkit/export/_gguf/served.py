"""Checks whether llama.cpp tokenizes the run's own rows as in training.

A GGUF header cannot hold normalizers, or the whitespace that an added token strips; and some of llama.cpp's patterns differ from those of
the tokenizer.json. How much that matters depends on the texts.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qkit.chat import template
from qkit.model.gguf import tokenizer as gguf_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


MAX_ROWS = 2000  # that are compared
SHOWN = 60  # characters of the first difference
TEXTS = ("messages", "tools", "variables", "answer", "calls")


def token_differences(rows: Path, folder: Path, file: Path) -> dict[str, Any] | None:
    """Count the training rows that llama.cpp tokenizes differently, and list the causes; None if nothing is lost and there are no texts.

    Rows of plain text and of tokens do not keep their text before normalization, so they cannot be compared.

    Args:
        rows: the run's data/train.parquet.
        folder: the model folder with the tokenizer of training.
        file: the .gguf file.

    Returns:
        `rows`, `differ`: how many rows were compared, and how many differ. `because`: the causes. `first`: the text of the first difference.
    """
    from transformers import AutoTokenizer

    trained, served = AutoTokenizer.from_pretrained(str(folder)), gguf_tokenizer.build(file, served=True)
    texts = [*_texts(rows, trained)]
    if not texts:
        return {"rows": 0, "differ": 0, "because": because} if (because := lost(folder)) else None
    ids = [tokenizer(texts, add_special_tokens=False)["input_ids"] for tokenizer in (trained, served)]
    differing = [text for text, ours, theirs in zip(texts, *ids, strict=True) if ours != theirs]
    result: dict[str, Any] = {"rows": len(texts), "differ": len(differing)}
    if differing:
        result |= {"first": _around_difference(differing[0], trained, served), "because": lost(folder)}
    return result


def lost(folder: Path) -> list[str]:
    """Return the parts of a tokenizer.json that a GGUF header cannot hold."""
    tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    rule = tokenizer.get("normalizer") or {}
    kinds = [step["type"] for step in rule.get("normalizers", [rule] if rule else [])]
    strips = [
        f"{added['content']} ({', '.join(marks)})"
        for added in tokenizer.get("added_tokens", ())
        if (marks := [mark for mark in ("lstrip", "rstrip", "single_word") if added.get(mark)])
    ]
    return [*(f"the normalizer {kind}" for kind in kinds), *strips]


def _texts(rows: Path, tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """Yield the rows' conversations, rendered by the template; nothing for rows without messages."""
    import pyarrow.parquet as pq

    if not set(TEXTS) <= set(pq.read_schema(rows).names):
        return
    table = pq.read_table(rows, columns=list(TEXTS))
    for row in table.slice(0, MAX_ROWS).to_pylist():
        if text := _rendered(row, tokenizer):
            yield text


def _rendered(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> str:
    """Render the conversation of a row; if the template rejects it, join the messages."""
    messages = json.loads(row["messages"] or "[]")
    if not messages:
        return str(row["answer"] or "")
    calls = json.loads(row["calls"] or "[]")
    reply: dict[str, Any] = {"role": "assistant", "content": row["answer"], **({"tool_calls": calls} if calls else {})}
    try:
        tools, variables = json.loads(row["tools"] or "[]"), json.loads(row["variables"] or "{}")
        return template.render(tokenizer, [*messages, reply], tools, answered=True, variables=variables)
    except template.TemplateRefusal:
        return "\n".join(str(message.get("content") or "") for message in [*messages, reply])


def _around_difference(text: str, trained: Any, served: Any) -> str:
    """Return the part of a text around the first token that differs."""
    ours, theirs = (
        tokenizer(text, add_special_tokens=False, return_offsets_mapping=True) for tokenizer in (trained, served)
    )
    pairs = zip(ours["input_ids"], theirs["input_ids"], strict=False)
    first = next((at for at, (a, b) in enumerate(pairs) if a != b), 0)
    begin = theirs["offset_mapping"][min(first, len(theirs["offset_mapping"]) - 1)][0]
    return text[max(begin - SHOWN // 4, 0) : begin + SHOWN]
