"""Logits to labels: predictions with their probabilities, and the distributions by which models are compared."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qkit.plugins.runtime import Encodes, RowScores, TextRow
from qkit.plugins.task import Prediction
from qkit.tasks._distributions import log_softmax

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


def scores(row: TextRow, logits: NDArray[np.float32]) -> RowScores:
    """The log-probabilities of a text's labels, [1, labels], from its logits [labels]."""
    import numpy as np

    full = log_softmax(logits)[None]
    return RowScores(full[:, row.labels[0]], full.argmax(1).astype(np.int64), full, unit="labels")


TOP = 5  # labels whose probabilities predictions.jsonl has


@dataclass(frozen=True)
class Labeller:
    """`names`: by label id."""

    names: tuple[str, ...]

    def predict(
        self, runtime: Encodes, rows: Sequence[TextRow], advance: Callable[[int], None] = lambda _: None
    ) -> list[Prediction]:
        """The most likely label of each row. `confidence`: its probability; `top`: those of the most likely labels, by name."""
        import numpy as np

        predictions = []
        for logits in runtime.logits(rows):
            logp = log_softmax(logits)
            best = int(logp.argmax())
            probabilities = np.exp(logp)
            order = np.argsort(-probabilities, kind="stable")[:TOP]
            top = {self.names[number]: round(float(probabilities[number]), 6) for number in order}
            details = {"confidence": float(probabilities[best]), "top": top}
            predictions.append(Prediction(self.names[best], details, probabilities))
            advance(1)
        return predictions


def figures_of_labels(
    predictions: Sequence[Prediction], references: Sequence[str], names: Sequence[str], confidence: float, seed: int
) -> dict[str, dict[str, float]]:
    """`value`, `low` and `high` of every figure of single labels and of their probabilities, by its name.

    See metrics/counts.py and metrics/classes.py for the names.
    """
    import numpy as np

    from qkit.plugins.resampling import Joined, with_intervals
    from qkit.tasks._encoder.metrics.classes import calibration, single_label

    ids = {name: number for number, name in enumerate(names)}
    right, said = (np.array([ids[name] for name in of]) for of in (references, [one.text for one in predictions]))
    probabilities = np.stack([one.outputs for one in predictions])
    sample = Joined([single_label(right, said, names), calibration(right, probabilities)])
    return with_intervals(sample, confidence, seed)
