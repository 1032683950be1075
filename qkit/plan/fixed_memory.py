"""Memory with a known layout: the quantized base model, the adapter, its optimizer state. Exact, from the shapes alone."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from qkit.core.figures import gib, mib
from qkit.model.adapters import targets
from qkit.model.adapters.targets import Names, Target
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
from qkit.plan._optimizer_state import SMALLEST_8BIT, Kinds, Tensor, formula, state_bytes_of
from qkit.plan.items import MemoryItem
from qkit.recipe.optimizers import OPTIMIZERS, UNKNOWN
from qkit.recipe.schema import Recipe

BLOCK = 64  # bitsandbytes: weights that share one absmax
NESTED_BLOCK = 256  # double quantization: absmax values that share one absmax
CODE_BYTES = 16 * 4  # per matrix: the 16 values of NF4 or FP4 in fp32
NESTED_CODE_BYTES = 256 * 4  # once per model: the 256 values of the 8-bit absmax in fp32
OFFSET_BYTES = 4  # per matrix, with double quantization: the mean that is subtracted from the absmax

BASE_BYTES = 2  # tensors that are not quantized are loaded in bf16
ADAPTER_BYTES = 4  # the adapter is trained in fp32


def quantized_bytes(weights: int, double_quant: bool) -> int:
    """Bytes of one 4-bit matrix as bitsandbytes stores it: packed values, absmax, code table."""
    packed = -(-weights // 2)
    blocks = -(-weights // BLOCK)
    if not double_quant:
        return packed + 4 * blocks + CODE_BYTES
    return packed + blocks + 4 * -(-blocks // NESTED_BLOCK) + CODE_BYTES + OFFSET_BYTES


def weight_bytes(recipe: Recipe, shape: Shape) -> int:
    """Bytes of the base model in training: the linear modules of the layers in 4 bits if the recipe says so, the rest in bf16."""
    quantization = recipe.quantization
    return base_weights(shape, quantization.load_in_4bit, quantization.bnb_4bit_use_double_quant).bytes


@functools.lru_cache(maxsize=256)
def base_weights(shape: Shape, four_bit: bool, nested: bool) -> MemoryItem:
    """The base model, by kind of layer. `nested`: double quantization."""
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
    formula = "sum of its parts; bitsandbytes quantizes linear modules only" if four_bit else "sum of its parts"
    return MemoryItem("weights", sum(part.bytes for part in parts), shape.exact, formula, tuple(parts))


def _matrices(name: str, of: Sequence[tuple[Linear, int]], four_bit: bool, nested: bool) -> MemoryItem:
    count = sum(linear.weights * layers for linear, layers in of)
    if not four_bit:
        return _plain(name, count, True)
    size = sum(quantized_bytes(linear.weights, nested) * layers for linear, layers in of)
    absmax = f"1 byte of absmax and 1/{NESTED_BLOCK} of 4" if nested else "4 bytes of absmax"
    modules = sum(layers for _, layers in of)
    table = CODE_BYTES + (OFFSET_BYTES if nested else 0)
    formula = (
        f"{count:,} weights x (1/2 byte + {absmax} for each {BLOCK}) + {modules:,} matrices x {table} bytes of tables"
    )
    return MemoryItem(name, size, True, formula)


def _experts(shape: Shape, four_bit: bool, nested: bool) -> MemoryItem:
    """Experts are parameters of three dimensions, which stay in 16 bits even if the recipe asks for 4."""
    count = sum(matrix.weights for matrix in experts(shape))
    item = _plain("experts", count, shape.exact)
    if not four_bit:
        return item
    return replace(
        item,
        formula=f"{item.formula}; bitsandbytes cannot quantize them; in 4 bits they would take {mib(in_four_bit(shape, nested))}",
    )


def in_four_bit(shape: Shape, nested: bool) -> int:
    """Bytes of the experts if bitsandbytes could quantize them."""
    return sum(quantized_bytes(matrix.weights, nested) for matrix in experts(shape))


def remarks(recipe: Recipe, shape: Shape) -> tuple[str, ...]:
    """Warnings about the model: what the adapter leaves out, attention that is slow, and experts that are not quantized.

    Raises:
        ModelError: a name in `target_modules` or `target_parameters` matches nothing.
    """
    texts = list(targets.remarks(recipe.lora, shape)) if recipe.method == "lora" else []
    if shape.eager and recipe.model.attn_implementation == "sdpa":
        texts.append(
            f"Attention is computed eagerly, with all scores in memory: transformers has no sdpa for {shape.architecture}."
        )
    if experts(shape) and recipe.quantization.load_in_4bit:
        count = sum(matrix.weights for matrix in experts(shape))
        held, less = count * BASE_BYTES, in_four_bit(shape, recipe.quantization.bnb_4bit_use_double_quant)
        texts.insert(
            0,
            f"The experts stay in 16 bits: bitsandbytes quantizes linear modules only, and these are parameters of three dimensions. They take "
            f"{held:,} bytes ({gib(held)}); in 4 bits they would take {less:,}.",
        )
    return tuple(texts)


def _plain(name: str, count: int, exact: bool) -> MemoryItem:
    return MemoryItem(name, count * BASE_BYTES, exact, f"{count:,} parameters x {BASE_BYTES} bytes")


def _tables(shape: Shape, nested: bool) -> MemoryItem:
    """Rotary frequencies, twice in fp32 for each kind of attention that has its own, and the table of double quantization."""
    rotary = shape.rotary_sets * 2 * (shape.head_dim // 2) * 4
    table = NESTED_CODE_BYTES if nested else 0
    formula = f"rotary frequencies {rotary} bytes" + (
        f" + one table of 256 absmax values {table} bytes" if nested else ""
    )
    return MemoryItem("tables", rotary + table, shape.exact, formula)


def adapted(recipe: Recipe, shape: Shape) -> tuple[Target, ...]:
    """The weights of the model that get an adapter.

    Raises:
        ModelError: a name in `target_modules` or `target_parameters` matches nothing.
    """
    return targets.planned(recipe.lora, shape)


def adapted_counts(recipe: Recipe, shape: Shape) -> tuple[int, int]:
    """How many modules get an adapter, and how many parameters that are no modules: experts and routers."""
    return _adapted_counts(targets.names(recipe.lora), shape)


@functools.lru_cache(maxsize=64)
def _adapted_counts(named: Names, shape: Shape) -> tuple[int, int]:
    of = targets.planned_for(named, shape)
    return sum(not target.parameter for target in of), sum(target.parameter for target in of)


def adapted_inputs(recipe: Recipe, shape: Shape) -> tuple[int, int]:
    """Summed input widths of the modules with an adapter: of each module, and with an input that several modules read counted once.

    Query, key and value read one tensor; gate and up another. The output projection reads a tensor that attention keeps anyway.
    """
    return _adapted_inputs(targets.names(recipe.lora), shape)


@functools.lru_cache(maxsize=64)
def _adapted_inputs(named: Names, shape: Shape) -> tuple[int, int]:
    modules = _layers_modules(targets.planned_for(named, shape))
    read = {(m.name.rpartition(".")[0], m.inputs) for m in modules if not m.name.endswith((".o_proj", "attn.c_proj"))}
    return sum(module.inputs for module in modules), sum(width for _, width in read)


class Folds(NamedTuple):
    """Experts with an adapter are computed with the delta added to the weight. Bytes of those in one layer, the number of layers that have
    any, and bytes of the largest parameter."""

    layer_bytes: int
    layers: int
    largest_bytes: int


def folds(recipe: Recipe, shape: Shape) -> Folds:
    """The experts with their adapters added, in 16 bits."""
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


def adapter_count(recipe: Recipe, shape: Shape) -> int:
    """Trained parameters of an adapter, with the rows of added tokens."""
    kinds = _kinds(targets.names(recipe.lora), recipe.lora.r, shape)
    return sum(times * tensor.count for tensor, times in kinds) + sum(row.count for row in learnt_rows(recipe, shape))


def learnt_rows(recipe: Recipe, shape: Shape) -> tuple[Tensor, ...]:
    """The rows of added tokens, which are trained in full: in the embedding, and in the head if it is not tied."""
    rows = len(set(recipe.model.add_tokens))
    return (Tensor((rows, shape.hidden)),) * (1 if shape.tied else 2) if rows else ()


@functools.lru_cache(maxsize=256)
def _kinds(named: Names, rank: int, shape: Shape) -> Kinds:
    """Each kind of tensor of an adapter, and how many there are."""
    counts: Counter[Tensor] = Counter()
    for target, times in _target_kinds(named, shape):
        for factor in target.factors(rank):
            counts[Tensor(factor)] += times
    return tuple(counts.items())


@functools.lru_cache(maxsize=64)
def _target_kinds(named: Names, shape: Shape) -> tuple[tuple[Target, int], ...]:
    """One of the targets whose factors have the same shapes, and how many of them there are."""
    alike: dict[tuple[tuple[int, int], ...], list[Target]] = {}
    for target in targets.planned_for(named, shape):
        alike.setdefault(target.factors(1), []).append(target)
    return tuple((same[0], len(same)) for same in alike.values())


def optimizer_item(recipe: Recipe, shape: Shape) -> MemoryItem:
    """The optimizer state. It is not below that of any smaller rank, although a matrix of 4,096 values switches from fp32 to 8 bits."""
    train, named = recipe.train, targets.names(recipe.lora)
    rows = learnt_rows(recipe, shape)

    def computed(rank: int) -> int:
        return state_bytes_of(train, (*_kinds(named, rank, shape), *((row, 1) for row in rows)))

    size = max(computed(rank) for rank in (recipe.lora.r, *_last_in_fp32(recipe, shape)) if rank <= recipe.lora.r)
    exact = shape.exact and train.optim in OPTIMIZERS and size == computed(recipe.lora.r)
    return MemoryItem("optimizer", size, exact, formula(train, adapter_count(recipe, shape)))


def _last_in_fp32(recipe: Recipe, shape: Shape) -> frozenset[int]:
    """For each width, the highest rank at which its matrices are too small for 8 bits. Only {0} if the optimizer never uses 8."""
    if OPTIMIZERS.get(recipe.train.optim, UNKNOWN).layout in ("fp32", "factored"):
        return frozenset({0})
    return _last_ranks(targets.names(recipe.lora), shape)


@functools.lru_cache(maxsize=64)
def _last_ranks(named: Names, shape: Shape) -> frozenset[int]:
    widths = {size for target in targets.planned_for(named, shape) for size in target.sizes(1)}
    return frozenset((SMALLEST_8BIT - 1) // width for width in widths)
