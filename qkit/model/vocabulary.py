"""Tokens that a tokenizer has and the model has no row for, as far as a model's folder tells without loading either: for the plan."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qkit.core.errors import ModelError
from qkit.model import config
from qkit.recipe import schema

NAMED = 5  # tokens that are named


def without_a_row(model: schema.Model) -> str | None:
    """Which added tokens are beyond the embedding, in words; None where there are none, or the model is in no folder here.

    Raises:
        ModelError: the model's config.json cannot be had.
    """
    file = Path(model.source).expanduser() / "tokenizer.json"
    if not file.is_file() or model.add_tokens:  # these get rows, and all others with them
        return None
    rows = int(config.config_of(model).get("vocab_size") or 0)
    return said({str(added["content"]): int(added["id"]) for added in _added(file) if added["id"] >= rows > 0}, rows)


def said(beyond: Mapping[str, int], rows: int) -> str | None:
    """The same of tokens that are known to be beyond `rows`."""
    words = ", ".join(f"{text} ({number})" for text, number in [*beyond.items()][:NAMED])
    return (
        f"the tokenizer has tokens that the model has no row for (it has 0 to {rows - 1}): {words}" if beyond else None
    )


def _added(file: Path) -> list[dict[str, Any]]:
    """The list of added tokens, which comes before vocabulary and merges; these, of megabytes, are not parsed."""
    text = file.read_text(encoding="utf-8")
    begin = text.find('"added_tokens"')
    if begin < 0:
        return []
    try:
        found: list[dict[str, Any]] = json.JSONDecoder().raw_decode(text, text.index("[", begin))[0]
    except ValueError:
        raise ModelError(f"{file}: is damaged; download it again") from None
    return found
