"""The memory that a process takes besides tensors, measured or fitted: CUDA context or interpreter, allocator, compiled kernels."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass

from qkit.core.device import Device
from qkit.core.figures import MIB, mib
from qkit.model.shape import Shape, linears
from qkit.plan.fixed_memory import BASE_BYTES
from qkit.plan.items import MemoryItem

KERNELS = "kernels"  # the item's name

# torch's CUDA allocator: a block of 10 MiB or more has its own segment, a multiple of 2 MiB; blocks from 1 MiB share segments of 20 MiB.
OWN_SEGMENT = 10 * MIB
SEGMENT_STEP = 2 * MIB
SHARED_SEGMENT = 20 * MIB
SMALLEST_SHARED = MIB


@dataclass(frozen=True)
class Overhead:
    """Memory of a kind of device besides tensors, and how training there differs. `fixed`: name, bytes and formula of an item."""

    fixed: tuple[str, int, str]
    vllm_bytes: int
    vllm_formula: str
    # peft casts the input of each adapter to fp32, except under CUDA's autocast; CPU's autocast casts it back.
    casts_inputs: bool
    update_copies: int  # temporaries, each the size of the adapter, that torch's own Adam makes in an update
    segments: bool  # whether memory is allocated in segments, whose ends stay unused
    heap_gaps: float = 0.0  # bytes of free heap between used blocks, per byte of activations, including dropped ones
    kernels: int = 0  # bytes of code and packed tables, compiled for each batch shape, up to the size of the cache
    unmetered: frozenset[str] = frozenset()  # items that the meter does not count


GPU = Overhead(
    fixed=("context", 600 * MIB, "estimate: CUDA context, kernels, cuBLAS workspace"),
    vllm_bytes=1536 * MIB,
    vllm_formula="estimate: vLLM, its activations and CUDA graphs",
    casts_inputs=False,
    update_copies=1,  # the square roots of all second moments at once
    segments=True,
    unmetered=frozenset({"context", "allocator"}),
)
HOST = Overhead(
    fixed=(
        "process",
        630 * MIB,
        "measured: the interpreter with torch, transformers, peft and trl 580 MiB, and what its first steps load",
    ),
    vllm_bytes=1126 * MIB,
    vllm_formula="measured: the two processes of vLLM",
    casts_inputs=True,
    update_copies=0,  # one matrix after the other
    segments=False,
    # Fitted: 0 to 0.08 at 42 points from 15M to 1.5B parameters, 0.2 at one of 7B; with 0.05 the error is below 5 % at each of them.
    heap_gaps=0.05,
    # The resident set of the quickstart less a bare process and all tensors, with the heap trimmed after each step: 50 MiB more than an
    # import with one batch shape, growing to 140 MiB within 30 steps of 30 shapes, and no further.
    kernels=90 * MIB,
)


# A process that trains a model with a new head: transformers' own Trainer does without trl.
LABELLED_PROCESS = MemoryItem(
    "process",
    560 * MIB,
    False,
    "measured: the interpreter with torch, transformers and peft, and what its first steps load",
)


def overhead_of(device: Device) -> Overhead:
    """The overhead on a device."""
    return GPU if device.has_gpu else HOST


def fixed_item(overhead: Overhead) -> MemoryItem:
    """The item for the process itself."""
    name, size, formula = overhead.fixed
    return MemoryItem(name, size, False, formula)


def heap_items(overhead: Overhead, activations: int) -> tuple[MemoryItem, MemoryItem]:
    """On a CPU: free heap between used blocks, and compiled kernels. `activations`: bytes kept at most, plus bytes dropped."""
    gaps = f"fitted: free heap between used blocks, {overhead.heap_gaps:.0%} of {mib(activations)} of activations, kept or dropped"
    return (
        MemoryItem("allocator", int(activations * overhead.heap_gaps), False, gaps),
        MemoryItem(KERNELS, overhead.kernels, False, "measured: oneDNN's kernels for batches of many shapes"),
    )


@functools.cache
def segment_item(shape: Shape, four_bit: bool) -> MemoryItem:
    """On a GPU: the unused ends of the segments that torch's allocator takes for the weights."""
    blocks = [
        (linear.weights // 2 if four_bit else linear.weights * BASE_BYTES, count) for linear, count in linears(shape)
    ]
    unused = sum((segment_bytes(block) - block) * count for block, count in blocks)
    formula = (
        f"estimate: unused ends of the weights' segments: from {OWN_SEGMENT // MIB} MiB in steps of {SEGMENT_STEP // MIB} MiB, "
        f"below that in shared segments of {SHARED_SEGMENT // MIB} MiB"
    )
    return MemoryItem("allocator", unused, False, formula)


def segments(blocks: Iterable[int]) -> int:
    """Bytes of the unused ends of the segments of these blocks."""
    return sum(segment_bytes(block) - block for block in blocks)


def segment_bytes(block: int) -> int:
    """A block's share of the segment that it is allocated in, in bytes."""
    if block >= OWN_SEGMENT:
        return -(-block // SEGMENT_STEP) * SEGMENT_STEP
    return SHARED_SEGMENT // (SHARED_SEGMENT // block) if block > SMALLEST_SHARED else block
