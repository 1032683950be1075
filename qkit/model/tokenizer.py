"""Loads the tokenizer of a model folder, and reads the token ids and limits that its config.json names."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qkit.chat import template
from qkit.core.errors import ModelError
from qkit.model import added_tokens
from qkit.model.source import companions
from qkit.recipe import chat_templates, schema

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


# Models whose first token has the position after that of padding, which is the id of the padding token.
AFTER_PADDING = (
    "roberta",
    "roberta-prelayernorm",
    "xlm-roberta",
    "xlm-roberta-xl",
    "camembert",
    "mpnet",
    "data2vec-text",
)


def tokenizer_of(model: schema.Model) -> PreTrainedTokenizerBase:
    """The tokenizer of a recipe's model."""
    return load_tokenizer(companions(model), model)


def load_tokenizer(folder: Path, section: schema.Model) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder, with the tokens and the chat template that the recipe's model section names.

    Raises:
        ModelError: there is no tokenizer or no chat template, or the tokenizer lacks the tokens that the template writes.
    """
    tokenizer = added_tokens.bare_tokenizer(folder, section.trust_remote_code)
    base_markers = added_tokens.markers(tokenizer)
    added_tokens.add(tokenizer, section.add_tokens)
    template.use_template_of_recipe(tokenizer, section.chat_template, folder)
    if section.chat_template in chat_templates.named():
        added_tokens.begin_as_texts_do(tokenizer)
    if section.chat_template is not None:
        added_tokens.check_markers(tokenizer, section.chat_template, base_markers)
    return tokenizer


def with_added_tokens(section: schema.Model) -> PreTrainedTokenizerBase:
    """The tokenizer of a recipe's model with model.add_tokens; no chat template is needed."""
    tokenizer = added_tokens.bare_tokenizer(companions(section), section.trust_remote_code)
    added_tokens.add(tokenizer, section.add_tokens)
    return tokenizer


def padding_of(section: schema.Model) -> int:
    """`padding_token` of a recipe's model, whose tokenizer is loaded for it."""
    return padding_token(with_added_tokens(section), section, companions(section))


def padding_token(tokenizer: PreTrainedTokenizerBase, section: schema.Model, folder: Path) -> int:
    """The id to pad batches of whole texts with: model.pad_token, the tokenizer's own, or another special token that ends no text.

    A head on a decoder reads the last token that is not padding: padded with the end of text, it would read one token too early.

    Raises:
        ModelError: there is no such token.
    """
    rows = vocabulary(section, tokenizer)
    if section.pad_token is not None:
        return template.known_id(tokenizer, section.pad_token, rows)
    specials = (tokenizer.pad_token_id, tokenizer.unk_token_id, *template.special_ids(tokenizer).values())
    usable = [number for number in specials if number not in (None, tokenizer.eos_token_id) and number < rows]
    if not usable:
        raise ModelError(
            f"{folder}: the tokenizer has no token to pad with that does not end texts: set model.add_tokens=[<pad>] and "
            "model.pad_token=<pad>",
            source=folder,
        )
    return int(usable[0])


def vocabulary(section: schema.Model, tokenizer: PreTrainedTokenizerBase) -> int:
    """The number of token ids that the model has an embedding for, including those of model.add_tokens."""
    known, rows = 1 + max(tokenizer.get_vocab().values()), int(_config(section).get("vocab_size") or 0)
    return max(rows, known) if section.add_tokens else rows or known


def named_tokens(section: schema.Model) -> dict[str, int]:
    """The token ids in the model's config, by their keys; of a list, the largest.

    Raises:
        ModelError: one is not a token id or a list of them.
    """
    file, config = _config_file(section), _config(section)
    ids = {key: token_ids(config, key, file) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return {key: max(numbers) for key, numbers in ids.items() if numbers}


def token_ids(config: Mapping[str, Any], key: str, file: Path) -> list[int]:
    """The value of `key` in a config as a list of token ids. Negative ones, which some configs use for "none", are included.

    Raises:
        ModelError: it is not an integer or a list of integers. `file`: for the message.
    """
    value = config.get(key)
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if wrong := [number for number in ids if not isinstance(number, int) or isinstance(number, bool)]:
        raise ModelError(
            f"{file}: {key} must be a token id (a non-negative integer) or a list of token ids, not {wrong[0]!r}; correct it there",
            source=file,
        )
    return list(ids)


def max_positions(section: schema.Model) -> int | None:
    """The largest number of tokens that the model's config allows."""
    config = _config(section)
    positions = config.get("max_position_embeddings")
    if positions and config.get("model_type") in AFTER_PADDING:
        positions -= 1 + int(config.get("pad_token_id") or 0)
    return int(positions) if positions else None


def _config(section: schema.Model) -> dict[str, Any]:
    """The config of the text model, which multimodal models keep in a section."""
    file = _config_file(section)
    config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return {**config, **config.get("text_config", {})}


def _config_file(section: schema.Model) -> Path:
    return companions(section) / "config.json"
