"""Metrics of rows that are classified as a whole: one class each, or several (multi-label); and how well probabilities are calibrated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from qkit.plugins.resampling import RowStatistics
from qkit.tasks._encoder.metrics.counts import Counts, ratio, scores

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]


BINS = 15  # of confidence, of equal width
UNNORMALIZED = 1e-2  # how far from 1 the probabilities of a row may add up, in 16 bit too


def single_label(reference: NDArray[Any], predicted: NDArray[Any], classes: Sequence[str]) -> RowStatistics:
    """Return a sample with the figures accuracy and those of counts.scores. Micro means equal the accuracy: each row has one class.

    It takes 24 bytes for each row and class.

    Args:
        reference: [rows], indices of `classes`.
        predicted: the same.
        classes: all names, in the order of the model's outputs.

    Raises:
        ValueError: an index is not one of `classes`.
    """
    import numpy as np

    for indices in (reference, predicted):
        if len(indices) and not 0 <= indices.min() <= indices.max() < len(classes):
            raise ValueError(f"classes {indices.min()} to {indices.max()}, of {len(classes)} (counted from 0)")
    numbers = np.arange(len(classes))
    references, predictions = (indices[:, None] == numbers for indices in (reference, predicted))
    values = np.concatenate([references & predictions, references, predictions], 1).astype(np.float64)
    return RowStatistics(values, partial(_single_label, tuple(classes)))


def _single_label(classes: Sequence[str], sums: Floats) -> Mapping[str, Floats]:
    counts = Counts.of(sums, len(classes))
    return {"accuracy": ratio(counts.right.sum(-1), counts.reference.sum(-1)), **scores(counts, classes)}


def confusion(reference: NDArray[Any], predicted: NDArray[Any], classes: int) -> NDArray[np.int64]:
    """Return how many rows of each class (first axis) are predicted as each (second axis), [classes, classes]."""
    import numpy as np

    matrix: NDArray[np.int64] = np.bincount(reference * classes + predicted, minlength=classes**2)
    return matrix.reshape(classes, classes)


def multi_label(reference: NDArray[Any], predicted: NDArray[Any], classes: Sequence[str]) -> RowStatistics:
    """Return a sample with the figures exact_match (share of rows with all classes right), hamming_loss (share of wrong decisions) and those of
    counts.scores.

    A class that no row has and none is predicted as is left out of the macro means here too, where scikit-learn counts it as 0.

    Args:
        reference: [rows, classes], which classes a row has.
        predicted: the same.
        classes: their names.
    """
    import numpy as np

    references, predictions = reference.astype(bool), predicted.astype(bool)
    wrong = (references != predictions).sum(1, keepdims=True)
    parts = [references & predictions, references, predictions, wrong == 0, wrong, np.ones_like(wrong)]
    values = np.concatenate([part.astype(np.float64) for part in parts], 1)
    return RowStatistics(values, partial(_multi_label, tuple(classes)))


def _multi_label(classes: Sequence[str], sums: Floats) -> Mapping[str, Floats]:
    exact, wrong, rows = (sums[..., index] for index in (-3, -2, -1))
    loss = ratio(wrong, rows * len(classes))
    return {"exact_match": ratio(exact, rows), "hamming_loss": loss, **scores(Counts.of(sums, len(classes)), classes)}


@dataclass(frozen=True)
class Bin:
    """Rows whose confidence, the probability of the predicted class, is above `low` and at most `high`; its mean, and the share right."""

    low: float
    high: float
    rows: int
    confidence: float
    accuracy: float


def calibration(reference: NDArray[Any], probabilities: NDArray[Any], bins: int = BINS) -> RowStatistics:
    """Return a sample with the figures ece and brier.

    ece: the expected calibration error, the mean over rows of |accuracy - mean confidence| of the row's bin. brier: the mean over rows of the
    sum over classes of (probability - 1 or 0)², from 0 to 2 (for two classes, twice the Brier score of one of them).

    Args:
        reference: [rows], indices of classes.
        probabilities: [rows, classes].
        bins: of equal width.

    Raises:
        ValueError: the probabilities of a row do not add up to 1.
    """
    import numpy as np

    known = probabilities.astype(np.float64)
    if len(known) and not (off := float(np.abs(known.sum(1) - 1).max())) <= UNNORMALIZED:
        raise ValueError(f"the probabilities of a row add up to 1 only within {off:.3g}: are they logits?")
    binned = _binned(known.max(1), (known.argmax(1) == reference).astype(np.float64), bins)
    brier = ((known - (reference[:, None] == np.arange(known.shape[1]))) ** 2).sum(1)
    return RowStatistics(np.concatenate([binned, brier[:, None]], 1), partial(_calibration, bins))


def confidences(confidence: NDArray[Any], right: NDArray[Any], bins: int = BINS) -> RowStatistics:
    """Return a sample with the figure ece, where only the probabilities of the predicted classes are known.

    Args:
        confidence: [rows], the probability of the predicted class.
        right: [rows], 1 where it is the right one, else 0.
        bins: of equal width.
    """
    return RowStatistics(_binned(confidence, right, bins), lambda sums: {"ece": _ece(sums, bins)})


def _binned(confidence: NDArray[Any], right: NDArray[Any], bins: int) -> Floats:
    """Whether a row is in a bin, its confidence there, and whether it is right there, [rows, 3 * bins]."""
    import numpy as np

    # (low, high]: a confidence on the border belongs to the bin below
    places = np.searchsorted(np.arange(1, bins) / bins, confidence) == np.arange(bins)[:, None]
    values: Floats = np.stack([*places, *(places * confidence), *(places * right)], 1).astype(np.float64)
    return values


def _ece(sums: Floats, bins: int) -> Floats:
    import numpy as np

    rows, confidence, right = (sums[..., begin : begin + bins] for begin in range(0, 3 * bins, bins))
    return ratio(np.abs(right - confidence).sum(-1), rows.sum(-1))


def _calibration(bins: int, sums: Floats) -> Mapping[str, Floats]:
    return {"ece": _ece(sums, bins), "brier": ratio(sums[..., -1], sums[..., :bins].sum(-1))}


def reliability(statistics: RowStatistics) -> list[Bin]:
    """Return the bins of `calibration` or `confidences` that have rows, in order."""
    bins = statistics.values.shape[1] // 3
    sums = statistics.values.sum(0)
    rows, confidence, right = (sums[begin : begin + bins] for begin in range(0, 3 * bins, bins))
    return [
        Bin(
            index / bins,
            (index + 1) / bins,
            int(rows[index]),
            confidence[index] / rows[index],
            right[index] / rows[index],
        )
        for index in range(bins)
        if rows[index]
    ]
