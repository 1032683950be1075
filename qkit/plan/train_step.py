"""What a training step keeps, and when: activations for the backward pass, logits, working space.

What autograd keeps of a layer was read off its saved tensors, for each family, and is a sum of widths times tokens. A step has several
moments that can be its peak; each is added up here, and `qkit.memory` takes the highest.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import NamedTuple

from qkit.core.device import Device
from qkit.core.figures import MIB, mib
from qkit.model.shape import Shape, linears, qk_norm_widths
from qkit.plan.fixed_memory import ADAPTER_BYTES, BASE_BYTES, Folds, adapted, adapted_inputs, adapter_sizes, folds
from qkit.plan.items import MemoryItem
from qkit.recipe.schema import Recipe

AUTOCAST_BYTES = 2  # autocast keeps a bf16 copy of the adapter for as long as a product with it may be needed


# The head on labelled positions: log-probabilities, their gradient and the logits' gradient in fp32.
LABELLED_LOGIT_BYTES = 12
BOUNDED_LOGIT_BYTES = 4  # where the logits are bounded, their tanh as well
EXPERT_GRADIENTS = 2
LABELLED_STEP = 32  # labelled positions are padded to a multiple of this
# TRL's fused head on GPUs: one bf16 tile of at most so many tokens, always so wide, whatever the vocabulary.
TILE_TOKENS = 4096
TILE_VOCABULARY = 32768
# TRL's activation offloading leaves on the card the newest tensors that are still on their way to the host.
OFFLOAD_STASH = 5


# torch's CUDA allocator: blocks from 10 MiB have a segment of their own, a multiple of 2 MiB; those from 1 MiB share segments of 20 MiB.
OWN_SEGMENT = 10 * MIB
SEGMENT_STEP = 2 * MIB
SHARED_SEGMENT = 20 * MIB
SMALLEST_SHARED = MIB


@dataclass(frozen=True)
class Overhead:
    """What a device takes beside the tensors. `fixed` is an item's name, bytes and formula."""

    fixed: tuple[str, int, str]
    vllm_bytes: int
    vllm_how: str
    copies: (
        bool  # peft casts each adapter's input to fp32 unless CUDA's autocast is on, and CPU's autocast casts it back
    )
    update_copies: int  # temporaries of the adapter's size that torch's own Adam makes in an update
    segments: bool  # whether memory is taken in segments, whose ends stay unused
    held_back: float = (
        0.0  # bytes of the heap that stay between blocks in use, per byte of activations, dropped ones included
    )
    kernels: int = 0  # bytes of code and packed tables that are made for each shape of batch, as many as are kept
    unmetered: frozenset[str] = frozenset()  # items that the meter does not see


# By meter, since what counts as needed depends on who counts.
OVERHEADS = {
    "cuda_allocated": Overhead(
        fixed=("context", 600 * MIB, "estimate: CUDA context, kernels, cuBLAS workspace"),
        vllm_bytes=1536 * MIB,
        vllm_how="estimate: vLLM, its activations and CUDA graphs",
        copies=False,
        update_copies=1,  # the square roots of all second moments at once
        segments=True,
        unmetered=frozenset({"context", "allocator"}),
    ),
    "rss": Overhead(
        fixed=(
            "process",
            630 * MIB,
            "measured: the interpreter with torch, transformers, peft and trl 580 MiB, and what its first steps load",
        ),
        vllm_bytes=1126 * MIB,
        vllm_how="measured: vLLM over its two processes",
        copies=True,
        update_copies=0,  # one matrix after the other
        segments=False,
        # Fitted: 0 to 0.08 at 42 points from 15M to 1.5B, 0.2 at one of 7B; with 0.05 none of them is 5 % off.
        held_back=0.05,
        # What a bare process and all tensors leave of the quickstart's resident set, given back after each step: 50 MiB more than an
        # import with one shape of batch, growing to 140 within 30 steps of 30 shapes, and no further.
        kernels=90 * MIB,
    ),
}
KERNELS = "kernels"  # the item's name


@dataclass(frozen=True)
class Step:
    """The numbers of a training step that its memory depends on. `labelled` None: not known, so all tokens are counted."""

    shape: Shape
    tokens: int  # of a micro-batch, padding included
    length: int  # of its longest row, or pack
    labelled: int | None
    trained: int
    modules: int  # with an adapter
    parameters: int  # with one, that are no modules: experts and routers
    own_inputs: int  # widths of their inputs, added up
    shared_inputs: int  # the same, where several read one tensor counted once
    rank: int
    folds: Folds
    dropout: bool
    checkpointing: bool
    offloading: bool
    eager: bool
    packed: bool
    four_bit: bool
    learns_rows: bool  # of embedding and head, for added tokens
    accumulated: bool  # gradients of earlier micro-batches are there already
    labelled_head: bool
    overhead: Overhead

    @property
    def with_loss(self) -> int:
        """Tokens that carry loss, as far as is known."""
        return self.tokens if self.labelled is None else min(self.labelled, self.tokens)


