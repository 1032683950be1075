"""Reads a model's shape from its config.json, from a .gguf file's header, or from the table of known models."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qkit.core.errors import MissingExtra, ModelError
from qkit.core.network import reaching_hub
from qkit.core.sources import HubId, locate, unzipped
from qkit.model.gguf.header import gguf_config
from qkit.model.shape import NEEDED, Family, Shape
from qkit.recipe import schema

if TYPE_CHECKING:
    from qkit.model.shape import Outline


KNOWN_MODELS = Path(__file__).with_name("known_models.json")
MEDIA = frozenset({"vision", "audio", "speech", "image", "video"})
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")


# From peft 0.21 (peft/utils/transformers_weight_conversion.py): transformers 5 stacks experts in one parameter that were separate modules in
# transformers 4. Targets by the old names mean the new parameters; gate and up share one parameter, which gets twice the rank.
MIXTRAL_NAMES = (("gate", "gate.weight"), ("w1", "gate_up_proj"), ("w3", "gate_up_proj"), ("w2", "down_proj"))
QWEN_NAMES = (
    *(("gate", "gate.weight"), ("gate_proj", "gate_up_proj"), ("up_proj", "gate_up_proj")),
    ("down_proj", "down_proj"),
)


GEMMA = Family(tied=True, head_dim=256, norm_offset=True)


FAMILIES = {
    "llama": Family(mlp_bias=True),
    "mistral": Family(qkv_bias=False),
    "mixtral": Family(qkv_bias=False, experts=True, expert_names=MIXTRAL_NAMES),
    "qwen2": Family(qkv_bias=True),
    "qwen2_moe": Family(qkv_bias=True, experts=True),
    "qwen3": Family(qk_norm=True),
    "qwen3_moe": Family(qk_norm=True, experts=True, expert_names=QWEN_NAMES),
    "phi3": Family(qkv_bias=False, fused=True),
    "phimoe": Family(norm_bias=True, experts=True, router="router"),
    "gemma": GEMMA,
    "gemma2": replace(GEMMA, norms_per_layer=4, softcaps=True),
    "gemma3_text": replace(GEMMA, norms_per_layer=4, qk_norm=True, rotary_sets=2),
    "smollm3": Family(mlp_bias=True, tied=True),
    "gpt2": Family(gated=False, norm_bias=True, tied=True),
    "olmo2": Family(qk_norm=True, qk_norm_whole=True),
    "gpt_oss": Family(
        attention_bias=True, head_dim=64, sinks=True, experts=True, active_experts=4, expert_bias=True, router="router"
    ),
    "granite": Family(mlp_bias=True),
}
# Fields of a family that its shape takes over unchanged.
FAMILY_FIELDS = (
    *("norm_bias", "fused", "gated", "norms_per_layer", "norm_offset", "qk_norm", "qk_norm_whole", "sinks"),
    "rotary_sets",
)
# The usual names of sizes -> GPT-2's.
GPT2_SIZES = {
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "max_position_embeddings": "n_positions",
}


def shape_of(model: schema.Model) -> Shape:
    """The shape of a recipe's model, including its added tokens.

    Each added token counts as one more row, although spare rows of the vocabulary may take it: only the tokenizer tells how many there are.

    Raises:
        ModelError: the model cannot be found, or is of a kind that qkit cannot plan.
    """
    bare = _bare_shape(model)
    added = len(set(model.add_tokens))
    return replace(bare, vocabulary=bare.vocabulary + added, exact=False) if added else bare


def _bare_shape(model: schema.Model) -> Shape:
    """From the list of known models, the hub, the model's folder or its .gguf file."""
    known = known_models().get(model.source)
    if known is not None and not Path(model.source).exists():
        return _known_shape(model.source)
    location = locate(model.source, sha256=model.sha256, kind=ModelError)
    if isinstance(location, HubId):
        return from_config(_hub_config(location.name, model.revision), location.name)
    file = _config_file(unzipped(location, ModelError))
    return _file_shape(file, file.stat().st_mtime_ns)


def config_of(model: schema.Model) -> Mapping[str, Any]:
    """The config.json of a recipe's model, or its equivalent, from the same places as `shape_of`.

    Raises:
        ModelError: as `shape_of`.
    """
    known = known_models().get(model.source)
    if known is not None and not Path(model.source).exists():
        return known
    location = locate(model.source, sha256=model.sha256, kind=ModelError)
    if isinstance(location, HubId):
        return _hub_config(location.name, model.revision)
    file = _config_file(unzipped(location, ModelError))
    return gguf_config(file) if file.suffix == ".gguf" else _read_config(file)


