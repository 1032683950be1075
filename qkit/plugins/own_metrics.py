"""Metrics of one's own: `evaluate.metrics: [module:function]`.

    def share_of_short_answers(predictions, references):
        return [len(prediction) < 20 for prediction in predictions]

`predictions`: of the held-out rows, as predictions.jsonl has them; `references`: what the task compares them with. A function returns a number
for each row, whose mean is the figure, or one number for all rows. The figure has a bootstrap interval either way: the second kind is
computed anew for each resample of the rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from qkit.core.errors import RecipeError, short
from qkit.plugins.own_code import imported
from qkit.plugins.resampling import RowStatistics, draws_of, with_intervals

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

KEY = "evaluate.metrics"
DRAWS = 500  # resamples of a function of all rows


def figures(
    names: Sequence[str], predictions: Sequence[str], references: Sequence[Any], confidence: float, seed: int
) -> dict[str, dict[str, float]]:
    """`value`, `low` and `high` of each metric, by its name.

    Raises:
        RecipeError: a function cannot be imported, or returns something else than numbers.
    """
    return {name: _figure(name, predictions, references, confidence, seed) for name in names}


def _figure(
    name: str, predictions: Sequence[str], references: Sequence[Any], confidence: float, seed: int
) -> dict[str, float]:
    import numpy as np

    function = imported(name, KEY)
    whole = _numbers(name, function(predictions, references), len(predictions))
    if whole.ndim:
        sample = RowStatistics(
            np.stack([whole, np.ones_like(whole)], 1), lambda sums: {"mean": sums[..., 0] / sums[..., 1]}
        )
        return with_intervals(sample, confidence, seed)["mean"]
    values = []
    for rows in draws_of(len(predictions), DRAWS, seed):
        drawn = function([predictions[row] for row in rows], [references[row] for row in rows])
        values.append(float(_numbers(name, drawn, len(rows))))
    defined = np.array([value for value in values if not np.isnan(value)])
    tail = (1 - confidence) / 2
    low, high = np.quantile(defined, [tail, 1 - tail]) if len(defined) else (np.nan, np.nan)
    return {"value": float(whole), "low": float(low), "high": float(high)}


def _numbers(name: str, returned: Any, rows: int) -> NDArray[np.float64]:
    """One number, [], or one for each row, [rows]."""
    import numpy as np

    try:
        numbers = np.asarray(returned, np.float64)
    except (TypeError, ValueError):
        numbers = np.empty((0, 0))
    if numbers.shape not in ((), (rows,)):
        raise RecipeError(
            f"{KEY}={short(name)}: must return one number, or one for each of the {rows} rows, and returned {short(repr(returned))}"
        )
    return numbers
