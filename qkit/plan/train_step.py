"""The tensors that come and go in a training step: activations for the backward pass, logits, working space.

The widths of the tensors that autograd saves in a layer were read off for each family; bytes are widths times tokens. A step has several
moments that can be its peak: one function for each computes its bytes, and `moments` lists them by name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from qkit.core.device import Device
from qkit.model.shape import Shape, qk_norm_widths
from qkit.plan._overhead import Overhead, fixed_item, heap_items, overhead_of, segment_item
from qkit.plan.fixed_memory import (
    ADAPTER_BYTES,
    BASE_BYTES,
    Folds,
    adapted_counts,
    adapted_inputs,
    adapter_count,
    folds,
)
from qkit.plan.items import MemoryItem
from qkit.plugins.task import open_task
from qkit.recipe.schema import Recipe

AUTOCAST_BYTES = 2  # autocast keeps a bf16 copy of the adapter while a product may need it
# The head on labelled positions: log-probabilities, their gradient, and the gradient of the logits, all in fp32.
LABELLED_LOGIT_BYTES = 12
BOUNDED_LOGIT_BYTES = 4  # the tanh of logits that are soft-capped
EXPERT_GRADIENTS = 2
LABELLED_STEP = 32  # labelled positions are padded to a multiple of this
# TRL's fused head on GPUs: one bf16 tile, of at most this many tokens and always this wide, whatever the vocabulary.
TILE_TOKENS = 4096
TILE_VOCABULARY = 32768
# TRL's activation offloading: the newest tensors stay on the card while they are copied to the host.
OFFLOAD_STASH = 5


@dataclass(frozen=True)
class TrainStep:
    """The numbers that the memory of a training step depends on. `labelled`: tokens with loss; None: unknown, so all tokens count."""

    shape: Shape
    outputs: int  # of the head for one position
    tokens: int  # of a micro-batch, including padding
    length: int  # of its longest row or pack, in tokens
    labelled: int | None
    trained: int  # parameters of the adapter
    modules: int  # with an adapter
    parameters: int  # with an adapter that are not modules: experts and routers
    own_inputs: int  # sum of the widths of the inputs of modules with an adapter
    shared_inputs: int  # the same, but an input that several modules read counts once
    rank: int
    folds: Folds
    dropout: bool
    checkpointing: bool
    offloading: bool
    eager: bool
    packed: bool
    four_bit: bool
    learns_rows: bool  # whether rows of embedding and head are trained, for added tokens
    accumulated: bool  # whether gradients of earlier micro-batches exist
    labelled_head: bool
    overhead: Overhead

    @property
    def tokens_with_loss(self) -> int:
        """Tokens with loss; all tokens if their number is unknown."""
        return self.tokens if self.labelled is None else min(self.labelled, self.tokens)


def micro_tokens(recipe: Recipe) -> int:
    """Tokens of the largest micro-batch. A batch is divided between rows, never within one."""
    parts, row = recipe.micro_batches, min(recipe.data.max_length, recipe.data.batch_tokens)
    by_tokens = -(-(recipe.data.batch_tokens + (parts - 1) * row) // parts)
    return by_tokens if recipe.data.batch_rows is None else min(by_tokens, row * -(-recipe.data.batch_rows // parts))


def is_eager(recipe: Recipe, shape: Shape) -> bool:
    """Whether attention keeps a score for each pair of tokens: the recipe says so, or transformers has nothing else for this model."""
    attention = recipe.model.attn_implementation
    return attention == "eager" or (attention == "sdpa" and shape.eager)


def step_of(recipe: Recipe, shape: Shape, device: Device, labelled: int | None) -> TrainStep:
    """The training step of a recipe. `labelled`: tokens with loss in a micro-batch; None: unknown."""
    own, shared = adapted_inputs(recipe, shape)
    (modules, parameters), overhead, eager = adapted_counts(recipe, shape), overhead_of(device), is_eager(recipe, shape)
    tokens = recipe.data.batch_tokens if recipe.data.packing else micro_tokens(recipe)
    return TrainStep(
        shape=shape,
        outputs=open_task(recipe.task).head_outputs(recipe, shape.vocabulary),
        tokens=tokens,
        length=recipe.data.batch_tokens if recipe.data.packing else min(recipe.data.max_length, tokens),
        labelled=labelled,
        trained=adapter_count(recipe, shape),
        modules=modules,
        parameters=parameters,
        own_inputs=own,
        shared_inputs=shared,
        rank=recipe.lora.r,
        folds=folds(recipe, shape),
        dropout=recipe.lora.lora_dropout > 0,
        checkpointing=bool(recipe.train.gradient_checkpointing),  # "auto", if not decided yet, counts as on
        offloading=recipe.train.activation_offloading and device.offloads,
        eager=eager,
        packed=recipe.data.packing and not recipe.model.attn_implementation.startswith("flash"),
        four_bit=recipe.quantization.load_in_4bit,
        learns_rows=bool(recipe.model.add_tokens),
        accumulated=recipe.train.gradient_accumulation_steps * recipe.micro_batches > 1,
        labelled_head=device.uses_labelled_head or recipe.needs_losses,
        overhead=overhead,
    )


def kept_terms(step: TrainStep) -> dict[str, int]:
    """Bytes per token that autograd keeps of an average layer, by operation, for frozen weights and bf16 under autocast.

    A product with a frozen matrix does not keep its input. A norm keeps its input in fp32 and a scale; the adapter of the next product keeps
    the norm's output. Attention keeps queries, keys, values, its output and a log-sum per head; the gated MLP keeps four tensors of its width.
    """
    shape, casts = step.shape, step.overhead.casts_inputs
    terms = {
        "norms": shape.norms_per_layer * (4 * shape.hidden + 4),
        "attention": _attention_bytes(step),
        "mlp": 6 * shape.intermediate * shape.dense // shape.layers + _expert_bytes(shape),
        "adapters' inputs": 2 * (step.own_inputs if casts else step.shared_inputs) // shape.layers,
        "adapters": 2 * step.rank * step.modules // shape.layers,
    }
    if shape.qk_norm:
        terms["query and key norms"] = 4 * (shape.attention + shape.kv) + 4 * (shape.heads + shape.kv_heads)
    if step.dropout:  # an fp32 input after dropout, or a mask and a bf16 one
        terms["dropout"] = (4 if casts else 3) * step.own_inputs // shape.layers
    return terms


def _attention_bytes(step: TrainStep) -> int:
    shape, masked = step.shape, step.packed and not step.eager
    if step.eager:  # keys and values are repeated for each head; scores are fp32, probabilities bf16
        kept = 6 if step.overhead.casts_inputs else 8  # the product of the two, unless the adapter keeps its own copy
        return kept * shape.attention + shape.heads * step.length * (8 if shape.softcap else 6)
    keys = 4 * (shape.attention if masked else shape.kv)  # with a mask, they are repeated for each head
    mask = 2 * step.length if masked else 0  # each layer keeps the mask in bf16
    whole = 2 * (shape.attention + shape.kv) if shape.fused else 0  # the values are a view of the fused product
    return 4 * shape.attention + keys + 4 * shape.heads + mask + whole


def _expert_bytes(shape: Shape) -> int:
    """For each active expert: gate, its activation, up, and the output before it is weighted; and the router's scores."""
    if not shape.sparse:
        return 0
    each = shape.active_experts * (6 * shape.expert_width + 4 * shape.hidden) + 6 * shape.shared_width
    return (each + 8 * shape.experts) * len(shape.sparse) // shape.layers


