"""The memory plan: what each stage will need and whether it fits, before anything is loaded. Arithmetic only; imports no torch.

`qkit.memory` adds up the items of a stage, `qkit.remedies` says what to change, `qkit.roofline` how long it takes, `qkit.plan_screen`
draws it. This is what the rest of qkit calls.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from qkit.core.device import Device, detect
from qkit.core.errors import ModelError, RecipeError
from qkit.core.figures import gib
from qkit.model.config import shape_of
from qkit.model.shape import Shape
from qkit.plan import gpus, stage_memory
from qkit.plan import remedies as plan_remedies
from qkit.plan._overhead import overhead_of
from qkit.plan.items import MemoryItem
from qkit.plan.remedies import Remedy
from qkit.recipe.schema import ALL, Recipe

NOT_ON_THE_DEVICE = ("export",)  # these work in the host's memory, whatever the device
ON_THE_HOST_TOO = ("evaluate", "merge")  # these may be run there apart from the rest


ITEMS: Mapping[str, Callable[[Recipe, Shape, Device], tuple[MemoryItem, ...]]] = {
    "load": stage_memory.load_items,
    "evaluate": stage_memory.evaluate_items,
    "merge": stage_memory.merge_items,
    "export": stage_memory.export_items,
    "serve": stage_memory.serve_items,
}
STAGES = ("load", "train", "evaluate", "merge", "export", "serve")


@dataclass(frozen=True)
class Plan:
    """What a stage needs at its peak: the items, summing to `peak_bytes`. `device_bytes`: what the device gives.

    `remedies`: the shortest list that makes it fit, or all there is when nothing does. `elsewhere`: where it might run, when it does not fit.
    """

    fits: bool
    device: str
    device_bytes: int
    peak_bytes: int
    stage: str
    items: tuple[MemoryItem, ...]
    remedies: tuple[Remedy, ...] = ()
    elsewhere: str = ""


@dataclass(frozen=True)
class Checkpointing:
    """Whether layers are computed once more in the backward pass (train.gradient_checkpointing), and why that was decided."""

    on: bool
    why: str


def checkpointing(
    recipe: Recipe, device: Device, labelled_tokens: int | None = None, device_bytes: int | None = None
) -> Checkpointing:
    """As the recipe says; for `auto`, off where the plan of training then fits, else on."""
    if recipe.train.gradient_checkpointing != "auto":
        return Checkpointing(bool(recipe.train.gradient_checkpointing), "the recipe says so")
    try:
        shape = shape_of(recipe.model)
    except ModelError:
        return Checkpointing(True, "there is no plan for this model, and on needs less")
    limit = gpus.usable_bytes(device) if device_bytes is None else device_bytes
    peak = peak_of(shape, device, "train", labelled_tokens)(_checkpointed(recipe, False))
    room = f"{gib(peak)} of the {gib(limit)} on {gpus.title(device)}"
    return Checkpointing(peak > limit, f"without it training {'would need' if peak > limit else 'needs'} {room}")


def decided(
    recipe: Recipe, device: Device, labelled_tokens: int | None = None, device_bytes: int | None = None
) -> Recipe:
    """The recipe with train.gradient_checkpointing decided where it is `auto`."""
    return _checkpointed(recipe, checkpointing(recipe, device, labelled_tokens, device_bytes).on)


def _checkpointed(recipe: Recipe, on: bool) -> Recipe:
    return recipe.model_copy(update={"train": recipe.train.model_copy(update={"gradient_checkpointing": on})})


def plan(
    recipe: Recipe,
    device_bytes: int | None = None,
    device: Device | None = None,
    stage: str = "train",
    labelled_tokens: int | None = None,
) -> Plan:
    """The plan of a stage on a device, by default this machine's.

    `device_bytes` puts a limit in the place of what the device has. `labelled_tokens`: the most of one batch that carry
    loss, when the rows are known; else all of them are counted.

    Raises:
        ModelError: the model's shape cannot be had.
    """
    device = device or detect()
    shape = shape_of(recipe.model)
    limit = gpus.usable_bytes(device) if device_bytes is None else device_bytes
    available = _server_share(recipe, device, limit) if stage == "serve" else limit
    if stage == "train":
        recipe = decided(recipe, device, labelled_tokens, limit)
    items = stage_items(recipe, shape, device, stage, labelled_tokens)
    peak = sum(item.bytes for item in items)
    made = Plan(peak <= available, gpus.title(device), available, peak, stage, items)
    if made.fits:
        return made
    found = plan_remedies.shortest(
        recipe, stage, shape, device, available, peak_of(shape, device, stage, labelled_tokens)
    )
    host = stage in ON_THE_HOST_TOO and device.offloads
    elsewhere = f"`QKIT_DEVICE=cpu qkit {stage} RUN` does this stage in the host's memory." if host else ""
    return replace(made, remedies=found, elsewhere=elsewhere)


def stage_items(
    recipe: Recipe, shape: Shape, device: Device, stage: str, labelled_tokens: int | None = None
) -> tuple[MemoryItem, ...]:
    """The items of a stage at its peak."""
    if stage == "train":
        return stage_memory.train_items(recipe, shape, device, labelled_tokens)
    return ITEMS[stage](recipe, shape, device)


def peak_of(shape: Shape, device: Device, stage: str, labelled_tokens: int | None) -> Callable[[Recipe], int]:
    return lambda how: sum(item.bytes for item in stage_items(how, shape, device, stage, labelled_tokens))


def _server_share(how: Recipe, device: Device, limit: int) -> int:
    """What vLLM may take of a device."""
    return int(limit * how.serve.gpu_memory_utilization) if device.server_arguments else limit


def stages(recipe: Recipe, device: Device | None = None, labelled_tokens: int | None = None) -> tuple[Plan, ...]:
    """The plans of all stages, in order; those that work in the host's memory, or that the recipe lacks, are held against nothing."""
    made = [plan(recipe, None, device, stage, labelled_tokens) for stage in STAGES]
    served = {ALL, "vllm"} & {*recipe.export.formats}
    free = NOT_ON_THE_DEVICE if served else (*NOT_ON_THE_DEVICE, "serve")
    return tuple(replace(p, fits=True, remedies=(), elsewhere="") if p.stage in free else p for p in made)


