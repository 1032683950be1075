"""The memory plan: the memory that each stage needs, and whether it fits, before anything is loaded. Arithmetic only, without torch.
Except for models with a new head, and methods other than plain LoRA, whose step is traced (_traced/).

This module is what the rest of qkit calls. stage_memory.py computes the items of a stage, remedies.py the changes that make it fit, speed.py
the time; sheet.py gathers all that `qkit plan` shows, and screen.py prints it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from qkit.core.device import Device, detect
from qkit.core.errors import ModelError, RecipeError
from qkit.core.figures import gib
from qkit.model.shape import Shape
from qkit.plan import gpus, stage_memory
from qkit.plan import remedies as plan_remedies
from qkit.plan._known import NOTHING, Known
from qkit.plan._overhead import overhead_of
from qkit.plan._subject import Subject, subject_of
from qkit.plan._traced import items as traced_items
from qkit.plan._traced import language_items
from qkit.plan._traced.head import NewHead
from qkit.plan.items import MemoryItem
from qkit.plan.remedies import Remedy
from qkit.plugins.task import open_task
from qkit.recipe.schema import ALL, Recipe

HOST_STAGES = ("export",)  # always use the host's memory
ALSO_ON_THE_HOST = ("evaluate", "merge")  # can run on the host while the other stages run on a GPU

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
    """The memory of a stage at its peak: items that add up to `peak_bytes`. `device_bytes`: memory available on the device.

    `remedies`: the shortest list that makes it fit, or all remedies if none is enough. `elsewhere`: where a stage that does not fit can run.
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
    """Whether train.gradient_checkpointing is on, and why."""

    on: bool
    why: str


def checkpointing(
    recipe: Recipe, device: Device, known: Known = NOTHING, device_bytes: int | None = None
) -> Checkpointing:
    """The recipe's value; for `auto`, off if training fits without checkpointing, else on."""
    if recipe.train.gradient_checkpointing != "auto":
        return Checkpointing(bool(recipe.train.gradient_checkpointing), "set in the recipe")
    try:
        subject = subject_of(recipe, known)
        limit = gpus.usable_bytes(device) if device_bytes is None else device_bytes
        peak = peak_of(subject, device, "train", known)(_checkpointed(recipe, False))
    except ModelError:
        return Checkpointing(True, "this model cannot be planned for, and training needs less memory with it")
    memory = f"{gib(peak)} of the {gib(limit)} on {gpus.title(device)}"
    return Checkpointing(peak > limit, f"without it, training {'would need' if peak > limit else 'needs'} {memory}")


def decided(recipe: Recipe, device: Device, known: Known = NOTHING, device_bytes: int | None = None) -> Recipe:
    """The recipe with `auto` in train.gradient_checkpointing replaced by true or false."""
    return _checkpointed(recipe, checkpointing(recipe, device, known, device_bytes).on)


def _checkpointed(recipe: Recipe, on: bool) -> Recipe:
    return recipe.model_copy(update={"train": recipe.train.model_copy(update={"gradient_checkpointing": on})})


def plan(
    recipe: Recipe,
    device_bytes: int | None = None,
    device: Device | None = None,
    stage: str = "train",
    known: Known = NOTHING,
) -> Plan:
    """Plan a stage on a device, by default that of this machine.

    Args:
        device_bytes: a limit in place of the device's memory.
        known: what the data stage knows of the rows; of what is unknown, the most that the recipe allows counts.

    Raises:
        ModelError: the shape of the model cannot be determined.
    """
    device = device or detect()
    subject = subject_of(recipe, known)
    limit = gpus.usable_bytes(device) if device_bytes is None else device_bytes
    available = _server_share(recipe, device, limit) if stage == "serve" else limit
    if stage == "train":
        recipe = decided(recipe, device, known, limit)
    items = stage_items(recipe, subject, device, stage, known)
    peak = sum(item.bytes for item in items)
    without_remedies = Plan(peak <= available, gpus.title(device), available, peak, stage, items)
    if without_remedies.fits:
        return without_remedies
    changes = plan_remedies.shortest(recipe, stage, subject, device, available, peak_of(subject, device, stage, known))
    host = stage in ALSO_ON_THE_HOST and device.offloads
    elsewhere = f"run this stage in the host's memory: `QKIT_DEVICE=cpu qkit {stage} RUN`." if host else ""
    return replace(without_remedies, remedies=changes, elsewhere=elsewhere)