def micro_tokens(how: Recipe) -> int:
    """Tokens of the largest part when each batch is divided, by rows, into `micro_batches`: rows are not cut."""
    parts, row = how.micro_batches, min(how.data.max_length, how.data.batch_tokens)
    return -(-(how.data.batch_tokens + (parts - 1) * row) // parts)


def is_eager(how: Recipe, shape: Shape) -> bool:
    """Whether attention keeps the scores of every two tokens: as the recipe says, or since transformers has no other for this model."""
    attention = how.model.attn_implementation
    return attention == "eager" or (attention == "sdpa" and shape.eager)


def step_of(how: Recipe, shape: Shape, device: Device, labelled: int | None) -> Step:
    """The step that a recipe asks for."""
    own, shared = adapted_inputs(how, shape)
    modules, overhead, eager = adapted(how, shape), OVERHEADS[device.meter], is_eager(how, shape)
    tokens = how.data.batch_tokens if how.data.packing else micro_tokens(how)
    return Step(
        shape=shape,
        tokens=tokens,
        length=how.data.batch_tokens if how.data.packing else min(how.data.max_length, tokens),
        labelled=labelled,
        trained=sum(adapter_sizes(how, shape)),
        modules=sum(not target.parameter for target in modules),
        parameters=sum(target.parameter for target in modules),
        own_inputs=own,
        shared_inputs=shared,
        rank=how.lora.r,
        folds=folds(how, shape),
        dropout=how.lora.lora_dropout > 0,
        checkpointing=bool(how.train.gradient_checkpointing),  # auto, as long as nothing has decided: what needs least
        offloading=how.train.activation_offloading and device.offloads,
        eager=eager,
        packed=how.data.packing and not how.model.attn_implementation.startswith("flash"),
        four_bit=how.quantization.load_in_4bit,
        learns_rows=bool(how.model.add_tokens),
        accumulated=how.train.gradient_accumulation_steps * how.micro_batches > 1,
        labelled_head=device.uses_labelled_head,
        overhead=overhead,
    )


def kept_terms(step: Step) -> dict[str, int]:
    """Bytes per token that autograd keeps of an average layer, by what keeps them; bf16 under autocast, frozen weights.

    Products with frozen matrices keep no input. A norm keeps its input in fp32 and a scale; norms that feed a product leave their output to
    its adapter. Attention keeps queries, keys, values, its output and a log-sum per head; the gated MLP four tensors of its width.
    """
    shape, casts = step.shape, step.overhead.copies
    terms = {
        "norms": shape.norms_per_layer * (4 * shape.hidden + 4),
        "attention": _attention_bytes(step),
        "mlp": 6 * shape.intermediate * shape.dense // shape.layers + _expert_bytes(shape),
        "adapters' inputs": 2 * (step.own_inputs if casts else step.shared_inputs) // shape.layers,
        "adapters": 2 * step.rank * step.modules // shape.layers,
    }
    if shape.qk_norm:
        terms["query and key norms"] = 4 * (shape.attention + shape.kv) + 4 * (shape.heads + shape.kv_heads)
    if step.dropout:  # an fp32 input dropped, or a mask beside a bf16 one
        terms["dropout"] = (4 if casts else 3) * step.own_inputs // shape.layers
    return terms


def _attention_bytes(step: Step) -> int:
    shape, masked = step.shape, step.packed and not step.eager
    if step.eager:  # keys and values repeated for each head; scores in fp32, probabilities in bf16
        kept = 6 if step.overhead.copies else 8  # the product of the two, unless the adapter has its own copy of it
        return kept * shape.attention + shape.heads * step.length * (8 if shape.softcap else 6)
    keys = 4 * (shape.attention if masked else shape.kv)  # with a mask they are repeated for each head
    mask = 2 * step.length if masked else 0  # and each layer has the mask in bf16
    whole = 2 * (shape.attention + shape.kv) if shape.fused else 0  # the values are a part of the fused product
    return 4 * shape.attention + keys + 4 * shape.heads + mask + whole


def _expert_bytes(shape: Shape) -> int:
    """Of each active expert: gate, its activation and up, the output that its share multiplies; the router's scores."""
    if not shape.sparse:
        return 0
    each = shape.active_experts * (6 * shape.expert_width + 4 * shape.hidden) + 6 * shape.shared_width
    return (each + 8 * shape.experts) * len(shape.sparse) // shape.layers


def layer_bytes_per_token(recipe: Recipe, shape: Shape, device: Device) -> int:
    """Bytes that autograd keeps of one layer and token."""
    return sum(kept_terms(step_of(recipe, shape, device, None)).values())


class Part(NamedTuple):
    """`times` times `tokens` times `width` bytes of something. Added up first, put into words only when it is shown."""

    name: str
    times: int
    tokens: int
    width: int

    @property
    def bytes(self) -> int:
        return self.times * self.tokens * self.width

    def item(self) -> MemoryItem:
        """As a line of the plan."""
        return MemoryItem(self.name, self.bytes, False, f"{self.times} x {self.tokens:,} tokens x {self.width:,} bytes")


class Moment(NamedTuple):
    """What is there at one moment of a step beside weights, adapter and optimizer. `dequantized`: bytes of a matrix in bf16."""

    gradients: int
    activations: tuple[Part, ...]
    logits: int
    copies: int
    dequantized: int
    update: int = 0
    matrices: int = 0  # embedding or head with learnt rows put in, and the gradient of the whole

    @property
    def kept(self) -> int:
        """Bytes of the activations."""
        return sum(part.bytes for part in self.activations)

    @property
    def bytes(self) -> int:
        return self.gradients + self.kept + self.logits + self.copies + self.dequantized + self.update + self.matrices


def _layers(step: Step, count: int) -> tuple[Part, ...]:
    """What the backward pass of so many layers needs."""
    parts = [Part(name, count, step.tokens, width) for name, width in kept_terms(step).items()]
    if step.shape.norm_offset:
        parts.append(Part("1 + weight of norms", count, 1, _offset_bytes(step.shape)))
    if step.folds.layers:
        parts.append(Part("experts with their adapters", min(count, step.folds.layers), 1, step.folds.layer_bytes))
    return tuple(parts)


def _kept(step: Step) -> tuple[Part, ...]:
    """What is kept from a forward pass through all layers. The first norm keeps nothing, as its input needs no gradient; the last one does."""
    shape, tokens = step.shape, step.tokens
    ends = [Part("rotary tables", shape.rotary_sets, step.length, 4 * shape.head_dim)]
    if shape.norm_offset:
        ends.append(Part("1 + weight of the last norm", 1, 1, 4 * shape.hidden))
    if not step.checkpointing:
        return (*_layers(step, shape.layers), *ends)
    count = min(shape.layers, OFFLOAD_STASH) if step.offloading else shape.layers
    inputs = Part("layers' inputs", count, tokens, BASE_BYTES * shape.hidden)
    return inputs, Part("last norm", 1, tokens, 4 * shape.hidden + 4), *ends


def _offset_bytes(shape: Shape) -> int:
    """Of norms that multiply by 1 + weight: that sum, in fp32, for each norm of a layer."""
    widths = shape.norms_per_layer * shape.hidden + qk_norm_widths(shape)
    return 4 * widths if shape.norm_offset else 0


def _backward(step: Step) -> Part:
    """What the backward pass of a layer holds at once, beside what is kept: widths read off its tensors."""
    shape = step.shape
    width = max(shape.intermediate if shape.dense else 0, shape.active_experts * shape.expert_width)
    if step.overhead.copies:
        return Part("backward pass of a layer", 1, step.tokens, 6 * width + (14 if shape.fused else 12) * shape.hidden)
    gated = 4 * width + (12 if shape.fused else 2) * shape.hidden
    through_norm = 24 * shape.hidden if shape.norms_per_layer > 2 or not step.checkpointing else 0
    return Part("backward pass of a layer", 1, step.tokens, max(gated, through_norm))


def moments(step: Step, largest: int, optim: str) -> tuple[Moment, ...]:
    """The moments that can be a step's peak: at the head, in the last layer's backward, in the first's, at the update.

    `largest`: bytes of the largest matrix dequantized; 0 where nothing is quantized.
    """
    shape, gradients = step.shape, step.trained * ADAPTER_BYTES
    kept, one, backward = _kept(step), _layers(step, 1), _backward(step)
    copies = step.trained * AUTOCAST_BYTES
    of_a_layer, now = copies // shape.layers, copies
    early = gradients if step.accumulated else 0
    # Measured: 1.2 to 1.9 times the largest; the gradient of one as it is made, and what it is made of.
    folded = (Part("gradient of experts", EXPERT_GRADIENTS, 1, step.folds.largest_bytes),) if step.folds.layers else ()
    first = (*one, *folded, Part("layers' inputs", 1, step.tokens, BASE_BYTES * shape.hidden), backward)
    update = step.overhead.update_copies * gradients if optim.startswith("adamw_torch") else 0
    matrix = shape.vocabulary * shape.hidden * BASE_BYTES if step.learns_rows else 0
    if step.checkpointing:  # what a layer keeps is dropped, and made again in its backward pass
        again, now = tuple(part._replace(name=f"{part.name}, again") for part in one), of_a_layer
        last = (*kept, *again, *folded, backward)
    else:
        last = (*kept, *folded, backward)
    held = 0 if step.checkpointing else copies
    return (
        Moment(early, kept, logits_part(step).bytes, held, 0, matrices=matrix),
        Moment(early, kept, step.with_loss * BASE_BYTES * shape.vocabulary, held, 0, matrices=2 * matrix)
        if matrix
        else Moment(0, (), 0, 0, 0),
        Moment(early, last, 0, now, largest),
        Moment(gradients, first, 0, of_a_layer, largest),
        Moment(gradients, (first[-2],), 0, 0, 0, matrices=matrix),
        Moment(gradients, (), 0, 0, 0, update),
    )


def logits_part(step: Step) -> Part:
    """The head: on labelled positions all of their logits, on others TRL's tiles and its fp32 gradient of the hidden states."""
    shape, count = step.shape, step.with_loss
    if step.labelled_head:
        padded = -(-count // LABELLED_STEP) * LABELLED_STEP
        width = LABELLED_LOGIT_BYTES + (BOUNDED_LOGIT_BYTES if shape.final_softcap else 0)
        return Part("logits", 1, padded, shape.vocabulary * width)
    tile = min(count, TILE_TOKENS) * TILE_VOCABULARY * BASE_BYTES
    return Part("logits", 1, 1, tile + count * 8 * shape.hidden)


def logits_how(step: Step) -> str:
    """The formula of `logits_part`, with its numbers."""
    shape, count = step.shape, step.with_loss
    if step.labelled_head:
        part = logits_part(step)
        return (
            f"{part.tokens:,} tokens with loss x {shape.vocabulary:,} entries x {part.width // shape.vocabulary} bytes"
        )
    tile = f"a tile of {min(count, TILE_TOKENS):,} x {TILE_VOCABULARY:,} x {BASE_BYTES} bytes"
    return f"{tile} + {count:,} tokens with loss x {8 * shape.hidden:,} bytes"


def around(step: Step, kept: int) -> tuple[MemoryItem, ...]:
    """What the device takes beside the tensors. `kept`: the most bytes of activations at any moment."""
    overhead = step.overhead
    name, size, formula = overhead.fixed
    fixed = MemoryItem(name, size, False, formula)
    if overhead.segments:
        return fixed, _ends_of_segments(step.shape, step.four_bit)
    dropped = (step.shape.layers - 1) * sum(part.bytes for part in _layers(step, 1)) if step.checkpointing else 0
    how = f"fitted: the heap keeps {overhead.held_back:.0%} of {mib(kept + dropped)}, activations kept or dropped, in its gaps"
    gaps = MemoryItem("allocator", int((kept + dropped) * overhead.held_back), False, how)
    made = MemoryItem(KERNELS, overhead.kernels, False, "measured: oneDNN's, for batches of many shapes")
    return fixed, gaps, made


@functools.cache
def _ends_of_segments(shape: Shape, four_bit: bool) -> MemoryItem:
    """What the weights' blocks leave unused of the segments that torch's CUDA allocator takes for them."""
    blocks = [
        (linear.weights // 2 if four_bit else linear.weights * BASE_BYTES, count) for linear, count in linears(shape)
    ]
    unused = sum((_segment_bytes(block) - block) * count for block, count in blocks)
    how = f"ends of the weights' segments: {OWN_SEGMENT // MIB} MiB and more in steps of {SEGMENT_STEP // MIB}, less in shared ones of"
    return MemoryItem("allocator", unused, False, f"estimate: {how} {SHARED_SEGMENT // MIB}")


def _segment_bytes(block: int) -> int:
    """A block's share of the segment that it is in."""
    if block >= OWN_SEGMENT:
        return -(-block // SEGMENT_STEP) * SEGMENT_STEP
    return SHARED_SEGMENT // (SHARED_SEGMENT // block) if block > SMALLEST_SHARED else block
