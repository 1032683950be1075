"""Metrics of rows with a number for a label."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qkit.plugins.resampling import Joined, RowStatistics
from qkit.tasks._encoder.metrics.counts import ratio

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]


CONSTANT = 1e-12  # a variance below this part of the second moment is rounding


def regression(reference: NDArray[Any], predicted: NDArray[Any]) -> Joined:
    """Return a sample with the figures mse, rmse, mae, r2, pearson and spearman. `reference`, `predicted`: [rows].

    Where all references are equal, r2 is 1 if the predictions equal them too and else 0, as in scikit-learn. A correlation with numbers that
    are all equal is not defined: NaN.

    Raises:
        ValueError: there are no rows, or a number is NaN or infinite.
    """
    import numpy as np

    truth, guess = (numbers.astype(np.float64) for numbers in (reference, predicted))
    if not len(truth):
        raise ValueError("no rows")
    if len(odd := np.flatnonzero(~np.isfinite(truth + guess))):
        raise ValueError(f"row {odd[0]}: the reference is {truth[odd[0]]}, the prediction {guess[odd[0]]}")
    error = guess - truth
    # Sums of squares of large numbers would hide their differences: only distances from the mean are squared
    x, y = truth - truth.mean(), guess - guess.mean()
    values = np.stack([np.ones_like(x), x, y, x * x, y * y, x * y, error**2, np.abs(error)], 1)
    return Joined([RowStatistics(values, _of_sums), Ranks(_groups(truth), _groups(guess))])


def _of_sums(sums: Floats) -> Mapping[str, Floats]:
    import numpy as np

    rows, x, y, xx, yy, xy, squares, distances = np.moveaxis(sums, -1, 0)
    mse, spread = ratio(squares, rows), _variation(rows, x, xx)
    return {
        "mse": mse,
        "rmse": np.sqrt(mse),
        "mae": ratio(distances, rows),
        "r2": r2(rows, x, xx, squares),
        "pearson": _correlation(xy - ratio(x * y, rows), spread, _variation(rows, y, yy)),
    }


def r2(rows: Floats, x: Floats, xx: Floats, squares: Floats) -> Floats:
    """R2 from sums over rows: of 1, of the references' distances from their mean in the sample, of these squared, and of the squared errors."""
    import numpy as np

    spread = _variation(rows, x, xx)
    return np.where(spread > 0, 1 - ratio(squares, spread), np.where(squares == 0, 1.0, 0.0))


def _variation(rows: Floats, total: Floats, squares: Floats) -> Floats:
    """The sum of squared distances from the mean; 0 if that is rounding only."""
    import numpy as np

    variation = squares - ratio(total**2, rows)
    return np.where(variation > CONSTANT * squares, variation, 0.0)


def _correlation(joint: Floats, first: Floats, second: Floats) -> Floats:
    import numpy as np

    both = np.sqrt(first) * np.sqrt(second)
    return np.where(both > 0, np.clip(ratio(joint, both), -1, 1), np.nan)


@dataclass(frozen=True)
class Groups:
    """Rows by their number: rows `order[starts[i]:starts[i + 1]]` have the same one, and the next group a larger one. `group`: of each row."""

    order: NDArray[np.intp]
    starts: NDArray[np.intp]
    group: NDArray[np.intp]


def _groups(numbers: Floats) -> Groups:
    import numpy as np

    _, first, group = np.unique(np.sort(numbers), return_index=True, return_inverse=True)
    order = np.argsort(numbers, kind="stable")
    of_rows = np.empty_like(order)
    of_rows[order] = group
    return Groups(order, first, of_rows)


@dataclass(frozen=True)
class Ranks:
    """A sample with the figure spearman: the correlation of ranks, where equal numbers share the mean of their ranks.

    A row's rank depends on the rows that are drawn with it, so there are no sums to resample: each resample is ranked anew, in the order that
    is known already. 2,000 resamples of 10,000 rows take two seconds.
    """

    reference: Groups
    predicted: Groups

    @property
    def rows(self) -> int:
        return len(self.reference.order)

    def figures(self, weights: Floats) -> Mapping[str, Floats]:
        x, y = _ranks(weights, self.reference), _ranks(weights, self.predicted)
        joint, first, second = ((weights * product).sum(-1) for product in (x * y, x * x, y * y))
        return {"spearman": _correlation(joint, first, second)}


def _ranks(weights: Floats, groups: Groups) -> Floats:
    """The ranks of the drawn rows less their mean, [..., rows]."""
    import numpy as np

    sizes = np.add.reduceat(weights[..., groups.order], groups.starts, axis=-1)
    middle = sizes.cumsum(-1) - sizes / 2  # the mean rank of a group, less 1/2
    ranks: Floats = (middle - sizes.sum(-1, keepdims=True) / 2)[..., groups.group]
    return ranks
