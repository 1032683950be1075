"""The shape of a decoder model: its sizes, read from config.json or the header of a .gguf file, without torch."""

from __future__ import annotations

import functools
import re
from collections import Counter
from dataclasses import dataclass, replace

NEEDED = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
LAYER = re.compile(r"^.*?\.\d+\.")  # the part of a full module name up to and including the layer number


@dataclass(frozen=True)
class Outline:
    """What a model built without weights contains: its matrices by full name, and its total number of parameters.

    `sizes`: sizes that its config.json omits or names differently, by the names that the plan uses.
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
    """Sizes of a decoder. `exact`: its family is known, so the parameter count is exact."""

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
    gated: bool = True  # the MLP has a gate; without one, names and trained positions are GPT-2's
    norms_per_layer: int = 2
    norm_offset: bool = False  # norms multiply by 1 + weight, recomputed in fp32 at each use
    qk_norm: bool = False
    qk_norm_whole: bool = False  # normalizes over all heads together, not over each head
    sinks: bool = False  # attention sinks: a trained score for each head that belongs to no token
    eager: bool = False  # transformers supports only eager attention for it
    softcap: bool = False  # attention scores are bounded: one more tensor of scores where scores are stored
    final_softcap: bool = False  # logits are bounded
    rotary_sets: int = 1  # number of sets of rotary frequencies, one for each kind of attention
    window: int | None = None  # tokens that sliding-window layers attend to
    windowed: int = 0  # number of sliding-window layers
    experts: int = 0
    expert_bias: bool = False  # on the experts' matrices and the router
    expert_transposed: bool = False  # stored as [in, out]
    expert_names: tuple[
        tuple[str, str], ...
    ] = ()  # PEFT's names for the experts and the router -> the parameters' names
    router: str = "gate"  # name of the module that routes tokens to experts
    active_experts: int = 0
    expert_width: int = 0
    shared_width: int = 0  # width of the expert that every token passes through
    sparse: tuple[int, ...] = ()  # layers that have experts instead of the gated MLP
    positions: int | None = None  # the longest sequence that the model supports
    outline: Outline | None = None  # for unknown families: the model that transformers builds from config.json
    exact: bool = True

    def __hash__(self) -> int:
        """Shapes are cache keys; a few sizes distinguish them well enough."""
        return hash((self.architecture, self.layers, self.hidden, self.intermediate, self.vocabulary))

    @property
    def attention(self) -> int:
        """Width of the queries of all heads together."""
        return self.heads * self.head_dim

    @property
    def kv(self) -> int:
        """Width of the keys of all heads together."""
        return self.kv_heads * self.head_dim

    @property
    def dense(self) -> int:
        """Number of layers that have an MLP instead of experts."""
        return self.layers - len(self.sparse)


@dataclass(frozen=True)
class Linear:
    """A matrix product of a layer. `experts`: number of matrices of these sizes stored in one parameter; 0: an ordinary linear module."""

    name: str
    inputs: int
    outputs: int
    bias: bool = False
    experts: int = 0

    @property
    def weights(self) -> int:
        return self.inputs * self.outputs * (self.experts or 1)


@dataclass(frozen=True)
class Family:
    """What config.json omits because transformers' code for the model type defines it."""

    qkv_bias: bool | None = None  # None: `attention_bias` decides, for the output projection as well
    mlp_bias: bool = False  # whether config.json's `mlp_bias` is read
    norm_bias: bool = False
    fused: bool = False
    gated: bool = True
    norms_per_layer: int = 2
    norm_offset: bool = False
    qk_norm: bool = False
    qk_norm_whole: bool = False
    attention_bias: bool = False  # default of `attention_bias`
    sinks: bool = False
    tied: bool = False  # default of `tie_word_embeddings`
    head_dim: int | None = None  # default of `head_dim`; None: hidden / heads
    experts: bool = False
    active_experts: int = 2  # default of `num_experts_per_tok`
    expert_bias: bool = False  # and the experts' matrices are stored as [in, out]
    expert_names: tuple[tuple[str, str], ...] = ()
    router: str = "gate"
    softcaps: bool = False  # default if config.json does not mention them
    rotary_sets: int = 1


