"""What a task adds to the report, the screen and the model card of a run, as plain data: figures, tables and charts.

A task says what there is to show (`Task.FIGURES`, `Task.sections`); the report draws it without knowing the task.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Point = tuple[float, float]


@dataclass(frozen=True)
class Figure:
    """One of `Task.metrics` that is shown wherever a score is. `name`: there; `title`: for people; `metric`: its name on the hub.

    `average`: over labels, as scikit-learn names it; "" if it is no average. `share`: it runs from 0 to 1, and is shown as of 100.
    `is_error`: less is better.
    """

    name: str
    title: str
    metric: str
    average: str = ""
    share: bool = True
    is_error: bool = False


@dataclass(frozen=True)
class Evaluated:
    """What the stage `evaluate` left of the trained model. `lines`: its predictions.jsonl, by row; `metrics`: its `Task.metrics`, as recorded.

    `confidence`: of the intervals, None if not recorded; `data`: the data folder. Each may be empty in a run that is half way.
    """

    lines: Sequence[Mapping[str, Any]]
    metrics: Mapping[str, Mapping[str, float | None]]
    confidence: float | None
    data: Path


@dataclass(frozen=True)
class Cell:
    """A figure in a table: `text` is shown, rows are sorted by `value`. None is sorted last."""

    value: float | None
    text: str


@dataclass(frozen=True)
class Column:
    """`kind`: a name and a text stand on the left, a figure on the right; only a text is wrapped."""

    title: str
    kind: Literal["name", "figure", "text"] = "figure"


@dataclass(frozen=True)
class Table:
    """Rows of one cell per column. `sortable`: by the reader, with a click; `on_card`: the model card shows its first rows, too."""

    caption: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell | str]]
    sortable: bool = False
    on_card: bool = False


@dataclass(frozen=True)
class Matrix:
    """Counts by row and column, [rows, columns]; the shade of a cell is its share of the row. `axes`: what rows and columns are.

    A cell whose row and column have the same name is right, all others are errors.
    """

    name: str
    title: str
    caption: str
    axes: tuple[str, str]
    rows: Sequence[str]
    columns: Sequence[str]
    counts: Sequence[Sequence[int]]


@dataclass(frozen=True)
class Series:
    """Points of one kind in a plot; `joined`: by a line, without dots. `strong`: in the accent colour."""

    label: str
    points: Sequence[Point]
    joined: bool = False
    strong: bool = False


@dataclass(frozen=True)
class Bin:
    """How many rows have an x from `low` to `high`."""

    low: float
    high: float
    rows: int


@dataclass(frozen=True)
class Plot:
    """Points over two axes, titled `axes`. `x_range`, `y_range`: that of the axis; None: that of the points. `bins`: a histogram below.

    `description`: the chart in words, for those who cannot see it.
    """

    name: str
    title: str
    description: str
    caption: str
    axes: tuple[str, str]
    series: Sequence[Series]
    x_range: Point | None = None
    y_range: Point | None = None
    bins: Sequence[Bin] = ()


Part = Table | Matrix | Plot


@dataclass(frozen=True)
class Section:
    """One section of the report. `id`: its anchor on the page, a word that no other section has; `notes`: paragraphs on how to read it."""

    id: str
    title: str
    notes: Sequence[str]
    parts: Sequence[Part]
