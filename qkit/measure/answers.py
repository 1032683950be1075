"""Predicts the held-out rows with an open model, and grades the predictions."""

from __future__ import annotations

from dataclasses import dataclass

from qkit.measure import scores
from qkit.measure.held_out import HeldOut
from qkit.plugins.runtime import Scores
from qkit.plugins.task import Prediction, open_task
from qkit.run.directory import Run


@dataclass(frozen=True)
class Answers:
    """For each held-out row: the prediction, and how the task grades it."""

    predictions: tuple[Prediction, ...]
    grades: scores.Grades

    @property
    def texts(self) -> tuple[str, ...]:
        """The predictions, for people."""
        return tuple(prediction.text for prediction in self.predictions)


def answered(run: Run, runtime: Scores, held_out: HeldOut, what: str = "generate") -> Answers:
    """Predict the held-out rows with an open model and grade the predictions, by the recipe's settings. `what`: progress bar label."""
    task = open_task(run.recipe.task)
    predictor = task.predictor(run.recipe, run.need("data", "summary.json").parent)
    with run.progress.bar(what, len(held_out.rows)) as bar:
        predictions = predictor.predict(runtime, held_out.rows, bar.advance)
    grades = scores.grade([one.text for one in predictions], held_out, task, run.recipe.evaluate)
    return Answers(tuple(predictions), grades)
