"""The shape of a decoder model, from its config.json or the header of its .gguf file: sizes only, and no torch."""

from __future__ import annotations

import functools
import json
import mmap
import re
import struct
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qkit import recipe
from qkit.errors import MissingExtra, ModelError
from qkit.reach import reaching_hub
from qkit.source import HubId, locate

KNOWN_MODELS = Path(__file__).with_name("known_models.json")
NEEDED = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
MEDIA = frozenset({"vision", "audio", "speech", "image", "video"})
LAYER = re.compile(r"^.*?\.\d+\.")  # what comes before a module's name within its layer
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")


@dataclass(frozen=True)
class Outline:
    """What a model that was made without weights has: its matrices by their whole names, and how many parameters there are in all.

    `sizes`: what its config.json calls otherwise or leaves unsaid, by the names that a plan needs.
    """

    linears: tuple[Linear, ...]
    others: tuple[Linear, ...]
    experts: tuple[Linear, ...]
    routers: tuple[Linear, ...]
    renamed: tuple[tuple[str, str], ...]
    parameters: int
    eager: bool
    sizes: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Shape:
    """Sizes of a decoder. `exact`: its family is known, so the parameter count is right to the last one."""

    architecture: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool
    attention_bias: bool = False  # on the query, key and value projections
    output_bias: bool = False  # on the projection out of attention
    mlp_bias: bool = False
    head_bias: bool = False
    norm_bias: bool = False
    fused: bool = False  # one matrix for query, key and value, one for gate and up
    gated: bool = True  # the MLP has a gate; without one, names and learnt positions are GPT-2's
    norms_per_layer: int = 2
    norm_offset: bool = False  # norms multiply by 1 + weight, which is made anew, in fp32, at each use
    qk_norm: bool = False
    qk_norm_whole: bool = False  # over all heads at once, not over each alone
    sinks: bool = False  # a learnt score for each head that no token takes
    eager: bool = False  # transformers has no sdpa for it
    softcap: bool = False  # attention scores are bounded, which is one more tensor of them where they are kept at all
    final_softcap: bool = False  # and so are the logits
    rotary_sets: int = 1  # kinds of attention that have rotary frequencies of their own
    window: int | None = None  # tokens that the layers in `windowed` look back on
    windowed: int = 0
    experts: int = 0
    expert_bias: bool = False  # of the experts' matrices and of the router
    expert_transposed: bool = False  # they are held [in, out]
    expert_names: tuple[
        tuple[str, str], ...
    ] = ()  # names that peft takes for the experts and the router -> the parameters' own
    router: str = "gate"  # what routes tokens to them is called
    active_experts: int = 0
    expert_width: int = 0
    shared_width: int = 0  # of the expert that every token passes
    sparse: tuple[int, ...] = ()  # the layers that have experts in the place of the gated MLP
    positions: int | None = None  # the longest row that the model was made for
    outline: Outline | None = None  # of a family that is not known here: what transformers makes of its config.json
    exact: bool = True

    def __hash__(self) -> int:
        """Shapes are keys of caches: hashing a few sizes tells them apart well enough."""
        return hash((self.architecture, self.layers, self.hidden, self.intermediate, self.vocabulary))

    @property
    def attention(self) -> int:
        """Width of the queries, all heads together."""
        return self.heads * self.head_dim

    @property
    def kv(self) -> int:
        """Width of the keys, all heads together."""
        return self.kv_heads * self.head_dim

    @property
    def dense(self) -> int:
        """How many layers have a gated MLP of the model's own width."""
        return self.layers - len(self.sparse)


@dataclass(frozen=True)
class Linear:
    """A matrix product of one layer. `experts`: it is as many matrices of these sizes, held in one parameter; 0: a module of its own."""

    name: str
    inputs: int
    outputs: int
    bias: bool = False
    experts: int = 0

    @property
    def weights(self) -> int:
        return self.inputs * self.outputs * (self.experts or 1)


# peft 0.21 (peft/utils/transformers_weight_conversion.py): where transformers 5 holds experts in one parameter that were modules of their
# own in transformers 4, targets by the old names mean the new parameters, and gate and up, now one, get twice the rank together.
MIXTRAL_NAMES = (("gate", "gate.weight"), ("w1", "gate_up_proj"), ("w3", "gate_up_proj"), ("w2", "down_proj"))
QWEN_NAMES = (
    *(("gate", "gate.weight"), ("gate_proj", "gate_up_proj"), ("up_proj", "gate_up_proj")),
    ("down_proj", "down_proj"),
)


