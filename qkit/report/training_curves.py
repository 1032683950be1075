"""The charts of a training: its losses, what the validation rows gave, the learning rate, and the norm of the gradient."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from qkit.core import files
from qkit.plugins.task import open_task
from qkit.run import curves
from qkit.run.directory import Run

if TYPE_CHECKING:
    from markupsafe import Markup

    Charts = Iterator[tuple[str, Markup]]
    Lines = Sequence[Mapping[str, Any]]

WIDE = 800  # CSS pixels of a chart that fills the column


def charts(run: Run) -> list[tuple[str, Markup]]:
    """The charts over the steps, each with its caption. Steps without a finite loss are counted."""
    logged, metrics = _logged(run), steps(run)
    validation = files.read(run.folder("train") / "validation.json") or {}
    drawn = [*_losses(metrics, logged, validation), *_validated(logged), *_rate(metrics)]
    # A new head begins with large gradients.
    return drawn if open_task(run.recipe.task).HEAD.generates else [*drawn, *_gradients(metrics)]


def steps(run: Run) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl that are of steps, and not of an evaluation."""
    return [line for line in _logged(run) if "loss" in line]


def _logged(run: Run) -> list[dict[str, Any]]:
    return files.read_lines(run.folder("train") / "metrics.jsonl")


def points(lines: Lines, key: str) -> list[tuple[float, float]]:
    """(step, value) of each line that has one."""
    return [(line["step"], line[key]) for line in lines if line.get(key) is not None]


def _losses(metrics: Lines, logged: Lines, validation: Mapping[str, Any]) -> Charts:
    from qkit.report import svg

    loss, evaluated = points(metrics, "loss"), curves.evaluations(logged)
    if not loss:
        return
    window = max(3, len(loss) // 8 | 1)
    smooth = svg.smoothed(loss, window) if len(loss) > window else []
    caption = f"Loss by step; the line is the mean over {window} logged steps." if smooth else "Loss by step."
    if lost := len(metrics) - len(loss):
        caption += f" {lost} logged steps without a finite loss are left out."
    description = f"from {loss[0][1]:.3g} at step {loss[0][0]:g} to {loss[-1][1]:.3g} at step {loss[-1][0]:g}"
    if evaluated:
        caption += f" The dots are the loss of the validation rows.{_words(logged, validation)}"
        description += f"; of the validation rows from {evaluated[0][1]:.3g} to {evaluated[-1][1]:.3g}"
    chart = svg.curve(
        "loss-chart", "Training loss", description, loss, smooth, width=WIDE, height=260, beside=evaluated
    )
    yield caption, chart


def _words(logged: Lines, validation: Mapping[str, Any]) -> str:
    """The best step, and the gap between the two losses."""
    if not validation:
        return ""
    best = validation["best"]
    if best["value"] is None:
        return f" No evaluation gave a finite {validation['metric']}."
    text = f" The best {validation['metric']} is {best['value']:.4g}, at step {best['step']}"
    text += ", and the result is the model of that step." if validation["restored"] else "."
    if validation["last_step"] < validation["steps"]:
        text += f" Early stopping ended the training at step {validation['last_step']} of {validation['steps']}."
    gap = curves.gap(logged, validation["restored"])
    return f"{text} {gap[0].upper()}{gap[1:]}." if gap else text


def _validated(logged: Lines) -> Charts:
    """The score of the validation rows, and their losses by source."""
    from qkit.report import svg

    lines = [line for line in logged if "eval_loss" in line]
    if len(score := points(lines, "eval_score")) > 1:
        description = f"from {score[0][1]:.3g} to {score[-1][1]:.3g}, highest {max(y for _, y in score):.3g}"
        chart = svg.curve("validation-score-chart", "Validation score", description, score, [], width=WIDE, height=110)
        yield "Score of the validation rows, of 100.", chart
    names = sorted({name for line in lines for name in line if name.startswith("eval_loss/")})
    if names and len(lines) > 1:
        sources = [svg.Line(name.removeprefix("eval_loss/"), points(lines, name)) for name in names]
        description = "; ".join(f"{line.label} {line.points[0][1]:.3g} to {line.points[-1][1]:.3g}" for line in sources)
        axes = ("step", "loss")
        chart = svg.plane(
            "source-chart",
            "Validation loss by source",
            description,
            sources,
            axes=axes,
            width=WIDE,
            height=220,
            lowest=None,
        )
        yield "Loss of the validation rows by source.", chart


def _rate(metrics: Lines) -> Charts:
    from qkit.report import svg

    if rate := points(metrics, "learning_rate"):
        description = f"highest {max(y for _, y in rate):g}, last {rate[-1][1]:g}"
        chart = svg.curve("rate-chart", "Learning rate", description, rate, [], width=WIDE, height=110)
        yield "Learning rate by step.", chart


def _gradients(metrics: Lines) -> Charts:
    from qkit.report import svg

    if norm := points(metrics, "grad_norm"):
        description = f"highest {max(y for _, y in norm):.3g}, last {norm[-1][1]:.3g}"
        chart = svg.curve("gradient-chart", "Gradient norm", description, norm, [], width=WIDE, height=110)
        yield "Norm of the gradient by step, before it is clipped.", chart