# --- modules and parameters --------------------------------------------------------------------------------------------------


@functools.cache
def layer_linears(shape: Shape, sparse: bool = False) -> tuple[Linear, ...]:
    """The linear modules of one layer, by transformers' names. All of them are quantized; the head is not.

    `sparse`: the layer has experts. Experts are three-dimensional tensors, not linear modules, and are not included.
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
    """Every linear module of the layers with the number of layers that have it."""
    if shape.outline:
        alike = Counter(replace(linear, name=LAYER.sub("", linear.name)) for linear in shape.outline.linears)
        return tuple(alike.items())
    dense = tuple((linear, shape.dense) for linear in layer_linears(shape) if shape.dense)
    if not shape.sparse:
        return dense
    return dense + tuple((linear, len(shape.sparse)) for linear in layer_linears(shape, sparse=True))


def layer_name(shape: Shape, layer: int) -> str:
    """transformers' name of a layer."""
    return f"model.layers.{layer}" if shape.gated else f"transformer.h.{layer}"


@functools.cache
def modules(shape: Shape) -> tuple[Linear, ...]:
    """Every linear module of the layers, by full name."""
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
    """Every parameter that holds the experts of a layer, by full name: one for gate and up, one for down."""
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
    """The router weight of each layer that has experts, by full name."""
    if shape.outline:
        return shape.outline.routers
    return tuple(
        Linear(f"{layer_name(shape, layer)}.mlp.{shape.router}.weight", shape.hidden, shape.experts, shape.expert_bias)
        for layer in shape.sparse
    )


@functools.cache
def vocabulary_modules(shape: Shape) -> tuple[Linear, ...]:
    """The embeddings and the head, which `all-linear` does not include."""
    if shape.outline:
        return shape.outline.others
    head = Linear("lm_head", shape.hidden, shape.vocabulary, shape.head_bias)
    if shape.gated:
        return head, Linear("model.embed_tokens", shape.vocabulary, shape.hidden)
    positions = Linear("transformer.wpe", shape.positions or 0, shape.hidden)
    return head, Linear("transformer.wte", shape.vocabulary, shape.hidden), positions


@functools.cache
def expert_parameters(shape: Shape) -> int:
    """Number of parameters of all experts and routers."""
    matrices = (*experts(shape), *routers(shape))
    return sum(matrix.weights + matrix.bias * matrix.outputs * (matrix.experts or 1) for matrix in matrices)


def embedding_parameters(shape: Shape) -> int:
    """Number of parameters of the embeddings and, unless it is tied, the head."""
    if shape.outline:
        counted_twice = shape.vocabulary * shape.hidden if shape.tied else 0
        return sum(matrix.weights for matrix in shape.outline.others) - counted_twice
    matrices = 1 if shape.tied else 2
    positions = 0 if shape.gated else (shape.positions or 0) * shape.hidden
    return shape.vocabulary * (shape.hidden * matrices + shape.head_bias) + positions


def qk_norm_widths(shape: Shape) -> int:
    """Summed widths of the query and key norms of a layer."""
    if not shape.qk_norm:
        return 0
    return shape.attention + shape.kv if shape.qk_norm_whole else 2 * shape.head_dim


def vector_parameters(shape: Shape) -> int:
    """Number of parameters of the layers' norms and biases, and of the final norm."""
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
    """Number of parameters outside the layers' linear modules: embeddings, head, norms, biases, experts. They stay in 16 bits."""
    return embedding_parameters(shape) + vector_parameters(shape) + expert_parameters(shape)


@functools.cache
def linear_parameters(shape: Shape) -> int:
    """Number of parameters of the layers' linear modules, without biases."""
    return sum(linear.weights * count for linear, count in linears(shape))


def parameters(shape: Shape) -> int:
    """Total number of parameters."""
    return other_parameters(shape) + linear_parameters(shape)