def stage_items(
    recipe: Recipe, subject: Subject, device: Device, stage: str, known: Known = NOTHING
) -> tuple[MemoryItem, ...]:
    """The items of a stage at its peak. `known`: as in `plan`.

    Raises:
        ModelError: a model with a new head cannot be traced.
    """
    if isinstance(subject, NewHead):
        return traced_items.stage_items(recipe, subject, device, stage)
    if stage == "train" and language_items.is_traced(recipe):
        return language_items.train_items(recipe, subject, device, known)
    if stage == "train":
        return stage_memory.train_items(recipe, subject, device, known.labelled)
    return ITEMS[stage](recipe, subject, device)


def peak_of(subject: Subject, device: Device, stage: str, known: Known = NOTHING) -> Callable[[Recipe], int]:
    """A function from a recipe to the peak of the stage, in bytes."""
    return lambda recipe: sum(item.bytes for item in stage_items(recipe, subject, device, stage, known))


def _server_share(recipe: Recipe, device: Device, limit: int) -> int:
    """The bytes that vLLM may use of `limit`."""
    return int(limit * recipe.serve.gpu_memory_utilization) if device.server_arguments else limit


def stages_with_a_plan(recipe: Recipe) -> tuple[str, ...]:
    """The names of the stages that `stages` plans."""
    return STAGES if open_task(recipe.task).HEAD.generates else traced_items.stages(recipe)


def stages(recipe: Recipe, device: Device | None = None, known: Known = NOTHING) -> tuple[Plan, ...]:
    """The plans of all stages, in order. Stages in the host's memory, and `serve` if the recipe has no vLLM export, always fit."""
    planned = [plan(recipe, None, device, stage, known) for stage in stages_with_a_plan(recipe)]
    served = {ALL, "vllm"} & {*recipe.export.formats}
    unlimited = HOST_STAGES if served else (*HOST_STAGES, "serve")
    return tuple(replace(p, fits=True, remedies=(), elsewhere="") if p.stage in unlimited else p for p in planned)


def alternatives(recipe: Recipe, planned: Plan, device: Device, known: Known = NOTHING) -> tuple[Remedy, ...]:
    """Every single change that lowers the peak of a plan, each on its own."""
    subject, recipe = subject_of(recipe, known), decided(recipe, device, known)
    peak = peak_of(subject, device, planned.stage, known)
    return plan_remedies.alternatives(recipe, planned.stage, subject, device, peak)


def predicted_items(recipe: Recipe, device: Device, known: Known = NOTHING) -> dict[str, int]:
    """Bytes by item that the device's meter should read at the peak of training; empty if the shape of the model is unknown."""
    try:
        recipe = decided(recipe, device, known)
        items = stage_items(recipe, subject_of(recipe, known), device, "train", known)
    except ModelError:
        return {}
    return {item.name: item.bytes for item in items if item.name not in overhead_of(device).unmetered}


# --- devices ----------------------------------------------------------------------------------------------------------


def device_for(card: str | None, memory: str | None) -> Device | None:
    """The device that the command line names: a known card, a GPU of a given size, or None for this machine.

    Raises:
        UserError: the card is unknown.
        RecipeError: the size is not valid.
    """
    named = gpus.device(card) if card else None
    if memory is None:
        return named
    size = _bytes_of(memory)
    return replace(named, memory_bytes=size) if named else Device("cuda", f"{memory} card", size, cores=1)


def _bytes_of(text: str) -> int:
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?\s*", text, re.IGNORECASE)
    if not match or float(match[1]) == 0:
        raise RecipeError(f"--memory {text}: must be a size such as 24GiB or 8GB")
    power = " KMGT".index(match[2].upper() or " ")
    return int(float(match[1]) * (1024 if match[3] else 1000) ** power)


# --- output --------------------------------------------------------------------------------------------------------


def to_dict(planned: Plan) -> dict[str, Any]:
    """The plan for `--json`."""
    return {**asdict(planned), "remedies": [remedy.to_dict() for remedy in planned.remedies]}


def refusal(planned: Plan) -> str:
    """Why a plan does not fit, and which recipe values to set: the message of DoesNotFit."""
    largest = max(planned.items, key=lambda item: item.bytes)
    text = (
        f"needs {gib(planned.peak_bytes)}; the {planned.device} has {gib(planned.device_bytes)}. "
        f"Largest: {largest.name} {gib(largest.bytes)}."
    )
    if planned.remedies:
        tries = ", then ".join(f"{' '.join(remedy.set)} (-{gib(remedy.saves_bytes)})" for remedy in planned.remedies)
        text += f" Try {tries}."
    left = planned.peak_bytes - sum(remedy.saves_bytes for remedy in planned.remedies)
    if left > planned.device_bytes:
        advice = f"This still needs {gib(left)}: use" if planned.remedies else "Use"
        text += f" {advice} a smaller model or a larger device."
    return f"{text} Or {planned.elsewhere}" if planned.elsewhere else text
