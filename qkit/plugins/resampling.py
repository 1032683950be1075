"""Figures of a sample of rows, and their bootstrap intervals.

A figure such as F1 is no mean over rows, but a function of sums over rows. So a resample of the rows is a vector that says how often each was
drawn, and the figures of all resamples come from one matrix product.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]


DRAWS = 2000  # resamples of an interval
ELEMENTS = 2**22  # of drawn rows that are in memory at once: 32 MiB of numbers, and a few copies of them


@dataclass(frozen=True)
class Interval:
    """Between which values a figure lies in the given share of all resamples."""

    low: float
    high: float


class Sample(Protocol):
    """References and predictions of some rows."""

    @property
    def rows(self) -> int: ...
    def figures(self, weights: Floats) -> Mapping[str, Floats]:
        """Return figures of resamples, by name, [...]. `weights`: [..., rows], how often each row counts."""


@dataclass(frozen=True)
class RowStatistics:
    """A sample whose figures depend on sums over its rows. `values`: [rows, k]; `of_sums`: figures [...] from sums [..., k]."""

    values: Floats
    of_sums: Callable[[Floats], Mapping[str, Floats]]

    @property
    def rows(self) -> int:
        return len(self.values)

    def figures(self, weights: Floats) -> Mapping[str, Floats]:
        return self.of_sums(weights @ self.values)


@dataclass(frozen=True)
class Joined:
    """The figures of several samples of the same rows."""

    samples: Sequence[Sample]

    @property
    def rows(self) -> int:
        return self.samples[0].rows

    def figures(self, weights: Floats) -> Mapping[str, Floats]:
        return {name: figure for sample in self.samples for name, figure in sample.figures(weights).items()}


@dataclass(frozen=True)
class Renamed:
    """A sample whose figures have other names. `pattern`: with {} for the old one."""

    sample: Sample
    pattern: str

    @property
    def rows(self) -> int:
        return self.sample.rows

    def figures(self, weights: Floats) -> Mapping[str, Floats]:
        return {self.pattern.format(name): figure for name, figure in self.sample.figures(weights).items()}


def figures(sample: Sample) -> dict[str, float]:
    """Return the figures of all rows, each counted once.

    Raises:
        ValueError: there are no rows.
    """
    import numpy as np

    if not sample.rows:
        raise ValueError("no rows")
    return {name: float(figure) for name, figure in sample.figures(np.ones(sample.rows)).items()}


def intervals(sample: Sample, confidence: float, seed: int, draws: int = DRAWS) -> dict[str, Interval]:
    """Return the percentile bootstrap interval of each figure; rows are drawn with replacement.

    Resamples in which a figure is not defined (NaN) are left out. A figure that is the same in all resamples, such as an accuracy of 1, has an
    interval without width, which says less than an exact bound of that share would.
    """
    return _intervals([sample.figures(weights) for weights in _draws(sample.rows, draws, seed)], confidence)


def with_intervals(sample: Sample, confidence: float, seed: int) -> dict[str, dict[str, float]]:
    """`value`, `low` and `high` of each figure, by its name."""
    bounds = intervals(sample, confidence, seed)
    return {
        name: {"value": value, "low": bounds[name].low, "high": bounds[name].high}
        for name, value in figures(sample).items()
    }


def paired_intervals(
    before: Sample, after: Sample, confidence: float, seed: int, draws: int = DRAWS
) -> dict[str, Interval]:
    """Return the interval of the difference of each figure, after - before, of two models on the same rows in the same order.

    Both count the same rows of each resample, so that what is hard for both does not widen the interval. Figures that only one of them has are
    left out, such as those of a type of entity that the references lack and the other never predicts.

    Raises:
        ValueError: they have different numbers of rows.
    """
    if before.rows != after.rows:
        raise ValueError(f"{before.rows} rows before and {after.rows} after: a pair needs the same rows")
    differences = []
    for weights in _draws(before.rows, draws, seed):
        first, second = before.figures(weights), after.figures(weights)
        differences.append({name: second[name] - first[name] for name in first if name in second})
    return _intervals(differences, confidence)


def _draws(rows: int, draws: int, seed: int) -> Iterator[Floats]:
    """How often each row is drawn in each resample, [some of the draws, rows]."""
    import numpy as np

    if not rows:
        raise ValueError("no rows")
    generator = np.random.default_rng(seed)
    step = max(ELEMENTS // rows, 1)
    for begin in range(0, draws, step):
        count = min(step, draws - begin)
        drawn = generator.integers(rows, size=(count, rows)) + np.arange(count)[:, None] * rows
        yield np.bincount(drawn.ravel(), minlength=count * rows).reshape(count, rows).astype(np.float64)


def draws_of(rows: int, draws: int, seed: int) -> Iterator[list[int]]:
    """The rows of each resample, for figures that are no function of how often each row counts."""
    import numpy as np

    generator = np.random.default_rng(seed)
    return (generator.integers(rows, size=rows).tolist() for _ in range(draws))


def _intervals(parts: Sequence[Mapping[str, Floats]], confidence: float) -> dict[str, Interval]:
    import numpy as np

    tail = (1 - confidence) / 2
    bounds = {}
    for name in parts[0]:
        values = np.concatenate([part[name] for part in parts])
        defined = values[~np.isnan(values)]
        low, high = np.quantile(defined, [tail, 1 - tail]) if len(defined) else (np.nan, np.nan)
        bounds[name] = Interval(float(low), float(high))
    return bounds