def layer_bytes_per_token(recipe: Recipe, shape: Shape, device: Device) -> int:
    """Bytes that autograd keeps per layer and token."""
    return sum(kept_terms(step_of(recipe, shape, device, None)).values())


class Part(NamedTuple):
    """`times` x `tokens` x `width` bytes. A tuple and not a MemoryItem, so that searches over thousands of recipes format no text."""

    name: str
    times: int
    tokens: int
    width: int

    @property
    def bytes(self) -> int:
        return self.times * self.tokens * self.width

    def item(self) -> MemoryItem:
        """The line of the plan."""
        return MemoryItem(self.name, self.bytes, False, f"{self.times} x {self.tokens:,} tokens x {self.width:,} bytes")


class Moment(NamedTuple):
    """Bytes that exist at one moment of a step, besides weights, adapter and optimizer state."""

    gradients: int = 0
    activations: tuple[Part, ...] = ()
    logits: int = 0
    copies: int = 0  # bf16 copies of the adapter, made by autocast
    dequantized: int = 0  # one matrix of the base model in bf16
    update: int = 0  # temporaries of the optimizer
    matrices: int = 0  # embedding or head with the learnt rows inserted, and the gradient of the whole matrix

    @property
    def activation_bytes(self) -> int:
        return sum(part.bytes for part in self.activations)

    @property
    def bytes(self) -> int:
        return (
            self.gradients
            + self.activation_bytes
            + self.logits
            + self.copies
            + self.dequantized
            + self.update
            + self.matrices
        )


