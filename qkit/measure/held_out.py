"""Reads the held-out rows of a run and scores their reference answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qkit.plugins.runtime import Scores
from qkit.plugins.task import Task, open_task
from qkit.run.directory import Run

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True)
class HeldOut:
    """The held-out rows as written by the stage `data`.

    `rows`: what a runtime scores; `records`: all columns of each, which the task knows. A prediction is made for each row, or for a row with
    those that continue it: `asked` are the records of the first rows, and `references` what their predictions are compared with.
    """

    rows: tuple[Any, ...]
    records: tuple[Mapping[str, Any], ...]
    asked: tuple[Mapping[str, Any], ...]
    references: tuple[Any, ...]


def held_out_of(run: Run) -> HeldOut:
    """The rows of a run's test split."""
    return read_held_out(run.need("data", "test.parquet"), open_task(run.recipe.task))


def read_held_out(file: Path, task: Task) -> HeldOut:
    """Read the rows of a split's Parquet file."""
    import pyarrow.parquet

    return of_records(pyarrow.parquet.read_table(file).to_pylist(), task)


def of_records(records: Sequence[Mapping[str, Any]], task: Task) -> HeldOut:
    """The rows of a split, from all columns of each."""
    asked = tuple(record for record in records if not task.continues(record))
    return HeldOut(
        rows=tuple(task.row(record) for record in records),
        records=tuple(records),
        asked=asked,
        references=tuple(task.reference(record) for record in asked),
    )


def heldout_targets(
    task: Task, runtime: Scores, held_out: HeldOut, tick: Callable[[], None]
) -> list[NDArray[np.float32]]:
    """Log-probability of each target of each row, [T] per row, in nats. `tick` is called after each row."""
    targets = []
    for scores in task.outputs(runtime, held_out.rows):
        targets.append(scores.targets)
        tick()
    return targets
