"""Scores and distances: the arithmetic that evaluate and verify share. No model is touched here."""

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


RESAMPLES = 10_000


@dataclass(frozen=True)
class Score:
    """Percent right with its bootstrap interval. `heldout_loss`: mean nats per completion token of the reference answers."""

    score: float
    low: float
    high: float
    rows: int
    heldout_loss: float


def grade(texts: Sequence[str], held_out: HeldOut, task: Task, section: Evaluate) -> list[bool]:
    """Which predictions are right."""
    pairs = zip(texts, held_out.references, strict=True)
    return [task.correct(text, reference, section) for text, reference in pairs]


def score(right: Sequence[bool], heldout_loss: float, section: Evaluate, seed: int) -> Score:
    """Percent right, its percentile bootstrap interval over rows, beside the held-out loss."""
    percent = 100.0 * sum(right) / len(right)
    low, high = bootstrap(right, section.confidence, seed)
    return Score(percent, low, high, len(right), heldout_loss)


def bootstrap(right: Sequence[bool], confidence: float, seed: int) -> tuple[float, float]:
    """The percentile bootstrap interval of the percentage right, rows drawn with replacement.

    When all rows are right, or all wrong, every resample is the same; the open end is then the exact binomial one.
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
    """Points gained on the same rows, with its interval: rows are resampled as pairs."""
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
