"""`qkit plan --schedule` for a terminal: the rate over the steps as a chart, and a table of a few steps."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from qkit.plan._rates import Course, Curve

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

WIDTH, HEIGHT = 64, 13  # of the chart, in characters, without its axes
EDGE = 9  # characters of a number on the axis


def screen(course: Course) -> RenderableType:
    """Everything that `qkit plan --schedule` shows."""
    from rich.console import Group
    from rich.text import Text

    return Group(*map(Text, [_title(course), "", *chart(course.groups[0]), ""]), _table(course))


def _title(course: Course) -> str:
    kwargs = "".join(f", {name}={value}" for name, value in course.lr_scheduler_kwargs.items())
    rising = f", {course.warmup_steps:,} of them warm-up" if course.warmup_steps else ""
    others = len(course.groups) - 1
    same = f"; {others} other groups go the same way at other rates" if others > 1 else ""
    same = "; another group goes the same way at another rate" if others == 1 else same
    return f"{course.lr_scheduler_type}{kwargs}: {course.steps:,} steps{rising}; learning rate of {course.groups[0].name}{same}"


def chart(curve: Curve) -> list[str]:
    """The lines of a chart of the rates, from 0 to the group's maximum. A column that has several steps shows all of their rates."""
    columns = [_rows_of(curve, *span) for span in _spans(len(curve.rates))]
    lines = []
    for row in range(HEIGHT - 1, -1, -1):
        marks = "".join("•" if row in filled else " " for filled in columns)
        labelled = row in (0, HEIGHT // 2, HEIGHT - 1)
        value = f"{curve.learning_rate * row / (HEIGHT - 1):.1e}" if labelled else ""
        lines.append(f"{value:>{EDGE}} {'┤' if labelled else '│'}{marks}".rstrip())
    steps = f"step 1{f'{len(curve.rates):,}':>{max(len(columns) - 6, 2)}}"
    return [*lines, f"{'':{EDGE}} └{'─' * len(columns)}", f"{'':{EDGE}}  {steps}"]


def _spans(steps: int) -> Iterator[tuple[int, int]]:
    """The steps of each column, as (first, one after the last)."""
    columns = min(steps, WIDTH)
    return ((column * steps // columns, (column + 1) * steps // columns) for column in range(columns))


def _rows_of(curve: Curve, begin: int, end: int) -> range:
    """The rows between the lowest and the highest rate of these steps."""
    rows = [round((HEIGHT - 1) * rate / curve.learning_rate) for rate in curve.rates[begin:end]]
    return range(min(rows), max(rows) + 1)


def _table(course: Course) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for name in ("step", *(curve.name for curve in course.groups)):
        table.add_column(name, justify="right", no_wrap=True)
    for step in _points(course):
        table.add_row(f"{step + 1:,}", *(f"{curve.rates[step]:.4g}" for curve in course.groups))
    return table


def _points(course: Course) -> list[int]:
    """Steps worth a line: the first, the last of the warm-up and the next, quarters of the training, and the last."""
    last, rising = course.steps - 1, course.warmup_steps
    quarters = [last * quarter // 4 for quarter in range(5)]
    return sorted({*quarters, *([rising - 1, rising] if rising else [])})
