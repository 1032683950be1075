"""Predicts the held-out rows with an open model, and grades the predictions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from qkit.measure import scores
from qkit.measure.evidence import recorded_settings
from qkit.measure.held_out import HeldOut
from qkit.plugins.runtime import Scores
from qkit.plugins.task import Prediction, open_task
from qkit.run.directory import Run


@dataclass(frozen=True)
class Answers:
    """For each held-out row, or those that belong together: the prediction, and how the task grades it."""

    predictions: tuple[Prediction, ...]
    grades: scores.Grades

    @property
    def texts(self) -> tuple[str, ...]:
        """The predictions, for people."""
        return tuple(prediction.text for prediction in self.predictions)


def answered(
    run: Run,
    runtime: Scores,
    held_out: HeldOut,
    what: str = "generate",
    tuned: Mapping[str, float] | None = None,
) -> Answers:
    """Predict the held-out rows with an open model and grade the predictions, by the recipe's settings.

    `what`: progress bar label. `tuned`: settings from `Task.tune`; by default those that `evaluate` recorded of the trained model.
    """
    task = open_task(run.recipe.task)
    settings = recorded_settings(run) if tuned is None else tuned
    predictor = task.predictor(run.recipe, run.need("data", "summary.json").parent, settings)
    with run.progress.bar(what, len(held_out.rows)) as bar:
        predictions = predictor.predict(runtime, held_out.rows, bar.advance)
    grades = scores.grade([one.text for one in predictions], held_out, task, run.recipe.evaluate)
    return Answers(tuple(predictions), grades)
