"""Texts with a number, or several, for a label. An output is taken as the mean of a normal distribution with a variance of 1.

So the held-out loss and the distance of two models are in nats, as for other tasks: half the squared error, and half the squared difference.
That fits numbers of a spread near 1; the check `numbers` warns of others.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qkit.core.errors import listed
from qkit.plugins.checks import NAMED_ROWS, Check, SetRow
from qkit.plugins.runtime import Encodes, RowScores, TextRow
from qkit.plugins.task import LABELS, SCORE, Prediction
from qkit.tasks._encoder.labels import Constant, with_lists

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    from numpy.typing import NDArray

    from qkit.plugins.resampling import Joined, RowStatistics

NARROW, WIDE = 0.1, 10.0  # standard deviations that a new head reaches neither too fast nor too slowly
HALF_LOG_TWO_PI = 0.9189385332046727


# --- data -------------------------------------------------------------------------------------------------------------


def described(rows: Sequence[SetRow]) -> dict[str, Any]:
    """The content of labels.json: `names` (value, or value_0 ...), and by name `mean` and `deviation` of the training rows."""
    training = _columns([row for row in rows if row.split == "train"])
    if not training:
        return {}
    names = ["value"] if len(training) == 1 else [f"value_{index}" for index in range(len(training))]
    figures = {
        name: {"mean": statistics.fmean(column), "deviation": statistics.pstdev(column)}
        for name, column in zip(names, training, strict=True)
    }
    return {"names": names, "numbers": figures}


def _columns(rows: Sequence[SetRow]) -> list[list[float]]:
    """The numbers of all rows that have as many as the first one, by place."""
    if not rows:
        return []
    width = len(rows[0].names)
    return [[float(row.names[place]) for row in rows if len(row.names) == width] for place in range(width)]


def with_numbers(batch: pa.RecordBatch) -> pa.RecordBatch:
    """The rows of a batch with their numbers in `labels`."""
    column = [[float(text) for text in row] for row in batch.column("names").to_pylist()]
    return with_lists(batch, "labels", column)


def checks(rows: Sequence[SetRow]) -> Iterator[Check]:
    """Whether all rows have as many numbers, these differ and have a spread that a head can learn, and the same text has the same ones."""
    training = [row for row in rows if row.split == "train"]
    if not training:
        return
    yield _as_many(rows, len(training[0].names))
    yield _spread(_columns(training))
    yield _conflicts(rows)


def _as_many(rows: Sequence[SetRow], width: int) -> Check:
    others = [row for row in rows if len(row.names) != width]
    if not others:
        return Check("labels", "pass", f"every row has {width} number{'s' if width > 1 else ''}")
    message = f"{len(others):,} rows have another number of labels than the first one, which has {width}; the first is {others[0].place}"
    places = tuple(row.place for row in others[:NAMED_ROWS])
    return Check("labels", "fail", message, len(others), places, "give every row the same number of labels")


def _spread(columns: Sequence[Sequence[float]]) -> Check:
    deviations = [statistics.pstdev(column) for column in columns]
    if not all(deviations):
        return Check(
            "numbers", "fail", f"all {len(columns[0]):,} training rows have the same number: nothing can be learned"
        )
    shown = listed(
        f"{statistics.fmean(column):.4g} (standard deviation {deviation:.4g})"
        for column, deviation in zip(columns, deviations, strict=True)
    )
    if all(NARROW <= deviation <= WIDE for deviation in deviations):
        return Check("numbers", "pass", f"the numbers of the training rows are on average {shown}")
    return Check(
        "numbers",
        "warn",
        f"the numbers of the training rows are on average {shown}: a new head starts at 0 with steps for a spread near 1",
        remedy="divide them so that their standard deviation is near 1; distances and gates of artifacts suppose that, too",
    )


def _conflicts(rows: Sequence[SetRow]) -> Check:
    by_text: dict[str, set[tuple[str, ...]]] = {}
    for row in rows:
        by_text.setdefault(row.question, set()).add(row.names)
    different = sum(len(numbers) > 1 for numbers in by_text.values())
    if not different:
        return Check("label_conflicts", "pass", "no text has different numbers")
    remedy = "decide on one number for each text, such as their mean"
    return Check(
        "label_conflicts",
        "warn",
        f"{different:,} texts have different numbers in different rows",
        different,
        remedy=remedy,
    )


# --- outputs ----------------------------------------------------------------------------------------------------------


def scores(row: TextRow, logits: NDArray[np.float32]) -> RowScores:
    """The log-density of each number, [numbers]; `full`: the outputs [numbers, 1]."""
    import numpy as np

    error = logits.astype(np.float64) - np.array(row.labels)
    targets = (-(error**2) / 2 - HALF_LOG_TWO_PI).astype(np.float32)
    return RowScores(targets, np.zeros(len(logits), np.int64), logits.astype(np.float32)[:, None], unit="numbers")


def divergence(reference: RowScores, other: RowScores) -> NDArray[np.float32]:
    """Half the squared difference of two models' numbers, [numbers]."""
    import numpy as np

    assert reference.full is not None and other.full is not None
    difference = (reference.full - other.full)[:, 0]
    return (difference**2 / 2).astype(np.float32)