def alternatives(recipe: Recipe, made: Plan, device: Device, labelled_tokens: int | None = None) -> tuple[Remedy, ...]:
    """Every single change that lowers the peak of a plan, each alone."""
    shape, recipe = shape_of(recipe.model), decided(recipe, device, labelled_tokens)
    return plan_remedies.alternatives(
        recipe, made.stage, shape, device, peak_of(shape, device, made.stage, labelled_tokens)
    )


def predicted_items(recipe: Recipe, device: Device, labelled_tokens: int | None = None) -> dict[str, int]:
    """Bytes by name of what the device's meter should see at the peak of training; empty when the shape is unknown."""
    try:
        how = decided(recipe, device, labelled_tokens)
        items = stage_memory.train_items(how, shape_of(recipe.model), device, labelled_tokens)
    except ModelError:
        return {}
    return {item.name: item.bytes for item in items if item.name not in overhead_of(device).unmetered}


# --- devices ----------------------------------------------------------------------------------------------------------


def device_for(card: str | None, memory: str | None) -> Device | None:
    """The device that the command line names: a known card, a GPU of some size, or None for this machine.

    Raises:
        UserError: no such card, or the size cannot be read.
    """
    named = gpus.device(card) if card else None
    if memory is None:
        return named
    size = _bytes_of(memory)
    return replace(named, memory_bytes=size) if named else Device("cuda", f"{memory} card", size, cores=1)


def _bytes_of(text: str) -> int:
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?\s*", text, re.IGNORECASE)
    if not match or float(match[1]) == 0:
        raise RecipeError(f"--memory {text}: write a size such as 24GiB or 8GB")
    power = " KMGT".index(match[2].upper() or " ")
    return int(float(match[1]) * (1024 if match[3] else 1000) ** power)


# --- saying it --------------------------------------------------------------------------------------------------------


def to_dict(made: Plan) -> dict[str, Any]:
    """The plan as a JSON document."""
    return asdict(made)


def refusal(made: Plan) -> str:
    """Why a plan does not fit and what to set, in one sentence each: the message of DoesNotFit."""
    largest = max(made.items, key=lambda item: item.bytes)
    text = (
        f"needs {gib(made.peak_bytes)}; the {made.device} has {gib(made.device_bytes)}. "
        f"Largest: {largest.name} {gib(largest.bytes)}."
    )
    if made.remedies:
        tries = ", then ".join(f"{' '.join(remedy.set)} (-{gib(remedy.saves_bytes)})" for remedy in made.remedies)
        text += f" Try {tries}."
    left = made.peak_bytes - sum(remedy.saves_bytes for remedy in made.remedies)
    if left > made.device_bytes:
        even = f"Even so it needs {gib(left)}: take" if made.remedies else "Take"
        text += f" {even} a smaller model or a larger device."
    return f"{text} Or {made.elsewhere}" if made.elsewhere else text