def need_text_model(config: Mapping[str, Any], where: str) -> None:
    """Raise ModelError for a multimodal model: its other parts would be loaded, and all-linear would train them too."""
    other = [
        key.removesuffix("_config")
        for key in config
        if key.endswith("_config") and key.removesuffix("_config") in MEDIA
    ]
    if not (other and isinstance(config.get("text_config"), Mapping)):
        return
    kind = config["text_config"].get("model_type")
    raise ModelError(
        f"{where}: is a multimodal model ({config.get('model_type')}, with {', '.join(other)}); qkit trains text models. If "
        f"AutoModelForCausalLM of transformers knows its text part ({kind}), save that once and set model.source to its folder: whole = "
        "AutoModelForImageTextToText.from_pretrained(SOURCE); text = AutoModelForCausalLM.from_config(whole.config.text_config); "
        "text.model.load_state_dict(whole.model.language_model.state_dict()); text.lm_head.load_state_dict(whole.lm_head.state_dict()); "
        "text.to(whole.dtype).save_pretrained(FOLDER); and save the tokenizer there too",
        source=where,
    )


def _config_file(path: Path) -> Path:
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise ModelError(
            f"{path}: contains no config.json, so it is neither a model folder nor a .gguf file", source=path
        )
    return file


@functools.cache
def _known_shape(name: str) -> Shape:
    return from_config(known_models()[name], name)


@functools.lru_cache(maxsize=64)
def _file_shape(file: Path, _changed_ns: int) -> Shape:
    """The shape of a file; the time is part of the cache key, so that a changed file is read again."""
    return from_gguf(file) if file.suffix == ".gguf" else from_config(_read_config(file), str(file.parent))


@functools.cache
def known_models() -> Mapping[str, Mapping[str, Any]]:
    """Hub id -> the part of its config.json that a plan needs, for popular models."""
    groups = json.loads(KNOWN_MODELS.read_text(encoding="utf-8"))
    return {name: group["config"] for group in groups for name in group["names"]}


def source_of(text: str) -> str:
    """The model.source that --model names; a known model may be named without its owner."""
    if text in known_models() or Path(text).exists():
        return text
    return next((name for name in known_models() if name.rpartition("/")[2].lower() == text.lower()), text)


def from_config(config: Mapping[str, Any], where: str) -> Shape:
    """The shape that a config.json describes; of a multimodal model, its text part. `where`: for messages.

    Raises:
        ModelError: a size is missing.
    """
    text = config.get("text_config")
    if isinstance(text, Mapping):
        kind = f"{config.get('model_type')}_text"
        return replace(from_config({"model_type": kind, **text}, where), exact=False)
    kind = str(config.get("model_type", "unknown"))
    if kind == "gpt2":
        config = _gpt2_sizes(config)
    known = kind in FAMILIES and (FAMILIES[kind].experts or not _experts(config))
    outline = None if known else _outline(config)
    config = {**config, **dict(outline.sizes if outline else ())}
    _check_sizes(config, where)
    family = FAMILIES.get(kind, Family(mlp_bias=True))
    return Shape(
        architecture=kind,
        eager=outline.eager if outline else family.sinks,
        outline=outline,
        exact=known,
        **_sizes(config, family),
        **_biases(config, family),
        **{name: getattr(family, name) for name in FAMILY_FIELDS},
        **_windows(config),
        **_expert_sizes(config, family),
    )