@dataclass(frozen=True)
class Family:
    """What a config.json leaves unsaid, because transformers' code for the model type says it."""

    qkv_bias: bool | None = None  # None: as `attention_bias` says, which then counts for the output projection as well
    mlp_bias: bool = False  # whether `mlp_bias` is looked at
    norm_bias: bool = False
    fused: bool = False
    gated: bool = True
    norms_per_layer: int = 2
    norm_offset: bool = False
    qk_norm: bool = False
    qk_norm_whole: bool = False
    attention_bias: bool = False  # where `attention_bias` is absent
    sinks: bool = False
    tied: bool = False  # where `tie_word_embeddings` is absent
    head_dim: int | None = None  # where `head_dim` is absent; None: hidden / heads
    experts: bool = False
    active_experts: int = 2  # where `num_experts_per_tok` is absent
    expert_bias: bool = False  # and their matrices are held [in, out]
    expert_names: tuple[tuple[str, str], ...] = ()
    router: str = "gate"
    softcaps: bool = False  # where the config.json is silent about them
    rotary_sets: int = 1


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


def shape_of(model: recipe.Model) -> Shape:
    """The shape of a recipe's model, with the tokens that are added to it.

    Spare rows of the vocabulary may take them; how many there are only the tokenizer tells, so each is counted as a row more.

    Raises:
        ModelError: the model cannot be had, or is of a kind that qkit does not plan.
    """
    bare = _bare_shape(model)
    added = len(set(model.add_tokens))
    return replace(bare, vocabulary=bare.vocabulary + added, exact=False) if added else bare


def _bare_shape(model: recipe.Model) -> Shape:
    """From the model's folder, its config.json or .gguf file, the list of known models, or the hub."""
    known = known_models().get(model.source)
    if known is not None and not Path(model.source).exists():
        return _known_shape(model.source)
    found = locate(model.source, sha256=model.sha256, kind=ModelError)
    if isinstance(found, HubId):
        return from_config(_hub_config(found.name, model.revision), found.name)
    file = _config_file(found)
    return _file_shape(file, file.stat().st_mtime_ns)


def config_of(model: recipe.Model) -> Mapping[str, Any]:
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
    return _gguf_config(file) if file.suffix == ".gguf" else _read_config(file)


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
    from qkit import outline  # which takes seconds, and is not needed for the families that are known

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


# --- what is in it --------------------------------------------------------------------------------------------------


@functools.cache
def layer_linears(shape: Shape, sparse: bool = False) -> tuple[Linear, ...]:
    """The linear modules of one layer, by transformers' names; all of them are quantized, the head is not.

    `sparse`: of a layer with experts. These are tensors of three dimensions and no linear modules.
    """
    bias = shape.attention_bias
    if not shape.gated:
        return (
            Linear("attn.c_attn", shape.hidden, shape.attention + 2 * shape.kv, bias),
            Linear("attn.c_proj", shape.attention, shape.hidden, bias),
            Linear("mlp.c_fc", shape.hidden, shape.intermediate, bias),
            Linear("mlp.c_proj", shape.intermediate, shape.hidden, bias),
        )
    out = Linear("self_attn.o_proj", shape.attention, shape.hidden, shape.output_bias)
    if shape.fused:
        qkv = Linear("self_attn.qkv_proj", shape.hidden, shape.attention + 2 * shape.kv, bias)
        gate_up = Linear("mlp.gate_up_proj", shape.hidden, 2 * shape.intermediate, shape.mlp_bias)
        return qkv, out, gate_up, Linear("mlp.down_proj", shape.intermediate, shape.hidden, shape.mlp_bias)
    attention = (
        Linear("self_attn.q_proj", shape.hidden, shape.attention, bias),
        Linear("self_attn.k_proj", shape.hidden, shape.kv, bias),
        Linear("self_attn.v_proj", shape.hidden, shape.kv, bias),
        out,
    )
    if not sparse:
        return attention + _gated("mlp", shape.hidden, shape.intermediate, shape.mlp_bias)
    if not shape.shared_width:
        return attention
    shared = _gated("mlp.shared_expert", shape.hidden, shape.shared_width, False)
    return (*attention, *shared, Linear("mlp.shared_expert_gate", shape.hidden, 1))


def _gated(name: str, hidden: int, width: int, bias: bool) -> tuple[Linear, ...]:
    return (
        Linear(f"{name}.gate_proj", hidden, width, bias),
        Linear(f"{name}.up_proj", hidden, width, bias),
        Linear(f"{name}.down_proj", width, hidden, bias),
    )


