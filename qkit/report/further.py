"""A task's figures beside the score: those that the screen, the card and `qkit show --json` have, and the labels that are worst."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qkit.core.figures import ABSENT, fixed
from qkit.core.files import read_lines
from qkit.measure.evidence import read_evidence
from qkit.plugins.sections import Evaluated, Figure, Section
from qkit.plugins.task import Task, open_task
from qkit.recipe.registry import BASELINES
from qkit.run.directory import Run

WORST = 5  # labels in `qkit show`
ENDS = ("value", "low", "high")


def figures_of(run: Run, artifact: str, entry: Mapping[str, Any]) -> dict[str, Any]:
    """`metrics` and `worst_labels` of an artifact, from its entry in a table of scores; {} for a task without further figures.

    The baseline, which always predicts one label, has no worst ones.
    """
    measured = entry.get("metrics")
    if not measured:
        return {}
    task = open_task(run.recipe.task)
    own = (Figure(name, name.partition(":")[2], name, share=False) for name in run.recipe.evaluate.metrics)
    metrics = {
        figure.name: _shown(figure, measured[figure.name])
        for figure in (*task.FIGURES, *own)
        if figure.name in measured
    }
    worst = [] if artifact in BASELINES else _worst(task, measured)
    return {**({"metrics": metrics} if metrics else {}), **({"worst_labels": worst} if worst else {})}


def _shown(figure: Figure, values: Mapping[str, float | None]) -> dict[str, Any]:
    return {"title": figure.title, "share": figure.share, **{end: values.get(end) for end in ENDS}}


def _worst(task: Task, measured: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The labels with the lowest figure, and of equal ones that with more rows first. A label without a held-out row has none."""
    if (figure := task.LABEL_FIGURE) is None:
        return []
    by_label = {
        name.partition(":")[2]: values for name, values in measured.items() if name.startswith(f"{figure.name}:")
    }
    support = {label: round((measured.get(f"support:{label}") or {}).get("value") or 0) for label in by_label}
    rows = [
        {"label": label, "support": support[label], **_shown(figure, values)}
        for label, values in by_label.items()
        if support[label] and values["value"] is not None
    ]
    return sorted(rows, key=lambda row: (row["value"], -row["support"]))[:WORST]


def sections(run: Run) -> Sequence[Section]:
    """The sections that the run's task adds to the report, without those that have nothing to show."""
    evidence = read_evidence(run.root)
    entry = evidence.scores.get(run.recipe.trained_as, {})
    lines = read_lines(run.folder("evaluate") / "predictions.jsonl")
    trained = [line for line in lines if line["artifact"] == run.recipe.trained_as]
    evaluated = Evaluated(trained, entry.get("metrics") or {}, evidence.confidence, run.folder("data"))
    return [section for section in open_task(run.recipe.task).sections(evaluated) if section.parts]


def text_of(values: Mapping[str, Any]) -> str:
    """The figure: of 100 with one decimal if it is a share, else with three."""
    return _text(values, values["value"], 1)


def interval_of(values: Mapping[str, Any]) -> str:
    """Its interval, a share's without decimals."""
    if values["low"] is None or values["high"] is None:
        return ABSENT
    return f"{_text(values, values['low'], 0)}–{_text(values, values['high'], 0)}"


def _text(values: Mapping[str, Any], value: float | None, decimals: int) -> str:
    if value is None:
        return ABSENT
    return fixed(100 * value, decimals) if values["share"] else fixed(value, 3)
