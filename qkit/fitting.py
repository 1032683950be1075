"""`qkit run --fit`: change the recipe until training fits, and once more each time that it runs out of memory all the same.

What was changed at the start is what the plan advises. A restart goes on from the last checkpoint, so only what leaves the batches and the
shape of the adapter as they are is changed then: the same rows in the same order make the same optimizer steps.
"""

from __future__ import annotations

from collections.abc import Callable

from qkit import plan
from qkit.device import Device, detect
from qkit.errors import DoesNotFit, OutOfMemory
from qkit.recipe import Recipe
from qkit.remedies import Remedy
from qkit.run import Run

RESUMABLE = ("micro_batches", "train.gradient_checkpointing", "train.activation_offloading")


def fitted(run: Run, device: Device | None = None) -> Run:
    """The run with its recipe changed so that training fits the device, by the shortest list that does it.

    Raises:
        DoesNotFit: nothing that can be changed is enough.
    """
    made = plan.plan(run.recipe, device=device)
    if made.fits:
        return run
    left = made.peak_bytes - sum(remedy.saves_bytes for remedy in made.remedies)
    if left > made.device_bytes:
        raise DoesNotFit(f"{run.root}: training {plan.refusal(made)}")
    for remedy in made.remedies:
        run.progress.say(f"fit: {_said(remedy)}")
    return Run(run.root, plan.apply(run.recipe, made.remedies), run.progress)


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
            remedy = next_remedy(run.recipe, device or detect())
            if remedy is None:
                raise
            run.progress.say(f"train: {error.reason}; going on from the last checkpoint with {_said(remedy)}")
            run = Run(run.root, plan.apply(run.recipe, [remedy]), run.progress)
            rekey(run)


def next_remedy(recipe: Recipe, device: Device) -> Remedy | None:
    """The cheapest change that lowers the peak and leaves every optimizer step as it was; None when there is none left."""
    made = plan.plan(recipe, device=device)
    return next((remedy for remedy in plan.alternatives(recipe, made, device) if _resumable(remedy)), None)


def _resumable(remedy: Remedy) -> bool:
    return all(text.partition("=")[0] in RESUMABLE for text in remedy.set)


def _said(remedy: Remedy) -> str:
    return f"{' '.join(remedy.set)} (-{remedy.saves_bytes / 2**30:.1f} GiB; {remedy.price})"
