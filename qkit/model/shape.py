"""The shape of a decoder model, from its config.json or the header of its .gguf file: sizes only, and no torch."""

from __future__ import annotations

import functools
import re
from collections import Counter
from dataclasses import dataclass, replace

NEEDED = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
LAYER = re.compile(r"^.*?\.\d+\.")  # what comes before a module's name within its layer


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
