"""Bytes with a known layout: the base model as it is quantized, the adapter, its optimizer's state. Exact, from the shapes alone."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from qkit.core.figures import gib, mib
from qkit.model import targets
from qkit.model.shape import (
    LAYER,
    Linear,
    Shape,
    embedding_parameters,
    expert_parameters,
    experts,
    linears,
    vector_parameters,
)
from qkit.model.targets import Names, Target
from qkit.plan.items import MemoryItem
from qkit.recipe.schema import Recipe

BLOCK = 64  # bitsandbytes: weights that share one absmax
NESTED_BLOCK = 256  # double quantization: absmax values that share one absmax of their own
CODE_BYTES = 16 * 4  # per matrix: the 16 values of NF4 or FP4 in fp32
NESTED_CODE_BYTES = 256 * 4  # once: the 256 values of the 8-bit absmax in fp32
OFFSET_BYTES = 4  # per matrix, double quantization: the mean that was taken off the absmax


BASE_BYTES = 2  # whatever is not quantized is loaded in bf16
ADAPTER_BYTES = 4  # the adapter is trained in fp32


# Values that an optimizer keeps per trained parameter: in fp32, or, for matrices of 4,096 values and more, in 8 bit
# with one fp32 absmax for each 256.
MOMENTS = {"adamw": 2, "adam": 2, "ademamix": 3, "lion": 1, "rmsprop": 1, "sgd": 0, "adagrad": 1}
SMALLEST_8BIT = 4096
STATE_BLOCK = 256
STEP_BYTES = 4  # torch's own Adam counts its steps in an fp32 tensor for each matrix


def quantized_bytes(weights: int, double_quant: bool) -> int:
    """Bytes of one 4-bit matrix as bitsandbytes stores it: packed values, absmax, code table."""
    packed = -(-weights // 2)
    blocks = -(-weights // BLOCK)
    if not double_quant:
        return packed + 4 * blocks + CODE_BYTES
    return packed + blocks + 4 * -(-blocks // NESTED_BLOCK) + CODE_BYTES + OFFSET_BYTES


def weight_bytes(recipe: Recipe, shape: Shape) -> int:
    """Bytes of the base model as training holds it: every linear of the layers in 4 bit, the rest in bf16."""
    quantization = recipe.quantization
    return base_weights(shape, quantization.load_in_4bit, quantization.bnb_4bit_use_double_quant).bytes


@functools.lru_cache(maxsize=256)
def base_weights(shape: Shape, four_bit: bool, nested: bool) -> MemoryItem:
    """The base model, by kind of layer."""
    attention = [entry for entry in linears(shape) if entry[0].name.startswith(("self_attn", "attn"))]
    mlp = [entry for entry in linears(shape) if entry not in attention]
    matrices = [_matrices(name, of, four_bit, nested) for name, of in (("attention", attention), ("mlp", mlp)) if of]
    head = "embeddings (tied with the head)" if shape.tied else "embeddings and head"
    plain = [(head, embedding_parameters(shape)), ("norms and biases", vector_parameters(shape))]
    if experts(shape):
        plain.append(("router", expert_parameters(shape) - sum(matrix.weights for matrix in experts(shape))))
    parts = [
        *matrices,
        *(_plain(name, count, shape.exact) for name, count in plain),
        *([_experts(shape, four_bit, nested)] if experts(shape) else []),
        _tables(shape, four_bit and nested),
    ]
    how = (
        "sum of its parts; bitsandbytes quantizes linear modules, and no other tensor"
        if four_bit
        else "sum of its parts"
    )
    return MemoryItem("weights", sum(part.bytes for part in parts), shape.exact, how, tuple(parts))


def _matrices(name: str, of: Sequence[tuple[Linear, int]], four_bit: bool, nested: bool) -> MemoryItem:
    count = sum(linear.weights * layers for linear, layers in of)
    if not four_bit:
        return _plain(name, count, True)
    size = sum(quantized_bytes(linear.weights, nested) * layers for linear, layers in of)
    absmax = f"1 byte of absmax and 1/{NESTED_BLOCK} of 4" if nested else "4 bytes of absmax"
    modules = sum(layers for _, layers in of)
    table = CODE_BYTES + (OFFSET_BYTES if nested else 0)
    how = f"{count:,} weights x (1/2 byte + {absmax} for each {BLOCK}) + {modules:,} matrices x {table} bytes of tables"
    return MemoryItem(name, size, True, how)


def _experts(shape: Shape, four_bit: bool, nested: bool) -> MemoryItem:
    """Held in parameters of three dimensions, they stay in 16 bits whatever the recipe says."""
    count = sum(matrix.weights for matrix in experts(shape))
    made = _plain("experts", count, shape.exact)
    if not four_bit:
        return made
    return replace(
        made,
        formula=f"{made.formula}; bitsandbytes has no 4 bit for them, which would take {mib(in_four_bit(shape, nested))}",
    )


def in_four_bit(shape: Shape, nested: bool) -> int:
    """Bytes that the experts would take if they were quantized as linear modules are."""
    return sum(quantized_bytes(matrix.weights, nested) for matrix in experts(shape))


def remarks(recipe: Recipe, shape: Shape) -> tuple[str, ...]:
    """What there is to say of a mixture of experts: what is not quantized, and what that costs, and what is not trained.

    Raises:
        ModelError: a name in `target_modules` or `target_parameters` matches nothing.
    """
    said = list(targets.remarks(recipe.lora, shape))
    if shape.eager and recipe.model.attn_implementation == "sdpa":
        said.append(
            f"Attention is computed eagerly, score by score: transformers has no sdpa for {shape.architecture}."
        )
    if experts(shape) and recipe.quantization.load_in_4bit:
        count = sum(matrix.weights for matrix in experts(shape))
        held, less = count * BASE_BYTES, in_four_bit(shape, recipe.quantization.bnb_4bit_use_double_quant)
        said.insert(
            0,
            f"The experts stay in 16 bits: bitsandbytes quantizes linear modules, and these are parameters of three dimensions. They take "
            f"{held:,} bytes ({gib(held)}); in 4 bit they would take {less:,}.",
        )
    return tuple(said)


def _plain(name: str, count: int, exact: bool) -> MemoryItem:
    return MemoryItem(name, count * BASE_BYTES, exact, f"{count:,} parameters x {BASE_BYTES} bytes")


def _tables(shape: Shape, nested: bool) -> MemoryItem:
    """Rotary frequencies are kept twice in fp32, one set for each kind of attention that has its own."""
    rotary = shape.rotary_sets * 2 * (shape.head_dim // 2) * 4
    table = NESTED_CODE_BYTES if nested else 0
    how = f"rotary frequencies {rotary} bytes" + (f" + one table of 256 absmax values {table} bytes" if nested else "")
    return MemoryItem("tables", rotary + table, shape.exact, how)


def adapted(recipe: Recipe, shape: Shape) -> tuple[Target, ...]:
    """What gets an adapter, one entry per weight of the model.

    Raises:
        ModelError: a name in `target_modules` or `target_parameters` matches nothing.
    """
    return targets.planned(recipe.lora, shape)


def adapted_inputs(recipe: Recipe, shape: Shape) -> tuple[int, int]:
    """Widths of the inputs of the modules with an adapter, added up: each its own, and those that are one tensor once.

    Query, key and value read one tensor, gate and up another; the projection out of attention reads what attention keeps anyway.
    """
    return _adapted_inputs(targets.names(recipe.lora), shape)


@functools.lru_cache(maxsize=64)
def _adapted_inputs(named: Names, shape: Shape) -> tuple[int, int]:
    modules = _layers_modules(targets.planned_for(named, shape))
    read = {(m.name.rpartition(".")[0], m.inputs) for m in modules if not m.name.endswith((".o_proj", "attn.c_proj"))}
    return sum(module.inputs for module in modules), sum(width for _, width in read)


class Folds(NamedTuple):
    """Experts with an adapter are computed with as one matrix each, the delta added: bytes of them in a layer, how many layers have any, and
    bytes of the largest parameter."""

    layer_bytes: int
    layers: int
    largest_bytes: int


def folds(recipe: Recipe, shape: Shape) -> Folds:
    """What putting the adapters into the experts makes, in 16 bits."""
    return _folds(targets.names(recipe.lora), shape)


@functools.lru_cache(maxsize=64)
def _folds(named: Names, shape: Shape) -> Folds:
    by_layer: dict[str, int] = {}
    largest = 0
    for target in targets.planned_for(named, shape):
        if target.parameter and target.matrix.experts:
            size, layer = target.matrix.weights * BASE_BYTES, target.matrix.name.rpartition(".")[0]
            by_layer[layer] = by_layer.get(layer, 0) + size
            largest = max(largest, size)
    return Folds(max(by_layer.values(), default=0), len(by_layer), largest)


def _layers_modules(of: Sequence[Target]) -> list[Linear]:
    return [target.matrix for target in of if not target.parameter and LAYER.match(target.matrix.name)]


def adapter_sizes(recipe: Recipe, shape: Shape) -> tuple[int, ...]:
    """Trained parameters, matrix by matrix: A is r x inputs, B is outputs x r; then the rows of added tokens."""
    return _adapter_sizes(targets.names(recipe.lora), recipe.lora.r, shape) + learnt_rows(recipe, shape)


def learnt_rows(recipe: Recipe, shape: Shape) -> tuple[int, ...]:
    """Parameters of the added tokens' rows, which are learnt as they are: of the embedding, and of a head that is another matrix."""
    rows = len(set(recipe.model.add_tokens))
    return (rows * shape.hidden,) * (1 if shape.tied else 2) if rows else ()


