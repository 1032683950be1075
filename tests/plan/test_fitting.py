"""`--fit`: the recipe is changed until training fits, and once more each time that memory runs out all the same."""

from __future__ import annotations

from pathlib import Path

import pytest

from qkit.core.device import Device
from qkit.core.errors import DoesNotFit, OutOfMemory
from qkit.core.figures import GIB, MIB
from qkit.core.files import write_json
from qkit.plan import fit, remedies
from qkit.plan import plan as plan_plan
from qkit.recipe.schema import Recipe
from qkit.run.directory import DECIDED, Run


def small_device(budget_bytes: int) -> Device:
    return Device("cuda", "Some GPU", budget_bytes, 1)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    recipe = Recipe.model_validate(
        {
            "task": "chat",
            "model": {"source": "HuggingFaceTB/SmolLM2-135M"},
            "data": {"batch_tokens": 16384, "max_length": 1024},
            "train": {"gradient_checkpointing": False},
        }
    )
    return Run(tmp_path, recipe)


def test_recipe_that_fits_is_left_alone(run: Run) -> None:
    assert fit.fitted(run, small_device(100 * GIB)).recipe == run.recipe


def test_recipe_is_changed_until_it_fits(run: Run) -> None:
    device = small_device(4 * GIB)
    assert not plan_plan.plan(run.recipe, device=device).fits
    fitted = fit.fitted(run, device).recipe
    assert plan_plan.plan(fitted, device=device).fits
    assert fitted.data == run.recipe.data
    assert fitted.lora == run.recipe.lora


def test_what_can_never_fit_is_refused_before_anything_is_done(run: Run) -> None:
    with pytest.raises(DoesNotFit, match="This still needs"):
        fit.fitted(run, small_device(500 * MIB))


def test_out_of_memory_goes_on_with_the_next_change_until_it_holds(run: Run) -> None:
    device, tried, rekeyed = small_device(100 * GIB), [], []
    true_need_bytes = 2500 * MIB  # the plan sees 100 GiB, and the card really has this

    def attempt(given: Run) -> None:
        tried.append(given.recipe)
        if plan_plan.plan(given.recipe, device=device).peak_bytes > true_need_bytes:
            raise OutOfMemory("train", given.root, given.log("train"), "CUDA out of memory")

    last = fit.train(run, attempt, lambda given: rekeyed.append(given.recipe), device)
    assert len(tried) > 2
    assert last.recipe == tried[-1]
    assert rekeyed == tried[1:]
    peaks = [plan_plan.plan(recipe, device=device).peak_bytes for recipe in tried]
    assert peaks == sorted(peaks, reverse=True)


def test_a_restart_changes_neither_the_rows_nor_the_adapter(run: Run) -> None:
    device, recipe = small_device(GIB), run.recipe
    while (remedy := fit.next_remedy(recipe, device)) is not None:
        recipe = remedies.apply(recipe, [remedy])
    assert recipe.micro_batches == 16
    assert recipe.train.gradient_checkpointing
    kept = ("data", "lora", "quantization", "seed")
    assert [getattr(recipe, name) for name in kept] == [getattr(run.recipe, name) for name in kept]
    assert recipe.train.optim == run.recipe.train.optim
    assert recipe.train.gradient_accumulation_steps == run.recipe.train.gradient_accumulation_steps


def test_when_nothing_is_left_to_change_the_error_gets_through(run: Run) -> None:
    def attempt(given: Run) -> None:
        raise OutOfMemory("train", given.root, given.log("train"), "CUDA out of memory")

    with pytest.raises(OutOfMemory, match="CUDA out of memory"):
        fit.train(run, attempt, lambda _: None, small_device(GIB))


def _with_auto(run: Run) -> Run:
    train = run.recipe.train.model_copy(update={"gradient_checkpointing": "auto"})
    return Run(run.root, run.recipe.model_copy(update={"train": train}), run.progress)


def test_checkpointing_that_was_decided_off_is_what_a_shortage_may_change(run: Run) -> None:
    """Decided by the attempt, whatever the plan of this process says; and what was changed then stays for the next `--fit`."""
    tried: list[Recipe] = []
    asked = _with_auto(run)
    (run.root / ".work/train").mkdir(parents=True)
    write_json(run.root / ".work/train" / DECIDED, {fit.CHECKPOINTING: False})

    def attempt(given: Run) -> None:
        tried.append(given.recipe)
        if given.recipe.train.gradient_checkpointing is not True:
            raise OutOfMemory("train", given.root, given.log("train"), "CUDA out of memory")

    held = fit.train(asked, attempt, lambda _: None, small_device(GIB))
    assert [recipe.train.gradient_checkpointing for recipe in tried][0 :: len(tried) - 1] == ["auto", True]
    held.save_recipe()
    again = fit.fitted(asked, small_device(100 * GIB))
    assert again.recipe == held.recipe


def test_a_shortage_where_layers_are_computed_twice_already_changes_something_else(run: Run) -> None:
    (run.root / ".work/train").mkdir(parents=True)
    write_json(run.root / ".work/train" / DECIDED, {fit.CHECKPOINTING: True})
    settled = fit.settled(_with_auto(run))
    assert settled.train.gradient_checkpointing is True
    remedy = fit.next_remedy(settled, small_device(100 * GIB))
    assert remedy is not None and fit.CHECKPOINTING not in remedy.set[0]
