"""Finds tokens that the tokenizer has but the embedding has no row for. Reads files only, so that the plan stays quick."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qkit.core.errors import ModelError
from qkit.model import config
from qkit.recipe import schema

NAMED = 5  # tokens named in a message


def without_a_row(model: schema.Model) -> str | None:
    """A message about added tokens without a row in the embedding; None if there are none, or if the model is not in a local folder.

    Raises:
        ModelError: the model's config.json cannot be read, or its tokenizer.json is damaged.
    """
    file = Path(model.source).expanduser() / "tokenizer.json"
    if not file.is_file() or model.add_tokens:  # add_tokens grows the embedding to all of the tokenizer's ids
        return None
    rows = int(config.config_of(model).get("vocab_size") or 0)
    return message({str(added["content"]): int(added["id"]) for added in _added(file) if added["id"] >= rows > 0}, rows)


def message(beyond: Mapping[str, int], rows: int) -> str | None:
    """The message for `beyond`, tokens and their ids, in a model with `rows` rows; None if it is empty."""
    tokens = ", ".join(f"{text} ({number})" for text, number in [*beyond.items()][:NAMED])
    return (
        f"the tokenizer has tokens that the model has no row for (it has 0 to {rows - 1}): {tokens}" if beyond else None
    )


def _added(file: Path) -> list[dict[str, Any]]:
    """The list of added tokens. It precedes the vocabulary and the merges, which take megabytes and are not parsed."""
    text = file.read_text(encoding="utf-8")
    begin = text.find('"added_tokens"')
    if begin < 0:
        return []
    try:
        tokens: list[dict[str, Any]] = json.JSONDecoder().raw_decode(text, text.index("[", begin))[0]
    except ValueError:
        raise ModelError(f"{file}: damaged file; download it again") from None
    return tokens