@functools.lru_cache(maxsize=256)
def _adapter_sizes(named: Names, rank: int, shape: Shape) -> tuple[int, ...]:
    return tuple(size for target in targets.planned_for(named, shape) for size in target.sizes(rank))


@functools.lru_cache(maxsize=256)
def optimizer_bytes(optim: str, sizes: tuple[int, ...]) -> int:
    """State that an optimizer of this name keeps for matrices of these sizes (an unknown one is taken for Adam)."""
    name = optim.removeprefix("paged_")
    moments = MOMENTS.get(name.partition("_")[0], 2)
    if not name.endswith("8bit"):
        steps = STEP_BYTES * len(sizes) if name.startswith("adamw_torch") else 0
        return moments * 4 * sum(sizes) + steps
    return sum(moments * (n + 4 * -(-n // STATE_BLOCK) if n >= SMALLEST_8BIT else 4 * n) for n in sizes)


def optimizer_item(how: Recipe, shape: Shape) -> MemoryItem:
    """The optimizer's state, and no less than any smaller rank has: at 4,096 values a matrix goes over from fp32 to 8 bit."""
    optim, named, sizes = how.train.optim, targets.names(how.lora), adapter_sizes(how, shape)
    exactly = optimizer_bytes(optim, sizes)
    earlier = [rank for rank in _last_in_fp32(how, shape) if rank < how.lora.r]
    rows = learnt_rows(how, shape)
    size = max([exactly, *(optimizer_bytes(optim, _adapter_sizes(named, rank, shape) + rows) for rank in earlier)])
    exact = shape.exact and "adamw" in optim and size == exactly
    return MemoryItem("optimizer", size, exact, _optimizer_how(optim, sum(sizes)))


def _optimizer_how(optim: str, trained: int) -> str:
    name = optim.removeprefix("paged_")
    moments = MOMENTS.get(name.partition("_")[0], 2)
    width = f"1 byte + 4 for each {STATE_BLOCK}" if name.endswith("8bit") else "4 bytes"
    paged = "; in managed memory, which may leave the card" if optim.startswith("paged_") else ""
    return f"{optim}: {trained:,} parameters x {moments} moments x {width}{paged}"


def _last_in_fp32(how: Recipe, shape: Shape) -> frozenset[int]:
    """For each width, the highest rank at which its matrices are too small for 8 bit; 0 where there is none, or no need."""
    if not how.train.optim.endswith("8bit"):
        return frozenset({0})
    return _last_ranks(targets.names(how.lora), shape)


@functools.lru_cache(maxsize=64)
def _last_ranks(named: Names, shape: Shape) -> frozenset[int]:
    widths = {size for target in targets.planned_for(named, shape) for size in target.sizes(1)}
    return frozenset((SMALLEST_8BIT - 1) // width for width in widths)