@functools.cache
def linears(shape: Shape) -> tuple[tuple[Linear, int], ...]:
    """Every linear module of the layers, and how many layers have it."""
    if shape.outline:
        alike = Counter(replace(linear, name=LAYER.sub("", linear.name)) for linear in shape.outline.linears)
        return tuple(alike.items())
    dense = tuple((linear, shape.dense) for linear in layer_linears(shape) if shape.dense)
    if not shape.sparse:
        return dense
    return dense + tuple((linear, len(shape.sparse)) for linear in layer_linears(shape, sparse=True))


def layer_name(shape: Shape, layer: int) -> str:
    """What transformers calls a layer."""
    return f"model.layers.{layer}" if shape.gated else f"transformer.h.{layer}"


@functools.cache
def modules(shape: Shape) -> tuple[Linear, ...]:
    """Every linear module of the layers, by its whole name."""
    if shape.outline:
        return shape.outline.linears
    sparse = frozenset(shape.sparse)
    return tuple(
        replace(linear, name=f"{layer_name(shape, layer)}.{linear.name}")
        for layer in range(shape.layers)
        for linear in layer_linears(shape, layer in sparse)
    )


@functools.cache
def experts(shape: Shape) -> tuple[Linear, ...]:
    """Every parameter that holds the experts of a layer, by its whole name: gate and up in one, and down."""
    if shape.outline:
        return shape.outline.experts
    hidden, width, count = shape.hidden, shape.expert_width, shape.experts
    return tuple(
        Linear(f"{layer_name(shape, layer)}.mlp.experts.{name}", inputs, outputs, shape.expert_bias, count)
        for layer in shape.sparse
        for name, inputs, outputs in (("gate_up_proj", hidden, 2 * width), ("down_proj", width, hidden))
    )


@functools.cache
def routers(shape: Shape) -> tuple[Linear, ...]:
    """The weight that routes tokens to experts, of each layer that has one, by its whole name."""
    if shape.outline:
        return shape.outline.routers
    return tuple(
        Linear(f"{layer_name(shape, layer)}.mlp.{shape.router}.weight", shape.hidden, shape.experts, shape.expert_bias)
        for layer in shape.sparse
    )


@functools.cache
def vocabulary_modules(shape: Shape) -> tuple[Linear, ...]:
    """Embeddings and head, which `all-linear` leaves out."""
    if shape.outline:
        return shape.outline.others
    head = Linear("lm_head", shape.hidden, shape.vocabulary, shape.head_bias)
    if shape.gated:
        return head, Linear("model.embed_tokens", shape.vocabulary, shape.hidden)
    learnt = Linear("transformer.wpe", shape.positions or 0, shape.hidden)
    return head, Linear("transformer.wte", shape.vocabulary, shape.hidden), learnt


@functools.cache
def expert_parameters(shape: Shape) -> int:
    """Parameters of all experts and of what routes tokens to them."""
    matrices = (*experts(shape), *routers(shape))
    return sum(matrix.weights + matrix.bias * matrix.outputs * (matrix.experts or 1) for matrix in matrices)


def embedding_parameters(shape: Shape) -> int:
    """Parameters of the embeddings and, where it is another matrix, of the head."""
    if shape.outline:
        twice = shape.vocabulary * shape.hidden if shape.tied else 0
        return sum(matrix.weights for matrix in shape.outline.others) - twice
    matrices = 1 if shape.tied else 2
    learnt = 0 if shape.gated else (shape.positions or 0) * shape.hidden
    return shape.vocabulary * (shape.hidden * matrices + shape.head_bias) + learnt


def qk_norm_widths(shape: Shape) -> int:
    """Widths of the norms of queries and keys of a layer, added up."""
    if not shape.qk_norm:
        return 0
    return shape.attention + shape.kv if shape.qk_norm_whole else 2 * shape.head_dim


def vector_parameters(shape: Shape) -> int:
    """Parameters of the norms and biases of the layers, and of the last norm."""
    if shape.outline:
        matrices = (*modules(shape), *vocabulary_modules(shape))
        others = sum(matrix.weights for matrix in matrices) - (shape.vocabulary * shape.hidden if shape.tied else 0)
        return shape.outline.parameters - others - expert_parameters(shape)
    norm = shape.hidden * (1 + shape.norm_bias)
    norms = shape.norms_per_layer * norm + qk_norm_widths(shape) + (shape.heads if shape.sinks else 0)
    biases = sum(linear.outputs * count for linear, count in linears(shape) if linear.bias)
    return shape.layers * norms + biases + norm


@functools.cache
def other_parameters(shape: Shape) -> int:
    """Parameters outside the layers' linear modules: embeddings, head, norms, biases, experts. They stay in 16 bits."""
    return embedding_parameters(shape) + vector_parameters(shape) + expert_parameters(shape)