@dataclass(frozen=True)
class Regressor:
    """A prediction's text is its numbers, parted by spaces."""

    def predict(
        self, runtime: Encodes, rows: Sequence[TextRow], advance: Callable[[int], None] = lambda _: None
    ) -> list[Prediction]:
        """The numbers of each row."""
        predictions = []
        for logits in runtime.logits(rows):
            values = [float(value) for value in logits]
            predictions.append(Prediction(" ".join(map(repr, values)), {}, values))
            advance(1)
        return predictions


def squared_error(prediction: str, reference: Sequence[float]) -> float:
    """The mean over a row's numbers."""
    pairs = zip(map(float, prediction.split()), reference, strict=True)
    return statistics.fmean((value - truth) ** 2 for value, truth in pairs)


def explained(predictions: Sequence[str], references: Sequence[Sequence[float]]) -> RowStatistics:
    """The score of numbers: R2, the mean of that of each number of a row."""
    import numpy as np

    from qkit.plugins.resampling import RowStatistics
    from qkit.tasks._encoder.metrics.regression import r2

    said, true = _arrays(predictions, references)
    centred = true - true.mean(0)
    values = np.concatenate([np.ones((len(true), 1)), centred, centred**2, (said - true) ** 2], 1)
    width = true.shape[1]

    def of_sums(sums: NDArray[np.float64]) -> Mapping[str, NDArray[np.float64]]:
        parts = [sums[..., 1 + place :: width][..., :3] for place in range(width)]
        return {SCORE: np.mean([r2(sums[..., 0], *np.moveaxis(part, -1, 0)) for part in parts], 0)}

    return RowStatistics(values, of_sums)


def figures_of_numbers(
    predictions: Sequence[str], references: Sequence[Sequence[float]], names: Sequence[str]
) -> Joined:
    """The figures of metrics/regression.py; with several numbers in a row, those of each, such as mse:value_1."""
    from qkit.plugins.resampling import Joined, Renamed
    from qkit.tasks._encoder.metrics.regression import regression

    said, true = _arrays(predictions, references)
    samples = [regression(true[:, place], said[:, place]) for place in range(true.shape[1])]
    if len(samples) == 1:
        return samples[0]
    return Joined([Renamed(sample, f"{{}}:{name}") for sample, name in zip(samples, names, strict=True)])


def _arrays(
    predictions: Sequence[str], references: Sequence[Sequence[float]]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Both as [rows, numbers]."""
    import numpy as np

    said = np.array([[float(value) for value in text.split()] for text in predictions])
    return said, np.array([list(row) for row in references], np.float64)


def open_mean(data: Path) -> Constant:
    """The baseline of a data folder: the means of the training rows."""
    import numpy as np

    labels: dict[str, Any] = json.loads((data / LABELS).read_text(encoding="utf-8"))
    return Constant(np.array([labels["numbers"][name]["mean"] for name in labels["names"]], np.float32))
