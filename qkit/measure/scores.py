"""Scores of a task, their intervals, and the exact test of a change. Arithmetic only: no model is opened here."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qkit.plugins.resampling import Sample, figures, intervals, paired_intervals
from qkit.plugins.task import SCORE, Task
from qkit.recipe.schema import Evaluate

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from qkit.measure.held_out import HeldOut


# Our own resampling, not scipy's: the intervals of a run stay the same to the last digit when it is scored again.
RESAMPLES = 10_000


@dataclass(frozen=True)
class Grades:
    """A model's predictions of some rows, graded. `right`: of each row True or False, or a number of which more is better.

    `sample`: what the score is computed from, where it is not the share of right rows.
    """

    right: tuple[float, ...]
    sample: Sample | None = None


@dataclass(frozen=True)
class Score:
    """The score, of 100, with its bootstrap interval. `heldout_loss`: mean nats per completion token of the reference answers."""

    score: float
    low: float
    high: float
    rows: int
    heldout_loss: float


@dataclass(frozen=True)
class SignTest:
    """An exact paired sign test of answers that are right or wrong, or better or worse, on the same rows.

    `lost`: rows that only the first had right; `gained`: rows that only the second has right; `rows`: all of them.
    """

    lost: int
    gained: int
    rows: int

    @property
    def points(self) -> float:
        """The change of the score, in points of 100."""
        return 100.0 * (self.gained - self.lost) / self.rows

    @property
    def p_value(self) -> float:
        """Two-sided: how often chance alone splits the `lost + gained` rows that differ at least as unevenly.

        The binomial distribution with p = 1/2, as scipy.stats.binomtest computes it; 1.0 where no row differs.
        """
        differ = self.lost + self.gained
        ways, tail = 1, 0  # `ways`: `count` out of `differ`, in whole numbers
        for count in range(min(self.lost, self.gained) + 1):
            tail += ways
            ways = ways * (differ - count) // (count + 1)
        return min(1.0, float(2 * tail / 2**differ))

    def worse(self, confidence: float) -> bool:
        """Whether the second is worse by more than chance, at the level 1 - `confidence`."""
        return self.lost > self.gained and self.p_value < 1 - confidence

    @property
    def message(self) -> str:
        return (
            f"{self.lost} answers lost and {self.gained} gained of {self.rows}, exact sign test p = {self.p_value:.2g}"
        )

    def to_dict(self) -> dict[str, float]:
        return {"lost": self.lost, "gained": self.gained, "p_value": self.p_value}


def sign_test(before: Sequence[float], after: Sequence[float]) -> SignTest:
    """Compare two models' answers to the same rows, row by row."""
    pairs = list(zip(before, after, strict=True))
    lost, gained = sum(one > other for one, other in pairs), sum(other > one for one, other in pairs)
    return SignTest(lost, gained, len(pairs))


def grade(texts: Sequence[str], held_out: HeldOut, task: Task, section: Evaluate) -> Grades:
    """The grades of predictions of the held-out rows."""
    pairs = zip(texts, held_out.references, strict=True)
    right = tuple(task.correct(text, reference, section) for text, reference in pairs)
    return Grades(right, task.sample(texts, held_out.references))


def score(grades: Grades, heldout_loss: float, section: Evaluate, seed: int) -> Score:
    """The score, with its percentile bootstrap interval over rows, and the held-out loss."""
    value = percent(grades)
    if grades.sample is None or set(grades.right) in ({0}, {1}):  # of rows that all agree, every resample is the same
        low, high = bootstrap(grades.right, section.confidence, seed)
    else:
        interval = intervals(grades.sample, section.confidence, seed)[SCORE]
        low, high = 100.0 * interval.low, 100.0 * interval.high
    return Score(value, low, high, len(grades.right), heldout_loss)


def percent(grades: Grades) -> float:
    """The score, of 100."""
    if grades.sample is not None:
        return 100.0 * figures(grades.sample)[SCORE]
    return 100.0 * sum(grades.right) / len(grades.right)


def bootstrap(right: Sequence[float], confidence: float, seed: int) -> tuple[float, float]:
    """The percentile bootstrap interval of the percentage right; rows are sampled with replacement.

    If all rows are right, or all wrong, every resample is the same. The open end is then the exact binomial (Clopper-Pearson) bound.
    """
    if len(set(right)) == 1:
        margin = 100.0 * (1 - ((1 - confidence) / 2) ** (1 / len(right)))
        return (100.0 - margin, 100.0) if right[0] else (0.0, margin)
    rng = random.Random(seed)
    count, hits = len(right), [int(value) for value in right]
    means = sorted(100.0 * sum(rng.choices(hits, k=count)) / count for _ in range(RESAMPLES))
    tail = (1 - confidence) / 2
    return means[int(tail * RESAMPLES)], means[min(int((1 - tail) * RESAMPLES), RESAMPLES - 1)]


def paired_gain(before: Grades, after: Grades, confidence: float, seed: int) -> dict[str, float]:
    """Points gained on the same rows, with their percentile bootstrap interval: rows are resampled as pairs."""
    if before.sample is not None and after.sample is not None:
        interval = paired_intervals(before.sample, after.sample, confidence, seed)[SCORE]
        points = percent(after) - percent(before)
        return {"points": points, "low": 100.0 * interval.low, "high": 100.0 * interval.high}
    rng = random.Random(seed)
    gains = [int(b) - int(a) for a, b in zip(before.right, after.right, strict=True)]
    means = sorted(100.0 * sum(rng.choices(gains, k=len(gains))) / len(gains) for _ in range(RESAMPLES))
    tail = int((1 - confidence) / 2 * RESAMPLES)
    return {"points": 100.0 * sum(gains) / len(gains), "low": means[tail], "high": means[RESAMPLES - 1 - tail]}


def mean_loss(targets: Iterable[NDArray[np.float32]]) -> float:
    """Mean negative log-probability per completion token, in nats."""
    total, count = 0.0, 0
    for row in targets:
        total -= float(row.sum(dtype="float64"))
        count += len(row)
    return total / count