def _layers(step: TrainStep, count: int) -> tuple[Part, ...]:
    """Activations that the backward pass of `count` layers needs."""
    parts = [Part(name, count, step.tokens, width) for name, width in kept_terms(step).items()]
    if step.shape.norm_offset:
        parts.append(Part("1 + weight of norms", count, 1, norm_offset_bytes(step.shape)))
    if step.folds.layers:
        parts.append(Part("experts with their adapters", min(count, step.folds.layers), 1, step.folds.layer_bytes))
    return tuple(parts)


def _after_forward(step: TrainStep) -> tuple[Part, ...]:
    """Activations kept after the forward pass. The first norm keeps nothing, since its input needs no gradient; the last norm does."""
    shape, tokens = step.shape, step.tokens
    ends = [Part("rotary tables", shape.rotary_sets, step.length, 4 * shape.head_dim)]
    if shape.norm_offset:
        ends.append(Part("1 + weight of the last norm", 1, 1, 4 * shape.hidden))
    if not step.checkpointing:
        return (*_layers(step, shape.layers), *ends)
    count = min(shape.layers, OFFLOAD_STASH) if step.offloading else shape.layers
    inputs = Part("layers' inputs", count, tokens, BASE_BYTES * shape.hidden)
    return inputs, Part("last norm", 1, tokens, 4 * shape.hidden + 4), *ends


def norm_offset_bytes(shape: Shape) -> int:
    """Bytes of 1 + weight in fp32, for all norms of a layer in families whose norms multiply by that; else 0."""
    widths = shape.norms_per_layer * shape.hidden + qk_norm_widths(shape)
    return 4 * widths if shape.norm_offset else 0


def _layer_backward(step: TrainStep) -> Part:
    """Temporaries of the backward pass of one layer, at most, besides saved tensors: widths read off its tensors."""
    shape = step.shape
    width = max(shape.intermediate if shape.dense else 0, shape.active_experts * shape.expert_width)
    if step.overhead.casts_inputs:
        return Part("backward pass of a layer", 1, step.tokens, 6 * width + (14 if shape.fused else 12) * shape.hidden)
    gated = 4 * width + (12 if shape.fused else 2) * shape.hidden
    through_norm = 24 * shape.hidden if shape.norms_per_layer > 2 or not step.checkpointing else 0
    return Part("backward pass of a layer", 1, step.tokens, max(gated, through_norm))


def moments(step: TrainStep, dequantized: int, optim: str) -> dict[str, Moment]:
    """The moments of a step that can be its peak, by name, in the order in which they happen.

    `dequantized`: bytes of the largest quantized matrix in bf16; 0 if nothing is quantized.
    """
    by_name = {
        "the loss": _at_loss(step),
        "the backward pass of the last layer": _at_last_layer(step, dequantized=dequantized),
        "the backward pass of the first layer": _at_first_layer(step, dequantized=dequantized),
        "the optimizer update": _at_update(step, optim=optim),
    }
    if step.learns_rows:
        by_name["the backward pass of the head"] = _at_head_gradient(step)
        by_name["the backward pass of the embedding"] = _at_embedding_gradient(step)
    return by_name


def _at_loss(step: TrainStep) -> Moment:
    """The forward pass is complete, and the head computes logits and their gradient."""
    return Moment(
        gradients=_earlier_gradients(step),
        activations=_after_forward(step),
        logits=logits_part(step).bytes,
        copies=0 if step.checkpointing else _copies(step),
        matrices=_rows_matrix(step) if step.learns_rows else 0,
    )


def _at_head_gradient(step: TrainStep) -> Moment:
    """The head has learnt rows: the gradient of the whole matrix is computed from the logits' gradient in bf16."""
    return Moment(
        gradients=_earlier_gradients(step),
        activations=_after_forward(step),
        logits=step.tokens_with_loss * BASE_BYTES * step.outputs,
        copies=0 if step.checkpointing else _copies(step),
        matrices=2 * _rows_matrix(step),
    )


