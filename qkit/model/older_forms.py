"""What transformers 5 says of a model in words of its own, said in those of transformers 4 beside them.

Readers of the older words (transformers 4, the vLLM images on it, mlx-lm, llama.cpp's converter) do not refuse what they miss: without
`rope_theta` they take a base of 10,000, without `torch_dtype` fp32. They do refuse a tokenizer class that they do not know. Readers of the
newer words find these as they were: both forms say the same, which is what transformers 5 makes of the older one.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from qkit.tensors.companions import CHAT_TEMPLATES

CONFIG, TOKENIZER, CUTS = "config.json", "tokenizer_config.json", "tokenizer.json"
NEW_CLASSES = {"TokenizersBackend", "PythonBackend", "SentencePieceBackend", "MistralCommonBackend"}
OLD_CLASS = "PreTrainedTokenizerFast"  # what reads tokenizer.json and nothing else, in 4 and in 5


# Where the rotary positions of one model differ by kind of layer: the older name of each one's base, by model_type. From the configuration
# classes of transformers 4.57; in other models all layers have one base there.
BY_LAYER = {
    "gemma3_text": ("rope_theta", "rope_local_base_freq"),
    "gemma3n_text": ("rope_theta", "rope_local_base_freq"),
    "t5gemma2_text": ("rope_theta", "rope_local_base_freq"),
    "modernbert": ("global_rope_theta", "local_rope_theta"),
    "modernbert-decoder": ("global_rope_theta", "local_rope_theta"),
}
BASES = {"gpt_neox": "rotary_emb_base", "gpt_neox_japanese": "rotary_emb_base"}  # else rope_theta
SHARES = {"gpt_neox": "rotary_pct", "gpt_neox_japanese": "rotary_pct"}  # else partial_rotary_factor
# Keys with another name there. Of all text models that both know, these have one that 5 does not write: by comparing their classes.
RENAMED = {"qwen3_moe": {"num_local_experts": "num_experts"}, "qwen3_vl_moe_text": {"num_local_experts": "num_experts"}}
# Phi-3 takes its scaling with these three and no more, and the length that it was trained for beside it.
LONGROPE = ("type", "short_factor", "long_factor")
BESIDE_SCALING = ("rope_theta", "partial_rotary_factor")


def config(found: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json with both forms of what it says, sections of several media included; what it says in the older one stays."""
    made = {key: config(value) if _is_section(key, value) else value for key, value in found.items()}
    dtype = made.get("dtype") or made.get("torch_dtype")
    if dtype is not None:
        made["dtype"] = made["torch_dtype"] = dtype
    if _contradiction(made):
        made["rope_parameters"] = {key: value for key, value in rope(made).items() if key != "type"}
    older = _older(made)
    return {**made, **{key: value for key, value in older.items() if made.get(key) is None}}


def rope(found: Mapping[str, Any]) -> dict[str, Any]:
    """Base and scaling of the rotary positions of a config.json, as transformers 5 (5.19) reads its two forms: a `rope_scaling` that holds
    something takes the place of the whole of `rope_parameters`, and what the one taken does not say of the base stands beside it."""
    held = dict(found.get("rope_scaling") or found.get("rope_parameters") or {})
    held.setdefault("rope_theta", found.get("rope_theta", 10000.0))
    held.setdefault("rope_type", held.get("type", "default"))
    return held


def _contradiction(found: Mapping[str, Any]) -> str:
    """What the two forms of a scaling say, where it differs; "" where it does not, or where it is by layer."""
    scaling, newer = found.get("rope_scaling"), found.get("rope_parameters")
    if not scaling or not newer or any(isinstance(value, dict) for value in newer.values()):
        return ""
    said = _scaling(str(found.get("model_type")), newer).get("rope_scaling", {"rope_type": "default"})
    one, other = (
        {"rope_type": held.get("rope_type", held.get("type"))}
        | {key: value for key, value in held.items() if key not in ("type", "rope_type", *BESIDE_SCALING)}
        for held in (scaling, said)
    )
    return "" if one == other else f"rope_scaling {one}, and {other} in newer words"


