"""Writes config.json and tokenizer_config.json so that transformers 4 can read them too: the keys of transformers 4 next to those of 5.

Readers of the old keys (transformers 4, the vLLM images built on it, mlx-lm, llama.cpp's converter) do not refuse a file that lacks them:
without `rope_theta` they assume a base of 10,000, without `torch_dtype` fp32. They do refuse an unknown tokenizer class. Readers of the new
keys find them unchanged: both forms say the same, which is what transformers 5 makes of the old one.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from qkit.tensors.companions import CHAT_TEMPLATES

CONFIG, TOKENIZER, CUTS = "config.json", "tokenizer_config.json", "tokenizer.json"
NEW_CLASSES = {"TokenizersBackend", "PythonBackend", "SentencePieceBackend", "MistralCommonBackend"}
OLD_CLASS = "PreTrainedTokenizerFast"  # reads tokenizer.json alone, in 4 and in 5

# Models whose rotary base depends on the kind of layer: model_type -> the old names of both bases. From the configuration classes of
# transformers 4.57, where in all other models every layer has the same base.
BY_LAYER = {
    "gemma3_text": ("rope_theta", "rope_local_base_freq"),
    "gemma3n_text": ("rope_theta", "rope_local_base_freq"),
    "t5gemma2_text": ("rope_theta", "rope_local_base_freq"),
    "modernbert": ("global_rope_theta", "local_rope_theta"),
    "modernbert-decoder": ("global_rope_theta", "local_rope_theta"),
}
BASES = {"gpt_neox": "rotary_emb_base", "gpt_neox_japanese": "rotary_emb_base"}  # else rope_theta
SHARES = {"gpt_neox": "rotary_pct", "gpt_neox_japanese": "rotary_pct"}  # else partial_rotary_factor
# Keys with another name in 4 that 5 does not write, found by comparing the classes of all text models that both know.
RENAMED = {"qwen3_moe": {"num_local_experts": "num_experts"}, "qwen3_vl_moe_text": {"num_local_experts": "num_experts"}}
# Phi-3 accepts exactly these three keys in its scaling, and its training length outside of it.
LONGROPE = ("type", "short_factor", "long_factor")
NOT_SCALING = ("rope_theta", "partial_rotary_factor")


def config(original: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json with both forms, in its sections too. Values that are given in the old form stay."""
    both = {key: config(value) if _is_section(key, value) else value for key, value in original.items()}
    dtype = both.get("dtype") or both.get("torch_dtype")
    if dtype is not None:
        both["dtype"] = both["torch_dtype"] = dtype
    if _contradiction(both):
        both["rope_parameters"] = {key: value for key, value in rope(both).items() if key != "type"}
    older = _older(both)
    return {**both, **{key: value for key, value in older.items() if both.get(key) is None}}


def rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """Base and scaling of the rotary positions, read from both forms as transformers 5.19 does.

    A non-empty `rope_scaling` replaces all of `rope_parameters`; a base that the one used does not give comes from the config itself.
    """
    parameters = dict(config.get("rope_scaling") or config.get("rope_parameters") or {})
    parameters.setdefault("rope_theta", config.get("rope_theta", 10000.0))
    parameters.setdefault("rope_type", parameters.get("type", "default"))
    return parameters


def _contradiction(config: Mapping[str, Any]) -> str:
    """How the two forms of a scaling differ; "" if they agree, or if the scaling depends on the layer."""
    old, new = config.get("rope_scaling"), config.get("rope_parameters")
    if not old or not new or any(isinstance(value, dict) for value in new.values()):
        return ""
    new_as_old = _scaling(str(config.get("model_type")), new).get("rope_scaling", {"rope_type": "default"})
    one, other = (
        {"rope_type": scaling.get("rope_type", scaling.get("type"))}
        | {key: value for key, value in scaling.items() if key not in ("type", "rope_type", *NOT_SCALING)}
        for scaling in (old, new_as_old)
    )
    return "" if one == other else f"rope_scaling {one}, but {other} in the new form"


