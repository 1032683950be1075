"""The memory plan: the memory that each stage needs, and whether it fits, before anything is loaded. Arithmetic only, without torch.

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
from qkit.model.config import shape_of
from qkit.model.shape import Shape
from qkit.plan import gpus, stage_memory
from qkit.plan import remedies as plan_remedies
from qkit.plan._overhead import overhead_of
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
    recipe: Recipe, device: Device, labelled_tokens: int | None = None, device_bytes: int | None = None
) -> Checkpointing:
    """The recipe's value; for `auto`, off if training fits without checkpointing, else on."""
    if recipe.train.gradient_checkpointing != "auto":
        return Checkpointing(bool(recipe.train.gradient_checkpointing), "set in the recipe")
    try:
        shape = shape_of(recipe.model)
    except ModelError:
        return Checkpointing(True, "this model cannot be planned for, and training needs less memory with it")
    limit = gpus.usable_bytes(device) if device_bytes is None else device_bytes
    peak = peak_of(shape, device, "train", labelled_tokens)(_checkpointed(recipe, False))
    memory = f"{gib(peak)} of the {gib(limit)} on {gpus.title(device)}"
    return Checkpointing(peak > limit, f"without it, training {'would need' if peak > limit else 'needs'} {memory}")


def decided(
    recipe: Recipe, device: Device, labelled_tokens: int | None = None, device_bytes: int | None = None
) -> Recipe:
    """The recipe with `auto` in train.gradient_checkpointing replaced by true or false."""
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
    """Plan a stage on a device, by default that of this machine.

    Args:
        device_bytes: a limit in place of the device's memory.
        labelled_tokens: the most tokens with loss in one batch; None: the rows are unknown, so all tokens count.

    Raises:
        ModelError: the shape of the model cannot be determined, or models with a new head are not planned for.
    """
    need_planned(recipe)
    device = device or detect()
    shape = shape_of(recipe.model)
    limit = gpus.usable_bytes(device) if device_bytes is None else device_bytes
    available = _server_share(recipe, device, limit) if stage == "serve" else limit
    if stage == "train":
        recipe = decided(recipe, device, labelled_tokens, limit)
    items = stage_items(recipe, shape, device, stage, labelled_tokens)
    peak = sum(item.bytes for item in items)
    without_remedies = Plan(peak <= available, gpus.title(device), available, peak, stage, items)
    if without_remedies.fits:
        return without_remedies
    changes = plan_remedies.shortest(
        recipe, stage, shape, device, available, peak_of(shape, device, stage, labelled_tokens)
    )
    host = stage in ALSO_ON_THE_HOST and device.offloads
    elsewhere = f"run this stage in the host's memory: `QKIT_DEVICE=cpu qkit {stage} RUN`." if host else ""
    return replace(without_remedies, remedies=changes, elsewhere=elsewhere)


def need_planned(recipe: Recipe) -> None:
    """Raise ModelError for a head that the items do not describe: figures of another model would be worse than none."""
    if not open_task(recipe.task).HEAD.generates:
        raise ModelError(
            f"the memory of models with a new head (task={recipe.task}) is measured in training, but not planned yet",
            source=recipe.model.source,
        )


def stage_items(
    recipe: Recipe, shape: Shape, device: Device, stage: str, labelled_tokens: int | None = None
) -> tuple[MemoryItem, ...]:
    """The items of a stage at its peak. `labelled_tokens`: as in `plan`."""
    if stage == "train":
        return stage_memory.train_items(recipe, shape, device, labelled_tokens)
    return ITEMS[stage](recipe, shape, device)


def peak_of(shape: Shape, device: Device, stage: str, labelled_tokens: int | None) -> Callable[[Recipe], int]:
    """A function from a recipe to the peak of the stage, in bytes."""
    return lambda recipe: sum(item.bytes for item in stage_items(recipe, shape, device, stage, labelled_tokens))


def _server_share(recipe: Recipe, device: Device, limit: int) -> int:
    """The bytes that vLLM may use of `limit`."""
    return int(limit * recipe.serve.gpu_memory_utilization) if device.server_arguments else limit


def stages(recipe: Recipe, device: Device | None = None, labelled_tokens: int | None = None) -> tuple[Plan, ...]:
    """The plans of all stages, in order. Stages in the host's memory, and `serve` if the recipe has no vLLM export, always fit."""
    planned = [plan(recipe, None, device, stage, labelled_tokens) for stage in STAGES]
    served = {ALL, "vllm"} & {*recipe.export.formats}
    unlimited = HOST_STAGES if served else (*HOST_STAGES, "serve")
    return tuple(replace(p, fits=True, remedies=(), elsewhere="") if p.stage in unlimited else p for p in planned)


def alternatives(
    recipe: Recipe, planned: Plan, device: Device, labelled_tokens: int | None = None
) -> tuple[Remedy, ...]:
    """Every single change that lowers the peak of a plan, each on its own."""
    shape, recipe = shape_of(recipe.model), decided(recipe, device, labelled_tokens)
    return plan_remedies.alternatives(
        recipe, planned.stage, shape, device, peak_of(shape, device, planned.stage, labelled_tokens)
    )


def predicted_items(recipe: Recipe, device: Device, labelled_tokens: int | None = None) -> dict[str, int]:
    """Bytes by item that the device's meter should read at the peak of training; empty if the shape of the model is unknown."""
    try:
        need_planned(recipe)
        recipe = decided(recipe, device, labelled_tokens)
        items = stage_memory.train_items(recipe, shape_of(recipe.model), device, labelled_tokens)
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
