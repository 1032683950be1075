"""A model's shape from its config.json, from a .gguf file's header, or from the table of known models."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qkit.core.errors import MissingExtra, ModelError
from qkit.core.network import reaching_hub
from qkit.core.sources import HubId, locate
from qkit.model.gguf.header import gguf_config
from qkit.model.shape import NEEDED, Family, Shape
from qkit.recipe import schema

if TYPE_CHECKING:
    from qkit.model.shape import Outline


KNOWN_MODELS = Path(__file__).with_name("known_models.json")
MEDIA = frozenset({"vision", "audio", "speech", "image", "video"})
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")


# peft 0.21 (peft/utils/transformers_weight_conversion.py): where transformers 5 holds experts in one parameter that were modules of their
# own in transformers 4, targets by the old names mean the new parameters, and gate and up, now one, get twice the rank together.
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
# What GPT-2's config.json calls its sizes, by the names that the others have.
GPT2_SIZES = {
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "max_position_embeddings": "n_positions",
}


def shape_of(model: schema.Model) -> Shape:
    """The shape of a recipe's model, with the tokens that are added to it.

    Spare rows of the vocabulary may take them; how many there are only the tokenizer tells, so each is counted as a row more.

    Raises:
        ModelError: the model cannot be had, or is of a kind that qkit does not plan.
    """
    bare = _bare_shape(model)
    added = len(set(model.add_tokens))
    return replace(bare, vocabulary=bare.vocabulary + added, exact=False) if added else bare


def _bare_shape(model: schema.Model) -> Shape:
    """From the model's folder, its config.json or .gguf file, the list of known models, or the hub."""
    known = known_models().get(model.source)
    if known is not None and not Path(model.source).exists():
        return _known_shape(model.source)
    found = locate(model.source, sha256=model.sha256, kind=ModelError)
    if isinstance(found, HubId):
        return from_config(_hub_config(found.name, model.revision), found.name)
    file = _config_file(found)
    return _file_shape(file, file.stat().st_mtime_ns)


def config_of(model: schema.Model) -> Mapping[str, Any]:
    """What is known of a recipe's model by the names of config.json, from the places where `shape_of` looks.

    Raises:
        ModelError: as `shape_of`.
    """
    known = known_models().get(model.source)
    if known is not None and not Path(model.source).exists():
        return known
    found = locate(model.source, sha256=model.sha256, kind=ModelError)
    if isinstance(found, HubId):
        return _hub_config(found.name, model.revision)
    file = _config_file(found)
    return gguf_config(file) if file.suffix == ".gguf" else _read_config(file)


def need_text_model(config: Mapping[str, Any], where: str) -> None:
    """Raises ModelError for a model that sees or hears as well: its other parts would be loaded, and all-linear would train them too."""
    other = [
        key.removesuffix("_config")
        for key in config
        if key.endswith("_config") and key.removesuffix("_config") in MEDIA
    ]
    if not (other and isinstance(config.get("text_config"), Mapping)):
        return
    kind = config["text_config"].get("model_type")
    raise ModelError(
        f"{where}: is a model for text and more ({config.get('model_type')}, with {', '.join(other)}); qkit trains models of text. Where "
        f"transformers' AutoModelForCausalLM knows its text part ({kind}), save that once and give model.source its folder: whole = "
        "AutoModelForImageTextToText.from_pretrained(SOURCE); text = AutoModelForCausalLM.from_config(whole.config.text_config); "
        "text.model.load_state_dict(whole.model.language_model.state_dict()); text.lm_head.load_state_dict(whole.lm_head.state_dict()); "
        "text.to(whole.dtype).save_pretrained(FOLDER); and the tokenizer with it"
    )


def _config_file(found: Path) -> Path:
    file = found / "config.json" if found.is_dir() else found
    if not file.is_file():
        raise ModelError(f"{found}: holds no config.json, so it is not a model folder (nor a .gguf file)")
    return file


@functools.cache
def _known_shape(name: str) -> Shape:
    return from_config(known_models()[name], name)


@functools.lru_cache(maxsize=64)
def _file_shape(file: Path, _changed_ns: int) -> Shape:
    """A file is read again when it has changed."""
    return from_gguf(file) if file.suffix == ".gguf" else from_config(_read_config(file), str(file.parent))


@functools.cache
def known_models() -> Mapping[str, Mapping[str, Any]]:
    """Hub id -> the part of its config.json that a plan needs, for models that are often used."""
    groups = json.loads(KNOWN_MODELS.read_text(encoding="utf-8"))
    return {name: group["config"] for group in groups for name in group["names"]}


def source_of(text: str) -> str:
    """What --model names, as a recipe's model.source: a known model may be called by its name without the owner."""
    if text in known_models() or Path(text).exists():
        return text
    return next((name for name in known_models() if name.rpartition("/")[2].lower() == text.lower()), text)


