"""Predicts the held-out rows with an open model, and grades the predictions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from qkit.measure import scores
from qkit.measure.held_out import HeldOut
from qkit.plugins import own_metrics
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
    settings = run.tuned() if tuned is None else tuned
    predictor = task.predictor(run.recipe, run.need("data", "summary.json").parent, settings)
    with run.progress.bar(what, len(held_out.rows)) as bar:
        predictions = predictor.predict(runtime, held_out.rows, bar.advance)
    grades = scores.grade([one.text for one in predictions], held_out, task, run.recipe.evaluate)
    return Answers(tuple(predictions), grades)


def further_figures(run: Run, answers: Answers, held_out: HeldOut) -> Mapping[str, Any]:
    """The task's figures beside the score, and those of evaluate.metrics, with their intervals: name -> {value, low, high}."""
    section, data, seed = run.recipe.evaluate, run.need("data", "summary.json").parent, run.recipe.seed
    own = own_metrics.figures(section.metrics, answers.texts, held_out.references, section.confidence, seed)
    figures = open_task(run.recipe.task).metrics(answers.predictions, held_out.references, data, section, seed)
    return {**figures, **own}


def scored(run: Run, answers: Answers, held_out: HeldOut, heldout_loss: float) -> dict[str, Any]:
    """An artifact's entry in a table of scores: its score, and as `metrics` the further figures that the task has."""
    score = asdict(scores.score(answers.grades, heldout_loss, run.recipe.evaluate, run.recipe.seed))
    further = further_figures(run, answers, held_out)
    return {**score, "metrics": further} if further else score