def in_dtype(found: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """A config.json of weights of that dtype; so say those of its sections that say one."""
    made = {
        key: in_dtype(value, dtype) if _is_section(key, value) and _says_dtype(value) else value
        for key, value in found.items()
    }
    return {**made, "dtype": dtype, "torch_dtype": dtype}


def _is_section(key: str, value: Any) -> bool:
    return key.endswith("_config") and key != "quantization_config" and isinstance(value, dict)


def _says_dtype(section: Mapping[str, Any]) -> bool:
    return bool({"dtype", "torch_dtype"} & section.keys())


def _older(found: Mapping[str, Any]) -> dict[str, Any]:
    """What one section of a config.json says in newer words alone, in the older ones."""
    kind, rope = str(found.get("model_type")), found.get("rope_parameters")
    older = {old: found[new] for new, old in RENAMED.get(kind, {}).items() if new in found}
    return {**older, **(_rope(kind, rope) if isinstance(rope, dict) and rope else {})}


def _rope(kind: str, rope: Mapping[str, Any]) -> dict[str, Any]:
    """The older keys of `rope_parameters`."""
    layers = {name: value for name, value in rope.items() if isinstance(value, dict)}
    if not layers:
        return _of_all_layers(kind, rope)
    full = layers.get("full_attention") or next(iter(layers.values()))
    sliding = layers.get("sliding_attention", full)
    if kind in BY_LAYER:
        wide, narrow = BY_LAYER[kind]
        bases = {wide: full.get("rope_theta"), narrow: sliding.get("rope_theta")}
        return {**{name: base for name, base in bases.items() if base is not None}, **_scaling(kind, full)}
    if len({layer.get("rope_theta") for layer in layers.values()}) > 1:
        return {}  # younger than the older words, which have none for it
    return _of_all_layers(kind, full)


def _of_all_layers(kind: str, rope: Mapping[str, Any]) -> dict[str, Any]:
    old = {
        BASES.get(kind, "rope_theta"): rope.get("rope_theta"),
        SHARES.get(kind, "partial_rotary_factor"): rope.get("partial_rotary_factor"),
    }
    length = rope.get("original_max_position_embeddings")
    if rope.get("rope_type") == "longrope" and length is not None:
        old["original_max_position_embeddings"] = length
    return {**{name: value for name, value in old.items() if value is not None}, **_scaling(kind, rope)}


def _scaling(kind: str, rope: Mapping[str, Any]) -> dict[str, Any]:
    """`rope_scaling`, where there is any. Its kind was called `type` before it was called `rope_type`, and some read that."""
    held = {key: value for key, value in rope.items() if key not in BESIDE_SCALING}
    held["type"] = held.setdefault("rope_type", held.get("type", "default"))
    if set(held) == {"type", "rope_type"} and held["type"] == "default":
        return {}
    if kind.startswith("phi3") or kind == "phi4_multimodal":
        held = {key: held[key] for key in LONGROPE if key in held}
    return {"rope_scaling": held}


def tokenizer(found: Mapping[str, Any], base: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """A tokenizer_config.json that transformers 4 can read as well. `base`: that of the model that the tokenizer came from, before
    transformers 5 saved it: its class is named where it had one of its own, and what it said of tokens at the beginning and end, which
    that class acts on in 4."""
    before = {key: value for key, value in (base or {}).items() if value is not None}
    made = dict(found)
    if made.get("tokenizer_class", OLD_CLASS) in NEW_CLASSES:
        known = before.get("tokenizer_class", OLD_CLASS)
        made["tokenizer_class"] = OLD_CLASS if known in NEW_CLASSES else known
    for key in ("add_bos_token", "add_eos_token"):
        if key in before:
            made.setdefault(key, before[key])
    extra = made.get("extra_special_tokens")
    if isinstance(extra, list):  # 4 wants a mapping under this name
        del made["extra_special_tokens"]
        made["additional_special_tokens"] = list(dict.fromkeys([*made.get("additional_special_tokens", []), *extra]))
    named = made.pop("model_specific_special_tokens", None)
    if named:
        made["extra_special_tokens"] = {**(made.get("extra_special_tokens") or {}), **named}
    return made


def settle(folder: Path, base: Path | None = None) -> None:
    """Rewrite the two files of a folder where they say something in the newer words alone. `base`: the folder that its tokenizer is of."""
    before = _read(base / TOKENIZER) if base else None
    for name, made in ((CONFIG, config), (TOKENIZER, lambda found: tokenizer(found, before))):
        if (found := _read(folder / name)) and (settled := made(found)) != found:
            (folder / name).write_text(json.dumps(settled, indent=1, ensure_ascii=False), encoding="utf-8")


def unreadable(folder: Path) -> Iterator[str]:
    """What readers of the older words would refuse, or take for something else without a word; nothing for a folder that has both."""
    found, spoken = _read(folder / CONFIG), _read(folder / TOKENIZER)
    yield from _unsaid(found)
    if spoken.get("tokenizer_class") in NEW_CLASSES:
        yield f"{TOKENIZER} names the class {spoken['tokenizer_class']}, which transformers 4 does not have"
    if isinstance(spoken.get("extra_special_tokens"), list):
        yield f"{TOKENIZER} holds extra_special_tokens as a list, which transformers 4 cannot read"


def _unsaid(found: Mapping[str, Any], place: str = "") -> Iterator[str]:
    """Of a config.json, or a section of it."""
    made = config(found)
    for key in made.keys() - found.keys():
        yield f"{CONFIG} says {place}{key} in newer words alone"
    if found.get("dtype") != found.get("torch_dtype", found.get("dtype")):
        yield f"{CONFIG} says {place}torch_dtype {found['torch_dtype']}, and {found.get('dtype')} in newer words"
    for key, value in _older(found).items():
        if isinstance(value, float | int) and found.get(key, value) != value:
            yield f"{CONFIG} says {place}{key} {found[key]:g}, and {value:g} in newer words"
    if said := _contradiction(found):
        yield f"{CONFIG} says {place}{said}"
    for key, value in found.items():
        if _is_section(key, value):
            yield from _unsaid(value, f"{place}{key}.")


def cuts_alike(tokenizer: Any, folder: Path) -> bool:
    """Whether the tokenizer cuts texts by the rules of the folder's tokenizer.json, which is all that others read; True where it has none.

    Padding and truncation are no rules of cutting: a tokenizer is given them by its user.
    """
    from tokenizers import Tokenizer

    file = folder / CUTS
    if not file.is_file() or not hasattr(tokenizer, "backend_tokenizer"):
        return True
    held = [json.loads(made.to_str()) for made in (Tokenizer.from_file(str(file)), tokenizer.backend_tokenizer)]
    for rules in held:
        rules.pop("padding", None)
        rules.pop("truncation", None)
    return bool(held[0] == held[1])


def drop_templates(folder: Path) -> None:
    """Take a folder's chat templates away, wherever they are kept."""
    for pattern in CHAT_TEMPLATES:
        for file in folder.glob(pattern):
            shutil.rmtree(file) if file.is_dir() else file.unlink()
    if (spoken := _read(folder / TOKENIZER)) and spoken.pop("chat_template", None) is not None:
        (folder / TOKENIZER).write_text(json.dumps(spoken, indent=1, ensure_ascii=False), encoding="utf-8")


def _read(file: Path) -> dict[str, Any]:
    held: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return held
