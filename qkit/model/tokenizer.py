"""The tokenizer of a model's folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qkit.chat import template
from qkit.model import added_tokens
from qkit.model.source import companions
from qkit.recipe import chat_templates, schema

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def tokenizer_of(model: schema.Model) -> PreTrainedTokenizerBase:
    """The tokenizer of a recipe's model."""
    return load_tokenizer(companions(model), model)


def load_tokenizer(folder: Path, section: schema.Model) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder, with the tokens and the chat template that the recipe's model section names.

    Raises:
        ModelError: it has none, has no chat template, or lacks the tokens that the template writes.
    """
    tokenizer = added_tokens.bare_tokenizer(folder, section.trust_remote_code)
    own = added_tokens.markers(tokenizer)
    added_tokens.add(tokenizer, section.add_tokens)
    template.choose(tokenizer, section.chat_template, folder)
    if section.chat_template in chat_templates.named():
        added_tokens.begin_as_texts_do(tokenizer)
    if section.chat_template is not None:
        added_tokens.check_markers(tokenizer, section.chat_template, own)
    return tokenizer


def vocabulary(section: schema.Model, tokenizer: PreTrainedTokenizerBase) -> int:
    """How many token ids the model has an embedding for, those of model.add_tokens included."""
    known, rows = 1 + max(tokenizer.get_vocab().values()), int(_config(section).get("vocab_size") or 0)
    return max(rows, known) if section.add_tokens else rows or known


def named_tokens(section: schema.Model) -> dict[str, int]:
    """Ids that the model's config names, by their keys there; of a list, the largest."""
    found = {
        key: value for key, value in _config(section).items() if key in ("bos_token_id", "eos_token_id", "pad_token_id")
    }
    flat = {key: max(value, default=None) if isinstance(value, list) else value for key, value in found.items()}
    return {key: int(value) for key, value in flat.items() if value is not None}


def max_positions(section: schema.Model) -> int | None:
    """The most tokens that the model's config says it takes."""
    found = _config(section).get("max_position_embeddings")
    return int(found) if found else None


def _config(section: schema.Model) -> dict[str, Any]:
    """The config of the text model; models for several media keep it one level down."""
    file = companions(section) / "config.json"
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return {**found, **found.get("text_config", {})}
