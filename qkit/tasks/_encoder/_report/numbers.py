"""What a task on numbers shows: its errors and correlations, predicted against true numbers, and the texts with the largest errors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qkit.core.figures import ABSENT
from qkit.plugins.sections import Cell, Column, Evaluated, Figure, Plot, Section, Series, Table
from qkit.tasks._encoder._report.labels import ERRORS, row_and_text

# R2 is the score
NUMBERS = (
    Figure("rmse", "root mean squared error", "rmse", share=False, is_error=True),
    Figure("mae", "mean absolute error", "mae", share=False, is_error=True),
    Figure("pearson", "Pearson correlation", "pearsonr", share=False),
    Figure("spearman", "Spearman correlation", "spearmanr", share=False),
)
POINTS = 2000  # of a plot: more would cover each other, and make the page large


def sections_of_numbers(evaluated: Evaluated, names: Sequence[str]) -> list[Section]:
    """The sections; none without predictions. `names`: of the numbers of a row, in their order."""
    if not evaluated.lines:
        return []
    true, said = (_columns(evaluated.lines, key) for key in ("reference", "prediction"))
    plots = [
        scatter(name if len(true) > 1 else "", list(zip(*pair, strict=True)))
        for name, *pair in zip(names or [str(place) for place in range(len(true))], true, said, strict=True)
    ]
    note = "A point on the line is exactly right; one above it was predicted too high."
    tables = [figures_of_each(evaluated.metrics, names)] if len(true) > 1 else []
    return [
        Section("numbers", "Predicted numbers", (note,), [*tables, *plots]),
        Section("errors", "Errors", ("A large error is often a wrong number in the data.",), [worst(evaluated.lines)]),
    ]


def _columns(lines: Sequence[Mapping[str, Any]], key: str) -> list[tuple[float, ...]]:
    """The numbers of all rows, by place."""
    return list(zip(*(map(float, line[key].split()) for line in lines), strict=True))


def scatter(name: str, points: Sequence[tuple[float, float]]) -> Plot:
    """Predicted against true numbers; of many rows evenly spread ones. `name`: of the number, if there are several."""
    step = -(-len(points) // POINTS)
    shown = points[::step]
    ends = (min(map(min, shown)), max(map(max, shown)))
    every = "each row" if step == 1 else f"one row of {step}"
    what = f"Predicted against true {name or 'numbers'}"
    words = f"{len(points)} rows, true from {min(x for x, _ in points):.4g} to {max(x for x, _ in points):.4g}, predicted from "
    return Plot(
        f"scatter-{name}-chart".replace(" ", "-") if name else "scatter-chart",
        what,
        f"{words}{min(y for _, y in points):.4g} to {max(y for _, y in points):.4g}",
        f"{what}: a point for {every}.",
        ("true", "predicted"),
        [Series("exactly right", [(end, end) for end in ends], joined=True), Series("rows", shown, strong=True)],
    )


def figures_of_each(metrics: Mapping[str, Any], names: Sequence[str]) -> Table:
    """The figures of each number of a row."""
    rows: list[list[Cell | str]] = [
        [name, *(_cell(metrics.get(f"{figure.name}:{name}")) for figure in NUMBERS)] for name in names
    ]
    columns = [Column("Number", "name"), *(Column(figure.title.capitalize()) for figure in NUMBERS)]
    return Table("Figures of each number, with intervals", columns, rows, sortable=True, on_card=True)


def _cell(entry: Mapping[str, float | None] | None) -> Cell:
    value, low, high = ((entry or {}).get(end) for end in ("value", "low", "high"))
    if value is None:
        return Cell(None, ABSENT)
    return Cell(value, f"{value:.3f}" if low is None or high is None else f"{value:.3f} ({low:.3f}–{high:.3f})")


def worst(lines: Sequence[Mapping[str, Any]]) -> Table:
    """The texts with the largest errors; of several numbers, their largest difference counts."""
    ranked = sorted(((_error(line), line) for line in lines), key=lambda pair: -abs(pair[0]))
    rows = [
        [*row_and_text(line), _short(line["reference"]), _short(line["prediction"]), Cell(error, f"{error:+.4g}")]
        for error, line in ranked[:ERRORS]
    ]
    columns = [Column("Row"), Column("Text", "text"), Column("True", "name"), Column("Predicted", "name")]
    return Table(
        f"Largest errors first: {len(rows)} of {len(lines)} texts", [*columns, Column("Predicted − true")], rows
    )


def _error(line: Mapping[str, Any]) -> float:
    true, said = (map(float, line[key].split()) for key in ("reference", "prediction"))
    return max((one - other for one, other in zip(said, true, strict=True)), key=abs)


def _short(numbers: str) -> str:
    return " ".join(f"{float(number):.4g}" for number in numbers.split())