@functools.cache
def linear_parameters(shape: Shape) -> int:
    """Parameters of the layers' linear modules, biases left out."""
    return sum(linear.weights * count for linear, count in linears(shape))


def parameters(shape: Shape) -> int:
    """All parameters of the model."""
    return other_parameters(shape) + linear_parameters(shape)


# --- .gguf ----------------------------------------------------------------------------------------------------------

# Value types of GGUF's metadata: struct letter by type number; 8 is a string, 9 an array.
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
TOKENS = "tokenizer.ggml.tokens"


def from_gguf(file: Path) -> Shape:
    """The shape that a .gguf file's header describes; tensor data are not read.

    Raises:
        ModelError: it is no GGUF file, is cut off, or lacks a size.
    """
    return from_config(_gguf_config(file), str(file))


def _gguf_config(file: Path) -> dict[str, Any]:
    try:
        return _as_config(*read_gguf(file))
    except (struct.error, KeyError, UnicodeDecodeError, ValueError) as error:
        raise ModelError(f"{file}: its GGUF header is damaged or cut off ({error!r}); download it again") from None


def read_gguf(file: Path, arrays: str = "") -> tuple[dict[str, Any], set[str]]:
    """Metadata of a .gguf file and the names of its tensors. Of an array, its length; where its key begins with `arrays`, all of it."""
    with file.open("rb") as opened:
        if opened.read(4) != b"GGUF":
            raise ModelError(f"{file}: is no GGUF file (it does not begin with GGUF)")
        with mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data:
            version, tensor_count, key_count = struct.unpack_from("<IQQ", data, 4)
            if version not in (2, 3):
                raise ModelError(f"{file}: is GGUF version {version}; versions 2 and 3 are read, convert it again")
            reader = _Reader(data, 24)
            metadata = dict(reader.entry(arrays) for _ in range(key_count))
            return metadata, set(reader.tensor_names(tensor_count))


class _Reader:
    """A walk through a GGUF header, little-endian."""

    def __init__(self, data: mmap.mmap, at: int):
        self.data = data
        self.at = at

    def scalar(self, letter: str) -> Any:
        (value,) = struct.unpack_from(f"<{letter}", self.data, self.at)
        self.at += struct.calcsize(f"<{letter}")
        return value

    def text(self) -> str:
        length = self.scalar("Q")
        self.at += length
        return self.data[self.at - length : self.at].decode()

    def entry(self, arrays: str) -> tuple[str, Any]:
        key, kind = self.text(), self.scalar("I")
        if kind == ARRAY and arrays and key.startswith(arrays):
            inner, count = self.scalar("I"), self.scalar("Q")
            return key, [self.value(inner) for _ in range(count)]
        return key, self.value(kind)

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.text()
        if kind == ARRAY:
            return self._skip_array(self.scalar("I"), self.scalar("Q"))
        return self.scalar(SCALARS[kind])

    def _skip_array(self, kind: int, count: int) -> int:
        """Pass over an array; vocabularies hold 10^5 strings, hence the bare loop."""
        if kind != STRING:
            self.at += count * struct.calcsize(f"<{SCALARS[kind]}")
            return count
        at, unpack, data = self.at, struct.Struct("<Q").unpack_from, self.data
        for _ in range(count):
            at += 8 + unpack(data, at)[0]
        self.at = at
        return count

    def tensor_names(self, count: int) -> Iterator[str]:
        for _ in range(count):
            yield self.text()
            dimensions = self.scalar("I")
            self.at += 8 * dimensions + 4 + 8  # sizes, type, offset
            if self.at > len(self.data):
                raise ValueError("the list of tensors ends early")


def _as_config(metadata: Mapping[str, Any], tensors: set[str]) -> dict[str, Any]:
    """GGUF's names as those of a config.json. What a family leaves open is read off the tensors' names."""
    kind = metadata["general.architecture"]
    found = {
        "model_type": kind,
        "hidden_size": metadata.get(f"{kind}.embedding_length"),
        "intermediate_size": metadata.get(f"{kind}.feed_forward_length"),
        "num_hidden_layers": metadata.get(f"{kind}.block_count"),
        "num_attention_heads": metadata.get(f"{kind}.attention.head_count"),
        "num_key_value_heads": metadata.get(f"{kind}.attention.head_count_kv"),
        "head_dim": metadata.get(f"{kind}.attention.key_length"),
        "vocab_size": metadata.get(TOKENS, metadata.get(f"{kind}.vocab_size")),
        "num_experts": metadata.get(f"{kind}.expert_count"),
        "tie_word_embeddings": "output.weight" not in tensors,
        "attention_bias": "blk.0.attn_q.bias" in tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in tensors,
    }
    return {key: value for key, value in found.items() if value is not None}
