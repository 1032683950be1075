"""The stage `evaluate`: the task's score and the held-out loss of the base model and of the adapter, on the same rows with the same prompts.

evaluate/scores.json         metric, and per artifact: score, interval, rows, held-out loss, the task's further figures; and what was tuned
evaluate/predictions.jsonl   every prediction, right or wrong, with its token ids, or the probabilities of the most likely labels
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qkit.core.device import detect
from qkit.core.errors import DataError
from qkit.core.files import write_json, write_text
from qkit.measure import held_out as measure_held_out
from qkit.measure import scores as measure_scores
from qkit.measure.answers import answered, scored
from qkit.model import source
from qkit.plugins.runtime import Scores, open_runtime
from qkit.plugins.task import open_task
from qkit.run.directory import Run
from qkit.tracking.reporting import add_scores


def run(run: Run, out: Path) -> None:
    """Score the base model, then the adapter on it."""
    held_out = measure_held_out.held_out_of(run)
    if not held_out.rows:
        raise DataError("data.test has no rows, so the result cannot be evaluated: give it a source")
    task = open_task(run.recipe.task)
    scores, predictions, grades = {}, [], {}
    tuned: Mapping[str, float] = {}
    for name in (task.BASELINE, run.recipe.trained_as):
        run.progress.notify(f"evaluate: {name}")
        with _opened(run, name) as runtime:
            tuned = task.tune(runtime, run.recipe, run.need("data", "summary.json").parent)
            scores[name], lines, grades[name] = _evaluate(run, name, runtime, held_out, tuned)
        predictions += lines
    section = run.recipe.evaluate
    table = {
        "metric": task.METRIC,
        "confidence": section.confidence,
        "interval": f"percentile bootstrap over rows, {measure_scores.RESAMPLES} resamples; exact binomial where all rows agree",
        "scores": scores,
        "gain": _gain(run, grades),
        **({"tuned": tuned} if tuned else {}),  # with the trained model, which comes last
    }
    write_json(out / "scores.json", table)
    write_text(out / "predictions.jsonl", "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in predictions))
    add_scores(run, table, task.BASELINE)


def _opened(run: Run, name: str) -> Any:
    """The model of this name: the trained one, or what it is compared with."""
    task = open_task(run.recipe.task)
    if name == task.BASELINE and not task.HEAD.generates:
        return task.baseline(run.need("data", "summary.json").parent)
    trained = None if name == task.BASELINE else run.trained()
    folder = source.resolve(run.recipe.model)
    return open_runtime("transformers", folder, detect(), recipe=run.recipe, adapter=trained)


def _gain(run: Run, grades: Mapping[str, measure_scores.Grades]) -> dict[str, float]:
    """Points that the trained model gains over the baseline on the same rows, with their interval."""
    before, after = grades[open_task(run.recipe.task).BASELINE], grades[run.recipe.trained_as]
    return measure_scores.paired_gain(before, after, run.recipe.evaluate.confidence, run.recipe.seed)


def _evaluate(
    run: Run, name: str, runtime: Scores, held_out: measure_held_out.HeldOut, tuned: Mapping[str, float]
) -> tuple[dict[str, Any], list[dict[str, object]], measure_scores.Grades]:
    """One artifact's score, its predictions as lines of predictions.jsonl, and their grades."""
    task = open_task(run.recipe.task)
    answers = answered(run, runtime, held_out, f"generate with {name}", tuned)
    with run.progress.bar(f"held-out loss of {name}", len(held_out.rows)) as bar:
        losses = measure_held_out.heldout_targets(task, runtime, held_out, bar.advance)
    lines: list[dict[str, object]] = [
        {
            "artifact": name,
            "row": index,
            "prompt": task.question(record),
            "prediction": prediction.text,
            **prediction.details,
            "reference": task.answer(record),
            "correct": right,
        }
        for index, (record, prediction, right) in enumerate(
            zip(held_out.asked, answers.predictions, answers.grades.right, strict=True)
        )
    ]
    return scored(run, answers, held_out, measure_scores.mean_loss(losses)), lines, answers.grades