def _sizes(config: Mapping[str, Any], family: Family) -> dict[str, Any]:
    heads, hidden = int(config["num_attention_heads"]), int(config["hidden_size"])
    return {
        "layers": int(config["num_hidden_layers"]),
        "hidden": hidden,
        "intermediate": int(config["intermediate_size"]),
        "heads": heads,
        "kv_heads": int(config.get("num_key_value_heads") or heads),
        "head_dim": int(config.get("head_dim") or family.head_dim or hidden // heads),
        "vocabulary": int(config["vocab_size"]),
        "tied": bool(config.get("tie_word_embeddings", family.tied)),
        "softcap": bool(config.get("attn_logit_softcapping", family.softcaps)),
        "final_softcap": bool(config.get("final_logit_softcapping", family.softcaps)),
        "positions": config.get("max_position_embeddings"),
    }


def _biases(config: Mapping[str, Any], family: Family) -> dict[str, Any]:
    bias = bool(config.get("attention_bias", family.attention_bias))
    follows = family.qkv_bias is None  # then `attention_bias` is for all four projections
    return {
        "attention_bias": bias if follows else bool(config.get("qkv_bias", family.qkv_bias)),
        "output_bias": bias and follows,
        "mlp_bias": family.mlp_bias and bool(config.get("mlp_bias", False)),
        "head_bias": bool(config.get("lm_head_bias", False)),
    }


def _outline(config: Mapping[str, Any]) -> Outline | None:
    from qkit.model import inventory  # imports torch and transformers, which known families do not need

    return inventory.outline_of(config)


def _gpt2_sizes(config: Mapping[str, Any]) -> dict[str, Any]:
    """GPT-2's config with the usual names: every product has a bias, and the MLP is four times as wide by default."""
    sizes = {name: config[gpt2_name] for name, gpt2_name in GPT2_SIZES.items() if gpt2_name in config}
    width = config.get("n_inner") or 4 * int(config.get("n_embd") or 0)
    fixed = {"num_key_value_heads": None, "head_dim": None, "intermediate_size": width, "attention_bias": True}
    return {**config, **sizes, **fixed}


def _check_sizes(config: Mapping[str, Any], where: str) -> None:
    if missing := [key for key in NEEDED if not isinstance(config.get(key), int)]:
        raise ModelError(
            f"{where}: its config.json (model_type {config.get('model_type', 'unknown')!r}) lacks {', '.join(missing)}; "
            "qkit plans text decoders like Llama (Llama, Mistral, Qwen, Phi-3, Gemma, SmolLM)",
            source=where,
        )


def _experts(config: Mapping[str, Any]) -> int:
    return next((int(config[key]) for key in EXPERTS if (config.get(key) or 0) > 1), 0)


def _expert_sizes(config: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """Fields that only a mixture of experts has: which layers have experts, how many, and how wide."""
    count = _experts(config)
    if not count:
        return {}
    every, dense = int(config.get("decoder_sparse_step") or 1), config.get("mlp_only_layers") or ()
    layers = range(int(config["num_hidden_layers"]))
    return {
        "experts": count,
        "expert_bias": family.expert_bias,
        "expert_transposed": family.expert_bias,
        "expert_names": family.expert_names,
        "router": family.router,
        "active_experts": int(config.get("num_experts_per_tok") or family.active_experts),
        "expert_width": int(config.get("moe_intermediate_size") or config["intermediate_size"]),
        "shared_width": int(config.get("shared_expert_intermediate_size") or 0),
        "sparse": tuple(layer for layer in layers if (layer + 1) % every == 0 and layer not in dense),
    }


def _windows(config: Mapping[str, Any]) -> dict[str, Any]:
    """The sliding window and how many layers have one: those in `layer_types`, or all."""
    window = config.get("sliding_window")
    if not window or config.get("use_sliding_window") is False:
        return {}
    layers = int(config["num_hidden_layers"])
    kinds: Sequence[str] = config.get("layer_types") or ["sliding_attention"] * layers
    return {"window": int(window), "windowed": sum(kind == "sliding_attention" for kind in kinds)}


def _read_config(file: Path) -> dict[str, Any]:
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{file}: cannot be read: {error}; download it again", source=file) from None
    if not isinstance(config, dict):
        raise ModelError(f"{file}: is not a JSON object; download it again", source=file)
    return config


def _hub_config(name: str, revision: str | None) -> dict[str, Any]:
    """config.json of a hub model, from the hub's cache or the hub."""
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
    except ImportError:
        raise MissingExtra("reading a model from the hub needs huggingface_hub: pip install 'qkit[train]'") from None
    remedy = f"check the network, run `hf download {name}` on a machine with a connection, or set model.source to a local folder"
    with reaching_hub(
        ModelError, f"{name}: its config.json is not in the hub's cache and could not be fetched", remedy
    ):
        try:
            file = hf_hub_download(name, "config.json", revision=revision)
        except GatedRepoError as error:
            raise ModelError(
                f"{name}: is gated; accept its licence at https://huggingface.co/{name} and log in with `hf auth login`",
                source=name,
            ) from error
        except RepositoryNotFoundError as error:
            raise ModelError(
                f"{name}: is not on the hub; check the name, or run `hf auth login` if the model is private",
                source=name,
            ) from error
    return _read_config(Path(file))


def from_gguf(file: Path) -> Shape:
    """The shape that a .gguf file's header describes; tensor data are not read.

    Raises:
        ModelError: it is not a GGUF file, is truncated, or lacks a size.
    """
    return from_config(gguf_config(file), str(file))
