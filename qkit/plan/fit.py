"""`qkit run --fit`: change the recipe until training fits, and once more each time that it runs out of memory all the same.

What was changed at the start is what the plan advises. A restart goes on from the last checkpoint, so only what leaves the batches and the
shape of the adapter as they are is changed then: the same rows in the same order make the same optimizer steps.
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
    """The run with its recipe changed so that training fits the device, by the shortest list that does it.

    What an earlier `--fit` of the same run had to change as well, since its training ran out of memory, stays changed.

    Raises:
        DoesNotFit: nothing that can be changed is enough.
    """
    run = Run(run.root, _as_it_held(run), run.progress)
    made = plan_plan.plan(run.recipe, device=device)
    if made.fits:
        return run
    left = made.peak_bytes - sum(remedy.saves_bytes for remedy in made.remedies)
    if left > made.device_bytes:
        raise DoesNotFit(f"{run.root}: training {plan_plan.refusal(made)}")
    for remedy in made.remedies:
        run.progress.say(f"fit: {_said(remedy)}")
    changed = Run(run.root, remedies.apply(run.recipe, made.remedies), run.progress)
    return Run(run.root, _as_it_held(changed), run.progress)


def _as_it_held(run: Run) -> Recipe:
    """The recipe, with what the one in the run directory has changed for memory, if that is all that tells them apart."""
    file = run.root / "recipe.yaml"
    if not file.is_file():
        return run.recipe
    wanted, held = run.recipe, load(file)
    train: dict[str, Any] = {
        "activation_offloading": wanted.train.activation_offloading or held.train.activation_offloading
    }
    if wanted.train.gradient_checkpointing in (False, "auto"):
        train["gradient_checkpointing"] = held.train.gradient_checkpointing
    both = {
        "micro_batches": max(wanted.micro_batches, held.micro_batches),
        "train": wanted.train.model_copy(update=train),
    }
    merged = wanted.model_copy(update=both)
    return merged if merged == held else wanted


def train(run: Run, attempt: Callable[[Run], None], rekey: Callable[[Run], None], device: Device | None = None) -> Run:
    """Train; out of memory, change one thing more and go on from the last checkpoint. Returns the run with the recipe that held.

    Args:
        attempt: runs the stage; it raises OutOfMemory when memory ran out.
        rekey: makes what a failed attempt has left count as the work of the changed recipe.

    Raises:
        OutOfMemory: there is nothing left to change.
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
            run.progress.say(f"train: {why}; going on from the last checkpoint with {_said(remedy)}")
            run = Run(run.root, remedies.apply(recipe, [remedy]), run.progress)
            rekey(run)


def settled(run: Run) -> Recipe:
    """The recipe with what an attempt at its training has decided, where there was one."""
    found = decisions(run.root / ".work" / "train").get(CHECKPOINTING)
    if found is None or run.recipe.train.gradient_checkpointing != "auto":
        return run.recipe
    return remedies.apply(run.recipe, [Remedy((f"{CHECKPOINTING}={str(found).lower()}",), 0, "")])


def next_remedy(recipe: Recipe, device: Device) -> Remedy | None:
    """The cheapest change that lowers the peak and leaves every optimizer step as it was; None when there is none left."""
    made = plan_plan.plan(recipe, device=device)
    return next((remedy for remedy in plan_plan.alternatives(recipe, made, device) if _resumable(remedy)), None)


def _resumable(remedy: Remedy) -> bool:
    return all(text.partition("=")[0] in RESUMABLE for text in remedy.set)


def _said(remedy: Remedy) -> str:
    return f"{' '.join(remedy.set)} (-{gib(remedy.saves_bytes)}; {remedy.price})"


def check(recipe: Recipe, device: Device) -> None:
    """See that the device can do what the recipe saves memory with.

    Raises:
        RecipeError: it cannot.
    """
    if recipe.train.activation_offloading and not device.offloads:
        raise RecipeError(
            "train.activation_offloading=true moves activations from a card to the host's memory; training on a CPU has them there "
            "already. Set train.activation_offloading=false; train.gradient_checkpointing=true is what saves memory here"
        )


# --- the message ------------------------------------------------------------------------------------------------------


def shortage(
    recipe: Recipe, stage: str, device: Device, planned: Mapping[str, int] = {}, measured: Mapping[str, int] = {}
) -> str:
    """For the message of a stage that ran out of memory: which line was over its plan, by how much, and what to change next.

    `planned`, `measured`: bytes by line, as far as they can be told apart.
    """
    try:
        made = plan_plan.plan(recipe, device=device, stage=stage)
    except ModelError:  # a model whose shape is not known has no plan
        return "take a smaller batch, model or length"
    total = f"the plan was {gib(made.peak_bytes)} of the {gib(made.device_bytes)} on {made.device}"
    text = f"{total}; {over(planned, measured)}" if measured else total
    if stage == "train" and (remedy := next_remedy(recipe, device)):
        return f"{text}; try {_set(remedy)}, or `qkit run --fit`, which does it and goes on from the last checkpoint"
    remedy = next(iter(plan_plan.alternatives(recipe, made, device)), None)
    return f"{text}; " + (f"try {_set(remedy)}" if remedy else "take a smaller model or a larger device")


def over(planned: Mapping[str, int], measured: Mapping[str, int]) -> str:
    """Which line was over its plan, and by how much. Bytes by line; lines that only one of them has are left out."""
    excess = {name: measured[name] - planned[name] for name in planned if name in measured}
    worst = max(excess, key=lambda name: excess[name], default=None)
    if worst is None or excess[worst] <= 0:
        return "no line was above its plan"
    return f"{worst} took {gib(measured[worst])}, {gib(excess[worst])} more than the {gib(planned[worst])} planned"


def _set(remedy: Remedy) -> str:
    return f"{' '.join(f'--set {text}' for text in remedy.set)} (-{gib(remedy.saves_bytes)})"
