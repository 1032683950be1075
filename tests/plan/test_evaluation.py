"""What the plan says of evaluation during training: how often, how long, and the memory of answers."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from qkit.plan import gpus, screen, sheet, speed
from qkit.plan import plan as plan_plan
from qkit.recipe import validation
from qkit.recipe.load import from_dict
from qkit.recipe.schema import Recipe

RTX_4090 = gpus.device("rtx-4090")
LENGTHS = [[64, 100, 3000], [128, 50, 2000]]  # 12,800 tokens


def recipe(**train: Any) -> Recipe:
    settings = {
        "task": "chat",
        "model": {"source": "HuggingFaceTB/SmolLM2-135M-Instruct"},
        "data": {
            "train": [{"source": "rows.jsonl"}],
            "validation": [{"source": "v.jsonl"}],
            "max_length": 128,
            "batch_tokens": 256,
        },
        "train": train,
    }
    return from_dict(settings, (), "the test")


def planned(how: Recipe, rows: tuple[int, int] | None = (20, 1500)) -> sheet.Sheet:
    return sheet.sheet(how, RTX_4090, LENGTHS, validation_rows=rows)


def test_the_time_of_evaluations_is_a_share_of_that_of_training() -> None:
    how = recipe(num_train_epochs=4, gradient_checkpointing=False)
    made = planned(how)
    assert made.evaluation is not None and made.pace.seconds is not None
    assert (made.evaluation.evaluations, made.evaluation.tokens) == (4, 1500)
    share = made.evaluation.seconds / made.pace.seconds if made.evaluation.seconds else 0
    assert share == pytest.approx(4 * 1500 / (4 * 12800) * speed.forward_share(how, None), rel=1e-6)  # type: ignore[arg-type]
    drawn = io.StringIO()
    Console(width=300, file=drawn).print(screen.screen(made))
    assert "4 times, training evaluates the validation rows, 1,500 tokens: that takes at least" in drawn.getvalue()


def test_fewer_rows_are_fewer_tokens_and_no_rows_are_unknown() -> None:
    few = planned(recipe(eval_rows=5, max_steps=10, eval_steps=3, eval_on_start=True)).evaluation
    assert few is not None and (few.evaluations, few.tokens) == (5, 375)  # 0, 3, 6, 9, 10
    unknown = planned(recipe(), None).evaluation
    assert unknown is not None and unknown.tokens is None and unknown.seconds is None
    assert planned(recipe(eval_strategy="no")).evaluation is None


@pytest.mark.parametrize(
    ("steps", "total", "times"), [(5, 20, 4), (5, 21, 5), (0.25, 20, 4), (0.3, 10, 4), (100, 20, 1)]
)
def test_evaluations_are_counted_with_that_after_the_last_step(steps: float, total: int, times: int) -> None:
    train = recipe(eval_steps=steps).train
    each = validation.interval(train, total, None)
    assert each is not None
    assert validation.evaluations(train, total, None) == len({*range(each, total + 1, each), total}) == times


def test_epochs_of_a_training_of_so_many_steps_are_counted() -> None:
    counted = planned(recipe(max_steps=100)).evaluation  # an epoch has (100 x 64 + 50 x 128) / 256 = 50 batches
    assert counted is not None and counted.evaluations == 2
    assert planned(recipe(max_steps=100), (0, 0)).evaluation is None


def test_answers_of_an_evaluation_count_where_they_take_more_than_a_step() -> None:
    peaks = []
    for rows in (0, 8):
        how = recipe(eval_score_rows=rows, gradient_checkpointing=True)
        how = how.model_copy(update={"evaluate": how.evaluate.model_copy(update={"batch_size": 512})})
        made = plan_plan.plan(how, device=RTX_4090)
        peaks.append(made.peak_bytes)
    activations = next(item for item in made.items if item.name == "activations")
    assert peaks[1] > peaks[0] and "answers to validation rows" in activations.formula
    assert {part.name for part in activations.parts} == {"kv_cache", "prefill"}
