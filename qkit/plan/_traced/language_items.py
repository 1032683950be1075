"""The items of a training step of a language model that is not LoRA on frozen weights: a trace, and arithmetic for a head in tiles."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import replace

from qkit.core.batching import LENGTH_STEP
from qkit.core.device import Device
from qkit.model.shape import Shape
from qkit.plan import train_step
from qkit.plan._known import Known
from qkit.plan._optimizer_state import formula, state_bytes
from qkit.plan._overhead import fixed_item, heap_items, overhead_of, segments
from qkit.plan._traced import items, shapes
from qkit.plan._traced.head import NewHead, model_of
from qkit.plan._traced.items import FP32, Step
from qkit.plan._traced.shapes import BatchShape
from qkit.plan._traced.step import setting_of, traced
from qkit.plan.items import MemoryItem
from qkit.recipe import schema
from qkit.recipe.schema import Recipe

INPUTS = 3  # ids, labels, positions


def is_traced(recipe: Recipe) -> bool:
    """Whether training is more than LoRA on frozen weights, whose memory is arithmetic."""
    return recipe.method != "lora" or recipe.lora.use_dora or recipe.lora.takes_part_of_base


def train_items(recipe: Recipe, shape: Shape, device: Device, known: Known) -> tuple[MemoryItem, ...]:
    """The items at the peak of a training step.

    Raises:
        ModelError: the model cannot be found or traced.
    """
    step = step_of(recipe, device, known)
    tile = _tile(recipe, shape, device, known)
    at_update = step.trained_bytes + step.update_bytes > step.passing + tile
    trained = sum(step.trace.trained)
    counted = f"{trained:,} parameters in {len(step.trace.trained):,} tensors x {FP32} bytes"
    gradients = step.trained_bytes if at_update else step.trace.log.items()["gradients"]
    return (
        items.weights_item(recipe, _head(recipe.model), step.trace),
        MemoryItem(recipe.trained_as, step.trained_bytes, True, counted),
        MemoryItem("gradients", gradients, at_update, counted if at_update else items.TRACED_GRADIENTS),
        MemoryItem("optimizer", step.optimizer, "adamw" in recipe.train.optim, formula(recipe.train, trained)),
        *_passing(step, at_update, tile),
        *_overhead(step, device),
    )


def step_of(recipe: Recipe, device: Device, known: Known) -> Step:
    """The training step with the largest of the micro-batches."""
    head = _head(recipe.model)

    def step(shape: BatchShape) -> Step:
        labelled = shape.length if known.labelled is None else min(shape.length, -(-known.labelled // shape.rows))
        setting = setting_of(recipe, head, device.has_gpu, labelled=labelled)
        trace = traced(setting, *shape)
        return Step(recipe, device, shape, trace, state_bytes(recipe.train, trace.tensors), INPUTS)

    return max(map(step, _batches(recipe, known)), key=lambda step: step.peak_bytes)


def _batches(recipe: Recipe, known: Known) -> tuple[BatchShape, ...]:
    """The largest micro-batches; rows are padded to a multiple of LENGTH_STEP."""
    section = recipe.data
    if section.packing:
        return (BatchShape(1, section.batch_tokens),)
    longest = _padded(section.max_length)
    padded = section.model_copy(update={"max_length": longest, "batch_tokens": max(section.batch_tokens, longest)})
    lengths = tuple((_padded(tokens), rows) for tokens, rows in known.lengths if tokens <= section.max_length)
    return shapes.largest(recipe.model_copy(update={"data": padded}), replace(known, lengths=lengths))


def _padded(length: int) -> int:
    return -(-length // LENGTH_STEP) * LENGTH_STEP


@functools.lru_cache(maxsize=16)
def _head(model: schema.Model) -> NewHead:
    """The model, read once: a plan asks for many recipes of it."""
    return model_of(model)


def _tile(recipe: Recipe, shape: Shape, device: Device, known: Known) -> int:
    """Bytes of the logits where the trace has none."""
    if not device.has_gpu:
        return 0
    return train_step.logits_part(train_step.step_of(recipe, shape, device, known.labelled)).bytes


def _passing(step: Step, at_update: bool, tile: int) -> Iterator[MemoryItem]:
    """Activations, logits, working space and batch at the peak."""
    lines, shape = step.trace.log.items(), step.shape
    if at_update:
        yield MemoryItem("activations", 0, False, "none at the peak: the optimizer update")
        yield MemoryItem("logits", 0, False, "none at the peak: the optimizer update")
        yield MemoryItem("workspace", step.update_bytes, False, f"temporaries of {step.recipe.train.optim}")
        return
    what = f"one step of {shape.rows:,} rows x {shape.length:,} tokens"
    text = f"traced: every tensor at the peak of {what}{items.mode_text(step)}"
    logits = "a tile of the head, and the gradient of what it reads" if tile else "traced: of the positions with loss"
    yield MemoryItem("activations", lines["activations"], False, text)
    yield MemoryItem("logits", lines["logits"] + tile, False, logits)
    yield MemoryItem("workspace", lines["workspace"], False, "traced: copies of weights in another dtype")
    yield MemoryItem(
        "batch", lines["batch"] + step.waiting_bytes, False, f"traced: ids, labels and positions of {what}"
    )


def _overhead(step: Step, device: Device) -> Iterator[MemoryItem]:
    """Items besides tensors."""
    overhead = overhead_of(device)
    yield fixed_item(overhead)
    if overhead.segments:
        size = segments([*step.trace.held, *(count * FP32 for count in step.trace.trained)])
        yield MemoryItem("allocator", size, False, "estimate: unused ends of the weights' segments")
    else:
        yield from heap_items(overhead, step.trace.passing_bytes)
