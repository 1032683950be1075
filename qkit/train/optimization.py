"""Checks of schedule and optimizer before a model is loaded, and the size of a checkpoint, of which the optimizer's state is a part."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qkit.core.device import Device
from qkit.core.errors import MissingExtra, RecipeError
from qkit.core.files import read_json
from qkit.plan._optimizer_state import FP32, state_bytes, tensors_of
from qkit.plan.sheet import checked_steps
from qkit.recipe import optimizers, schedule
from qkit.recipe.schema import WHOLE
from qkit.run.directory import Run

if TYPE_CHECKING:
    from qkit.recipe.schema import Recipe
    from qkit.recipe.training import Train


def check(run: Run, device: Device) -> None:
    """Check what needs no model: the optimizer's package, and the schedule, if the rows' lengths tell the number of steps.

    Raises:
        MissingExtra: the optimizer is in a package that is not installed.
        RecipeError: the optimizer does not run on this device, or training is too short for its schedule.
    """
    recipe = run.recipe
    if (package := optimizers.missing(recipe.train.optim)) is not None:
        raise MissingExtra(
            f"train.optim={recipe.train.optim} is in a package that is not installed: `pip install {package.pip}`; or use another "
            "optimizer, such as adamw_torch",
            package=package.pip,
        )
    if not device.has_gpu and (module := optimizers.kernels_of_a_gpu(recipe.train.optim)):
        raise RecipeError(
            f"train.optim={recipe.train.optim} uses the GPU kernels of {module} where that is installed, as it is here, and this device is a "
            f"CPU: use another optimizer, such as adamw_torch, or `pip uninstall {module}`"
        )
    if not device.has_gpu and recipe.train.optim.startswith("paged_"):
        run.progress.notify(
            f"train: {recipe.train.optim} is not paged on a CPU; its state takes the memory that the plan shows"
        )
    if not recipe.data.packing:  # packs may turn out not to be isolated, and then the steps are others
        checked_steps(recipe, read_json(run.need("data", "summary.json")).get("lengths", []))


def follow_metric(trainer: Any, train: Train) -> None:
    """Have the rate fall with the figure that tells the best step, if the recipe's schedule follows one. The trainer evaluates rows."""
    if schedule.follows_metric(train):
        trainer.args.lr_scheduler_type = train.lr_scheduler_type
        mode = "max" if trainer.args.greater_is_better else "min"
        trainer.args.lr_scheduler_kwargs = {**train.lr_scheduler_kwargs, "mode": mode}


def checkpoint_bytes(recipe: Recipe, model: Any) -> int:
    """Bytes of a checkpoint: what is trained, in fp32, or all of a whole model; and the optimizer's state."""
    tensors = tensors_of(model)
    weights = FP32 * sum(tensor.count for tensor in tensors)
    if recipe.method in WHOLE:  # it holds the frozen weights, too
        weights = sum(parameter.nbytes for parameter in model.parameters())
    return weights + state_bytes(recipe.train, tensors)
