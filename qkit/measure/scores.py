"""Scores of a task, their intervals, and the exact test of a change. Arithmetic only: no model is opened here."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qkit.plugins.task import Task
from qkit.recipe.schema import Evaluate

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from qkit.measure.held_out import HeldOut


# Our own resampling, not scipy's: the intervals of a run stay the same to the last digit when it is scored again.
RESAMPLES = 10_000


@dataclass(frozen=True)
class Score:
    """Percent right with its bootstrap interval. `heldout_loss`: mean nats per completion token of the reference answers."""

    score: float
    low: float
    high: float
    rows: int
    heldout_loss: float


@dataclass(frozen=True)
class SignTest:
    """An exact paired sign test of answers that are right or wrong, on the same rows.

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


def sign_test(before: Sequence[bool], after: Sequence[bool]) -> SignTest:
    """Compare two models' answers to the same rows, row by row."""
    pairs = list(zip(before, after, strict=True))
    lost, gained = (sum(pair == change for pair in pairs) for change in ((True, False), (False, True)))
    return SignTest(lost, gained, len(pairs))


def grade(texts: Sequence[str], held_out: HeldOut, task: Task, section: Evaluate) -> list[bool]:
    """Which predictions are right."""
    pairs = zip(texts, held_out.references, strict=True)
    return [task.correct(text, reference, section) for text, reference in pairs]


def score(right: Sequence[bool], heldout_loss: float, section: Evaluate, seed: int) -> Score:
    """Percent right, with its percentile bootstrap interval over rows and the held-out loss."""
    percent = 100.0 * sum(right) / len(right)
    low, high = bootstrap(right, section.confidence, seed)
    return Score(percent, low, high, len(right), heldout_loss)


def bootstrap(right: Sequence[bool], confidence: float, seed: int) -> tuple[float, float]:
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


def paired_gain(before: Sequence[bool], after: Sequence[bool], confidence: float, seed: int) -> dict[str, float]:
    """Points gained on the same rows, with their percentile bootstrap interval: rows are resampled as pairs."""
    rng = random.Random(seed)
    gains = [int(b) - int(a) for a, b in zip(before, after, strict=True)]
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