def in_dtype(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """The config.json of weights in this dtype; sections that give a dtype get it too."""
    sections = {
        key: in_dtype(value, dtype) if _is_section(key, value) and _gives_dtype(value) else value
        for key, value in config.items()
    }
    return {**sections, "dtype": dtype, "torch_dtype": dtype}


def _is_section(key: str, value: Any) -> bool:
    return key.endswith("_config") and key != "quantization_config" and isinstance(value, dict)


def _gives_dtype(section: Mapping[str, Any]) -> bool:
    return bool({"dtype", "torch_dtype"} & section.keys())


def _older(config: Mapping[str, Any]) -> dict[str, Any]:
    """The old form of what one section of a config.json gives in the new form."""
    kind, parameters = str(config.get("model_type")), config.get("rope_parameters")
    older = {old: config[new] for new, old in RENAMED.get(kind, {}).items() if new in config}
    return {**older, **(_rope(kind, parameters) if isinstance(parameters, dict) and parameters else {})}


def _rope(kind: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The old keys of `rope_parameters`."""
    layers = {name: value for name, value in parameters.items() if isinstance(value, dict)}
    if not layers:
        return _rope_of_all_layers(kind, parameters)
    full = layers.get("full_attention") or next(iter(layers.values()))
    sliding = layers.get("sliding_attention", full)
    if kind in BY_LAYER:
        full_key, sliding_key = BY_LAYER[kind]
        bases = {full_key: full.get("rope_theta"), sliding_key: sliding.get("rope_theta")}
        return {**{name: base for name, base in bases.items() if base is not None}, **_scaling(kind, full)}
    if len({layer.get("rope_theta") for layer in layers.values()}) > 1:
        return {}  # newer than the old form, which cannot express it
    return _rope_of_all_layers(kind, full)


def _rope_of_all_layers(kind: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
    old = {
        BASES.get(kind, "rope_theta"): parameters.get("rope_theta"),
        SHARES.get(kind, "partial_rotary_factor"): parameters.get("partial_rotary_factor"),
    }
    length = parameters.get("original_max_position_embeddings")
    if parameters.get("rope_type") == "longrope" and length is not None:
        old["original_max_position_embeddings"] = length
    return {**{name: value for name, value in old.items() if value is not None}, **_scaling(kind, parameters)}


def _scaling(kind: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """`rope_scaling`, if positions are scaled. `rope_type` was once called `type`, and some readers still want that."""
    scaling = {key: value for key, value in parameters.items() if key not in NOT_SCALING}
    scaling["type"] = scaling.setdefault("rope_type", scaling.get("type", "default"))
    if set(scaling) == {"type", "rope_type"} and scaling["type"] == "default":
        return {}
    if kind.startswith("phi3") or kind == "phi4_multimodal":
        scaling = {key: scaling[key] for key in LONGROPE if key in scaling}
    return {"rope_scaling": scaling}


def tokenizer(saved: Mapping[str, Any], base: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """A tokenizer_config.json that transformers 4 can read too.

    `base`: that of the model that the tokenizer came from, before transformers 5 saved it. Its class is used if transformers 4 has it, and so
    are its settings for tokens at the beginning and end, which that class obeys.
    """
    before = {key: value for key, value in (base or {}).items() if value is not None}
    both = dict(saved)
    if both.get("tokenizer_class", OLD_CLASS) in NEW_CLASSES:
        known = before.get("tokenizer_class", OLD_CLASS)
        both["tokenizer_class"] = OLD_CLASS if known in NEW_CLASSES else known
    for key in ("add_bos_token", "add_eos_token"):
        if key in before:
            both.setdefault(key, before[key])
    extra = both.get("extra_special_tokens")
    if isinstance(extra, list):  # transformers 4 requires a mapping under this name
        del both["extra_special_tokens"]
        both["additional_special_tokens"] = _unique([*(both.get("additional_special_tokens") or ()), *extra])
    named = both.pop("model_specific_special_tokens", None)
    if named:
        both["extra_special_tokens"] = {**(both.get("extra_special_tokens") or {}), **named}
    return both


def _unique(tokens: Iterable[Any]) -> list[Any]:
    """The tokens without repetitions, which have the same content; a token is a string or the fields of an AddedToken."""
    by_content: dict[str, Any] = {}
    for token in tokens:
        by_content.setdefault(str(token.get("content")) if isinstance(token, dict) else str(token), token)
    return list(by_content.values())


def settle(folder: Path, base: Path | None = None) -> None:
    """Add the old form to config.json and tokenizer_config.json of a folder. `base`: the folder that its tokenizer came from."""
    before = _read(base / TOKENIZER) if base else None
    for name, convert in ((CONFIG, config), (TOKENIZER, lambda saved: tokenizer(saved, before))):
        if (saved := _read(folder / name)) and (settled := convert(saved)) != saved:
            (folder / name).write_text(json.dumps(settled, indent=1, ensure_ascii=False), encoding="utf-8")


def unreadable(folder: Path) -> Iterator[str]:
    """What readers of the old form would refuse or misread; nothing for a folder that has both forms."""
    tokenizer_config = _read(folder / TOKENIZER)
    yield from _missing(_read(folder / CONFIG))
    if tokenizer_config.get("tokenizer_class") in NEW_CLASSES:
        yield f"{TOKENIZER} names the class {tokenizer_config['tokenizer_class']}, which transformers 4 does not have"
    if isinstance(tokenizer_config.get("extra_special_tokens"), list):
        yield f"{TOKENIZER} has extra_special_tokens as a list, which transformers 4 cannot read"


def _missing(section: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """The same for a config.json, or a section of it."""
    for key in config(section).keys() - section.keys():
        yield f"{CONFIG} has {prefix}{key} only in the new form"
    if section.get("dtype") != section.get("torch_dtype", section.get("dtype")):
        yield f"{CONFIG} has {prefix}torch_dtype {section['torch_dtype']}, but {section.get('dtype')} in the new form"
    for key, value in _older(section).items():
        if isinstance(value, float | int) and section.get(key, value) != value:
            yield f"{CONFIG} has {prefix}{key} {section[key]:g}, but {value:g} in the new form"
    if difference := _contradiction(section):
        yield f"{CONFIG} has {prefix}{difference}"
    for key, value in section.items():
        if _is_section(key, value):
            yield from _missing(value, f"{prefix}{key}.")


def cuts_alike(tokenizer: Any, folder: Path) -> bool:
    """Whether a tokenizer splits text by the rules of the folder's tokenizer.json, the only file that other readers use; True if there is none.

    Padding and truncation are not compared: the user of a tokenizer sets them.
    """
    from tokenizers import Tokenizer

    file = folder / CUTS
    if not file.is_file() or not hasattr(tokenizer, "backend_tokenizer"):
        return True
    on_disk, loaded = (
        json.loads(backend.to_str()) for backend in (Tokenizer.from_file(str(file)), tokenizer.backend_tokenizer)
    )
    for rules in (on_disk, loaded):
        rules.pop("padding", None)
        rules.pop("truncation", None)
    return bool(on_disk == loaded)


def drop_templates(folder: Path) -> None:
    """Delete a folder's chat templates from all places that can hold them."""
    for pattern in CHAT_TEMPLATES:
        for file in folder.glob(pattern):
            shutil.rmtree(file) if file.is_dir() else file.unlink()
    if (saved := _read(folder / TOKENIZER)) and saved.pop("chat_template", None) is not None:
        (folder / TOKENIZER).write_text(json.dumps(saved, indent=1, ensure_ascii=False), encoding="utf-8")


def _read(file: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return content