def _at_last_layer(step: TrainStep, *, dequantized: int) -> Moment:
    """The backward pass has just begun, so all that the forward pass kept still exists."""
    # Checkpointing dropped what a layer keeps; its backward pass computes that again.
    again = tuple(part._replace(name=f"{part.name}, again") for part in _layers(step, 1)) if step.checkpointing else ()
    return Moment(
        gradients=_earlier_gradients(step),
        activations=(*_after_forward(step), *again, *_expert_gradients(step), _layer_backward(step)),
        copies=_copies(step) // step.shape.layers if step.checkpointing else _copies(step),
        dequantized=dequantized,
    )


def _at_first_layer(step: TrainStep, *, dequantized: int) -> Moment:
    """The backward pass is nearly complete: one layer's activations are left, and all gradients exist."""
    return Moment(
        gradients=step.trained * ADAPTER_BYTES,
        activations=(*_layers(step, 1), *_expert_gradients(step), _layer_input(step), _layer_backward(step)),
        copies=_copies(step) // step.shape.layers,
        dequantized=dequantized,
    )


def _at_embedding_gradient(step: TrainStep) -> Moment:
    """The embedding has learnt rows: the gradient of the whole matrix is computed last."""
    return Moment(
        gradients=step.trained * ADAPTER_BYTES, activations=(_layer_input(step),), matrices=_rows_matrix(step)
    )


def _at_update(step: TrainStep, *, optim: str) -> Moment:
    """The activations are gone; torch's own Adam makes temporaries."""
    gradients = step.trained * ADAPTER_BYTES
    update = step.overhead.update_copies * gradients if optim.startswith("adamw_torch") else 0
    return Moment(gradients=gradients, update=update)


def _earlier_gradients(step: TrainStep) -> int:
    """Bytes of gradients before the backward pass: those of earlier micro-batches."""
    return step.trained * ADAPTER_BYTES if step.accumulated else 0


def _copies(step: TrainStep) -> int:
    return step.trained * AUTOCAST_BYTES


def _rows_matrix(step: TrainStep) -> int:
    """Bytes of the embedding, or the head, with the learnt rows inserted."""
    return step.shape.vocabulary * step.shape.hidden * BASE_BYTES


def _layer_input(step: TrainStep) -> Part:
    return Part("layers' inputs", 1, step.tokens, BASE_BYTES * step.shape.hidden)


def _expert_gradients(step: TrainStep) -> tuple[Part, ...]:
    """The gradient of the largest expert parameter as it is computed, and its source. Measured: 1.2 to 1.9 times the parameter."""
    return (Part("gradient of experts", EXPERT_GRADIENTS, 1, step.folds.largest_bytes),) if step.folds.layers else ()


def logits_part(step: TrainStep) -> Part:
    """The head: qkit's holds the logits of all labelled positions; TRL's holds a tile, and the fp32 gradient of the hidden states."""
    shape, count = step.shape, step.tokens_with_loss
    if step.labelled_head:
        padded = -(-count // LABELLED_STEP) * LABELLED_STEP
        width = LABELLED_LOGIT_BYTES + (BOUNDED_LOGIT_BYTES if shape.final_softcap else 0)
        return Part("logits", 1, padded, step.outputs * width)
    tile = min(count, TILE_TOKENS) * TILE_VOCABULARY * BASE_BYTES
    return Part("logits", 1, 1, tile + count * 8 * shape.hidden)


def logits_formula(step: TrainStep) -> str:
    """The formula of `logits_part` with its numbers."""
    shape, count = step.shape, step.tokens_with_loss
    if step.labelled_head:
        part = logits_part(step)
        return f"{part.tokens:,} tokens with loss x {step.outputs:,} entries x {part.width // step.outputs} bytes"
    tile = f"a tile of {min(count, TILE_TOKENS):,} x {TILE_VOCABULARY:,} x {BASE_BYTES} bytes"
    return f"{tile} + {count:,} tokens with loss x {8 * shape.hidden:,} bytes"


def overhead_items(step: TrainStep, kept: int) -> tuple[MemoryItem, ...]:
    """Items besides tensors. `kept`: the most bytes of activations at any moment."""
    fixed = fixed_item(step.overhead)
    if step.overhead.segments:
        return fixed, segment_item(step.shape, step.four_bit)
    dropped = (step.shape.layers - 1) * sum(part.bytes for part in _layers(step, 1)) if step.checkpointing else 0
    return fixed, *heap_items(step.overhead, kept + dropped)