def from_config(config: Mapping[str, Any], where: str) -> Shape:
    """The shape that a config.json describes; of a model that sees images as well, the part that reads text.

    Raises:
        ModelError: it lacks a size.
    """
    text = config.get("text_config")
    if isinstance(text, Mapping):
        kind = f"{config.get('model_type')}_text"
        return replace(from_config({"model_type": kind, **text}, where), exact=False)
    kind = str(config.get("model_type", "unknown"))
    if kind == "gpt2":
        config = _gpt2_sizes(config)
    known = kind in FAMILIES and (FAMILIES[kind].experts or not _experts(config))
    seen = None if known else _outline(config)
    config = {**config, **dict(seen.sizes if seen else ())}
    _check_sizes(config, where)
    family = FAMILIES.get(kind, Family(mlp_bias=True))
    heads = int(config["num_attention_heads"])
    bias = bool(config.get("attention_bias", family.attention_bias))
    return Shape(
        architecture=kind,
        layers=int(config["num_hidden_layers"]),
        hidden=int(config["hidden_size"]),
        intermediate=int(config["intermediate_size"]),
        heads=heads,
        kv_heads=int(config.get("num_key_value_heads") or heads),
        head_dim=int(config.get("head_dim") or family.head_dim or int(config["hidden_size"]) // heads),
        vocabulary=int(config["vocab_size"]),
        tied=bool(config.get("tie_word_embeddings", family.tied)),
        attention_bias=bias if family.qkv_bias is None else bool(config.get("qkv_bias", family.qkv_bias)),
        output_bias=bias and family.qkv_bias is None,
        mlp_bias=family.mlp_bias and bool(config.get("mlp_bias", False)),
        head_bias=bool(config.get("lm_head_bias", False)),
        norm_bias=family.norm_bias,
        fused=family.fused,
        gated=family.gated,
        norms_per_layer=family.norms_per_layer,
        norm_offset=family.norm_offset,
        qk_norm=family.qk_norm,
        qk_norm_whole=family.qk_norm_whole,
        sinks=family.sinks,
        eager=seen.eager if seen else family.sinks,
        softcap=bool(config.get("attn_logit_softcapping", family.softcaps)),
        final_softcap=bool(config.get("final_logit_softcapping", family.softcaps)),
        rotary_sets=family.rotary_sets,
        positions=config.get("max_position_embeddings"),
        outline=seen,
        exact=known,
        **_windows(config),
        **_expert_sizes(config, family),
    )


def _outline(config: Mapping[str, Any]) -> Outline | None:
    from qkit.model import outline  # which takes seconds, and is not needed for the families that are known

    return outline.read(config)


def _gpt2_sizes(config: Mapping[str, Any]) -> dict[str, Any]:
    """GPT-2's config by the others' names: every product has a bias, and the MLP is four times as wide where nothing is said."""
    found = {name: config[own] for name, own in GPT2_SIZES.items() if own in config}
    width = config.get("n_inner") or 4 * int(config.get("n_embd") or 0)
    fixed = {"num_key_value_heads": None, "head_dim": None, "intermediate_size": width, "attention_bias": True}
    return {**config, **found, **fixed}


def _check_sizes(config: Mapping[str, Any], where: str) -> None:
    if missing := [key for key in NEEDED if not isinstance(config.get(key), int)]:
        raise ModelError(
            f"{where}: its config.json (model_type {config.get('model_type', 'unknown')!r}) has no {', '.join(missing)}; "
            "qkit plans text decoders of the Llama kind (Llama, Mistral, Qwen, Phi-3, Gemma, SmolLM)"
        )


def _experts(config: Mapping[str, Any]) -> int:
    return next((int(config[key]) for key in EXPERTS if (config.get(key) or 0) > 1), 0)


def _expert_sizes(config: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """What only a mixture of experts has: which layers have experts, how many, how wide."""
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
    """The sliding window and how many layers have one: as `layer_types` lists them, else all of them."""
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
        raise ModelError(f"{file}: cannot be read: {error}; download it again") from None
    if not isinstance(config, dict):
        raise ModelError(f"{file}: is no JSON object; download it again")
    return config


def _hub_config(name: str, revision: str | None) -> dict[str, Any]:
    """config.json of a hub model, from the hub's cache or the hub."""
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
    except ImportError:
        raise MissingExtra("reading a model from the hub needs huggingface_hub: pip install 'qkit[train]'") from None
    remedy = f"check the network, `hf download {name}` where there is one, or give model.source a local folder"
    with reaching_hub(
        ModelError, f"{name}: its config.json is not in the hub's cache and could not be fetched", remedy
    ):
        try:
            file = hf_hub_download(name, "config.json", revision=revision)
        except GatedRepoError as error:
            raise ModelError(
                f"{name}: is gated; accept its licence at https://huggingface.co/{name} and log in with `hf auth login`"
            ) from error
        except RepositoryNotFoundError as error:
            raise ModelError(
                f"{name}: the hub has no such model; check the name, or `hf auth login` if it is private"
            ) from error
    return _read_config(Path(file))


def from_gguf(file: Path) -> Shape:
    """The shape that a .gguf file's header describes; tensor data are not read.

    Raises:
        ModelError: it is no GGUF file, is cut off, or lacks a size.
    """
    return from_config(gguf_config(file), str(file))
