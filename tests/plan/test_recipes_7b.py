"""The 7B recipes load, fit on one card of 24 GB to train and to serve, and say what to do on one of 8."""

from __future__ import annotations

import pytest

from helpers import paths
from qkit.plan import gpus
from qkit.plan import plan as plan_plan
from qkit.recipe.load import load
from qkit.recipe.schema import Recipe

RECIPES = sorted(paths.RECIPES.glob("*-24gb.yaml"))


@pytest.fixture(params=RECIPES, ids=lambda path: path.stem)
def recipe(request: pytest.FixtureRequest) -> Recipe:
    return load(request.param)


def test_there_are_three() -> None:
    assert [path.stem for path in RECIPES] == ["llama-3.1-8b-24gb", "mistral-7b-24gb", "qwen2.5-7b-24gb"]


@pytest.mark.parametrize("stage", ["train", "serve"])
@pytest.mark.parametrize("card", ["rtx-4090", "rtx-3090"])
def test_fits_on_24_gb(recipe: Recipe, card: str, stage: str) -> None:
    made = plan_plan.plan(recipe, device=gpus.device(card), stage=stage)
    assert made.fits, plan_plan.refusal(made)


def test_does_not_fit_on_8_gb_and_the_remedy_is_enough(recipe: Recipe) -> None:
    made = plan_plan.plan(recipe, device=plan_plan.device_for(None, "8GiB"))
    text = plan_plan.refusal(made)
    assert not made.fits
    assert text.startswith(f"needs {made.peak_bytes / 2**30:.1f} GiB; the 8GiB card has 7.8 GiB. Largest: ")
    assert ". Try " in text
    assert made.peak_bytes - sum(remedy.saves_bytes for remedy in made.remedies) <= made.device_bytes


def test_quantizes_twice_and_checkpoints_where_there_is_no_room(recipe: Recipe) -> None:
    assert recipe.quantization.bnb_4bit_use_double_quant
    found = [plan_plan.checkpointing(recipe, gpus.device(card)).on for card in ("rtx-4090", "h200")]
    assert found == [True, False]
    assert recipe.lora.target_modules == "all-linear"


def test_pads_with_a_token_that_ends_no_turn(recipe: Recipe) -> None:
    assert recipe.model.pad_token
    assert recipe.model.pad_token not in {"<|im_end|>", "<|eot_id|>", "</s>"}


def test_answers_fit_the_server(recipe: Recipe) -> None:
    assert recipe.serve.max_model_len >= recipe.data.max_length + recipe.evaluate.max_new_tokens
