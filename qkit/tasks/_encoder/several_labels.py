"""Texts with any number of labels: each label has a probability of its own."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qkit.plugins.runtime import Encodes, RowScores, TextRow
from qkit.plugins.task import LABELS, SCORE, Prediction
from qkit.tasks._encoder.labels import Constant, with_lists

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    from numpy.typing import NDArray

    from qkit.plugins.resampling import RowStatistics


def with_ones(batch: pa.RecordBatch, names: Sequence[str]) -> pa.RecordBatch:
    """The rows of a batch with 1 in `labels` for each of `names` that they have, and 0 for the others."""
    column = [[float(name in row) for name in names] for row in map(set, batch.column("names").to_pylist())]
    return with_lists(batch, "labels", column)


def log_probabilities(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """Of no and yes for each label, [labels, 2], from logits [labels]."""
    import numpy as np

    exact = logits.astype(np.float64)
    pair = np.stack([-np.logaddexp(0, exact), -np.logaddexp(0, -exact)], 1)
    result: NDArray[np.float32] = pair.astype(np.float32)
    return result


def scores(row: TextRow, logits: NDArray[np.float32]) -> RowScores:
    """The log-probabilities of no and yes for each label, [labels, 2]."""
    import numpy as np

    full = log_probabilities(logits)
    truth = np.array(row.labels, dtype=np.int64)
    targets = np.take_along_axis(full, truth[:, None], 1)[:, 0]
    return RowScores(targets, full.argmax(1).astype(np.int64), full, unit="decisions")


@dataclass(frozen=True)
class MultiLabeller:
    """`names`: by label id. A prediction's text is the JSON list of its labels."""

    names: tuple[str, ...]

    def predict(
        self, runtime: Encodes, rows: Sequence[TextRow], advance: Callable[[int], None] = lambda _: None
    ) -> list[Prediction]:
        """The labels whose probability exceeds one half; `probabilities`: of these, by name."""
        import numpy as np

        predictions = []
        for logits in runtime.logits(rows):
            probabilities = np.exp(log_probabilities(logits)[:, 1])
            chosen = {self.names[i]: float(probabilities[i]) for i in np.flatnonzero(logits > 0)}
            text = json.dumps([*chosen], ensure_ascii=False)
            predictions.append(Prediction(text, {"probabilities": chosen}, probabilities))
            advance(1)
        return predictions


def figures_of_labels(
    predictions: Sequence[Prediction], references: Sequence[Collection[str]], names: Sequence[str]
) -> RowStatistics:
    """The figures of metrics/classes.py: multi_label."""
    import numpy as np

    from qkit.tasks._encoder.metrics.classes import multi_label

    chosen = [{*json.loads(one.text)} for one in predictions]
    right, said = (np.array([[name in row for name in names] for row in rows]) for rows in (references, chosen))
    return multi_label(right, said, names)


def micro_f1(predictions: Sequence[Collection[str]], references: Sequence[Collection[str]]) -> RowStatistics:
    """The score of several labels: 2 x right / (predicted + true), over all rows."""
    import numpy as np

    from qkit.plugins.resampling import RowStatistics
    from qkit.tasks._encoder.metrics.counts import ratio

    counts = [
        (len({*said} & {*true}), len({*said}) + len({*true}))
        for said, true in zip(predictions, references, strict=True)
    ]
    values = np.array(counts, np.float64).reshape(-1, 2)
    return RowStatistics(values, lambda sums: {SCORE: ratio(2 * sums[..., 0], sums[..., 1])})


def open_rates(data: Path) -> Constant:
    """The baseline of a data folder: the logit of each label's share of the training rows."""
    import numpy as np

    labels: dict[str, Any] = json.loads((data / LABELS).read_text(encoding="utf-8"))
    counts = labels["rows"]["train"]
    shares = [counts[name] / labels["training_rows"] for name in labels["names"]]
    share = np.clip(np.array(shares, np.float64), 1e-6, 1 - 1e-6)
    return Constant(np.log(share / (1 - share)).astype(np.float32))
