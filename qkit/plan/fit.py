"""`qkit run --fit`: changes the recipe until the plan fits, and again each time that training runs out of memory.

The changes before the start are the remedies of the plan. A restart resumes from the last checkpoint, so it changes only settings that keep
the batches and the shape of the adapter: the same rows in the same order give the same optimizer steps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from qkit.core.device import Device, detect
from qkit.core.errors import DoesNotFit, ModelError, OutOfMemory, RecipeError
from qkit.core.figures import gib
from qkit.plan import plan as plan_plan
from qkit.plan import remedies
from qkit.plan.remedies import Remedy
from qkit.recipe.load import load
from qkit.recipe.schema import Recipe
from qkit.run.directory import Run, decisions

CHECKPOINTING = "train.gradient_checkpointing"
RESUMABLE = ("micro_batches", CHECKPOINTING, "train.activation_offloading")


def fitted(run: Run, device: Device | None = None) -> Run:
    """The run with a recipe whose training fits the device, changed by the shortest list of remedies.

    Changes that an earlier `--fit` of the same run made after training ran out of memory are kept.

    Raises:
        DoesNotFit: all possible changes together are not enough.
    """
    run = Run(run.root, with_earlier_memory_changes(run), run.progress)
    plan = plan_plan.plan(run.recipe, device=device)
    if plan.fits:
        return run
    left = plan.peak_bytes - sum(remedy.saves_bytes for remedy in plan.remedies)
    if left > plan.device_bytes:
        message = f"{run.root}: training {plan_plan.refusal(plan)}"
        raise DoesNotFit(message, needed_bytes=left, free_bytes=plan.device_bytes)
    for remedy in plan.remedies:
        run.progress.notify(f"fit: {_described(remedy)}")
    changed = Run(run.root, remedies.apply(run.recipe, plan.remedies), run.progress)
    return Run(run.root, with_earlier_memory_changes(changed), run.progress)


def with_earlier_memory_changes(run: Run) -> Recipe:
    """The recipe with the memory settings of the one in the run directory, if the two differ in nothing else."""
    file = run.root / "recipe.yaml"
    if not file.is_file():
        return run.recipe
    new, earlier = run.recipe, load(file)
    train: dict[str, Any] = {
        "activation_offloading": new.train.activation_offloading or earlier.train.activation_offloading
    }
    if new.train.gradient_checkpointing in (False, "auto"):
        train["gradient_checkpointing"] = earlier.train.gradient_checkpointing
    changes = {
        "micro_batches": max(new.micro_batches, earlier.micro_batches),
        "train": new.train.model_copy(update=train),
    }
    merged = new.model_copy(update=changes)
    return merged if merged == earlier else new


def train(run: Run, attempt: Callable[[Run], None], rekey: Callable[[Run], None], device: Device | None = None) -> Run:
    """Train. When memory runs out, change one more setting and resume from the last checkpoint. Returns the run with the final recipe.

    Args:
        attempt: runs the stage; raises OutOfMemory when memory runs out.
        rekey: re-stamps the checkpoints of a failed attempt with the key of the changed recipe.

    Raises:
        OutOfMemory: nothing is left to change.
    """
    while True:
        try:
            attempt(run)
            return run
        except OutOfMemory as error:
            recipe = settled(run)
            remedy = next_remedy(recipe, device or detect())
            if remedy is None:
                raise
            why = error.reason.partition(";")[0]
            run.progress.notify(f"train: {why}; resuming from the last checkpoint with {_described(remedy)}")
            run = Run(run.root, remedies.apply(recipe, [remedy]), run.progress)
            rekey(run)


def settled(run: Run) -> Recipe:
    """The recipe with the value of `auto` that an earlier attempt at training chose."""
    chosen = decisions(run.root / ".work" / "train").get(CHECKPOINTING)
    if chosen is None or run.recipe.train.gradient_checkpointing != "auto":
        return run.recipe
    return remedies.apply(run.recipe, [Remedy((f"{CHECKPOINTING}={str(chosen).lower()}",), 0, "")])


def next_remedy(recipe: Recipe, device: Device) -> Remedy | None:
    """The cheapest change that lowers the peak and keeps every optimizer step the same; None if there is none."""
    plan = plan_plan.plan(recipe, device=device)
    return next((remedy for remedy in plan_plan.alternatives(recipe, plan, device) if _resumable(remedy)), None)


def _resumable(remedy: Remedy) -> bool:
    return all(text.partition("=")[0] in RESUMABLE for text in remedy.set)


def _described(remedy: Remedy) -> str:
    return f"{' '.join(remedy.set)} (-{gib(remedy.saves_bytes)}; {remedy.cost})"


def check(recipe: Recipe, device: Device) -> None:
    """Check that the device supports the memory settings of the recipe.

    Raises:
        RecipeError: it does not.
    """
    if recipe.train.activation_offloading and not device.offloads:
        raise RecipeError(
            "train.activation_offloading=true moves activations from a GPU to the host's memory; on a CPU they are there already. "
            "Set train.activation_offloading=false; to save memory here, set train.gradient_checkpointing=true"
        )


# --- the message ------------------------------------------------------------------------------------------------------


def shortage(
    recipe: Recipe, stage: str, device: Device, planned: Mapping[str, int] = {}, measured: Mapping[str, int] = {}
) -> str:
    """The message for a stage that ran out of memory: which item exceeded its plan, by how much, and what to change next.

    `planned`, `measured`: bytes by item, for the items that can be measured separately.
    """
    try:
        plan = plan_plan.plan(recipe, device=device, stage=stage)
    except ModelError:  # a model of unknown shape cannot be planned for
        return "use a smaller batch, model or length"
    total = f"the plan was {gib(plan.peak_bytes)} of the {gib(plan.device_bytes)} on {plan.device}"
    text = f"{total}; {over(planned, measured)}" if measured else total
    if stage == "train" and (remedy := next_remedy(recipe, device)):
        return f"{text}; try {_set(remedy)}, or `qkit run --fit`, which sets it and resumes from the last checkpoint"
    remedy = next(iter(plan_plan.alternatives(recipe, plan, device)), None)
    return f"{text}; " + (f"try {_set(remedy)}" if remedy else "use a smaller model or a larger device")


def over(planned: Mapping[str, int], measured: Mapping[str, int]) -> str:
    """Which item exceeded its plan, and by how much. Arguments are bytes by item; items that only one of them has are ignored."""
    excess = {name: measured[name] - planned[name] for name in planned if name in measured}
    worst = max(excess, key=lambda name: excess[name], default=None)
    if worst is None or excess[worst] <= 0:
        return "no item exceeded its plan"
    return f"{worst} took {gib(measured[worst])}, {gib(excess[worst])} more than the {gib(planned[worst])} planned"


def _set(remedy: Remedy) -> str:
    return f"{' '.join(f'--set {text}' for text in remedy.set)} (-{gib(remedy.saves_bytes)})"
