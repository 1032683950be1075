"""Scores and distances: the arithmetic that evaluate and verify share. No model is touched here."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qkit.recipe import Evaluate
from qkit.runtime import Row, RowScores, Runtime
from qkit.task import Task

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

RESAMPLES = 10_000


@dataclass(frozen=True)
class HeldOut:
    """The held-out rows as the data stage left them. `calls`: the tool calls of each answer; `variables`: what its template is given."""

    rows: tuple[Row, ...]
    messages: tuple[list[dict[str, Any]], ...]
    tools: tuple[list[dict[str, Any]], ...]
    references: tuple[Any, ...]
    answers: tuple[str, ...]
    calls: tuple[list[dict[str, Any]], ...]
    variables: tuple[dict[str, Any], ...]


@dataclass(frozen=True)
class Score:
    """Percent right with its bootstrap interval. `heldout_loss`: mean nats per completion token of the reference answers."""

    score: float
    low: float
    high: float
    rows: int
    heldout_loss: float


def read_held_out(file: Path) -> HeldOut:
    """The rows of a test.parquet."""
    import pyarrow.parquet

    records = pyarrow.parquet.read_table(file).to_pylist()
    return HeldOut(
        rows=tuple(Row(r["input_ids"], r["start"]) for r in records),
        messages=tuple(json.loads(r["messages"]) for r in records),
        tools=tuple(json.loads(r["tools"]) for r in records),
        references=tuple(json.loads(r["reference"]) for r in records),
        answers=tuple(r["answer"] for r in records),
        calls=tuple(json.loads(r.get("calls") or "[]") for r in records),
        variables=tuple(json.loads(r.get("variables") or "{}") for r in records),
    )


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


def heldout_targets(runtime: Runtime, held_out: HeldOut, tick: Callable[[], None]) -> list[NDArray[np.float32]]:
    """The log-probability of every token of every reference answer."""
    targets = []
    for scores in runtime.score(held_out.rows):
        targets.append(scores.targets)
        tick()
    return targets


def divergence(live: RowScores, other: RowScores) -> NDArray[np.float32]:
    """KL(live || other) in nats at each completion token of a row, [T].

    Over the whole vocabulary where both have it; else over the tokens that both show and the rest as one: a lower bound of the true KL.
    """
    import numpy as np

    if live.full is not None and other.full is not None:
        ours, theirs = _cut(live.full, other.full), _cut(other.full, live.full)
        difference: NDArray[np.float32] = np.sum(np.exp(ours) * (ours - theirs), axis=1)
        return difference
    ours, theirs, shared = _shared(live, other)
    with np.errstate(invalid="ignore"):
        inside = np.where(shared, np.exp(ours) * (ours - theirs), 0.0).sum(axis=1)
    our_rest, their_rest = _rest(ours, shared), _rest(theirs, shared)
    bound: NDArray[np.float32] = (inside + our_rest * (np.log(our_rest) - np.log(their_rest))).astype(np.float32)
    return bound


def over(live: RowScores, other: RowScores) -> str:
    """What `divergence` sums over, in words."""
    tops = [scores.top.shape[1] for scores in (live, other) if scores.full is None and scores.top is not None]
    widths = {scores.full.shape[1] for scores in (live, other) if scores.full is not None}
    if not tops:
        return "all tokens" if len(widths) == 1 else f"the {min(widths):,} tokens that both have"
    both = "both servers'" if len(tops) > 1 else "the server's"
    return f"{both} top {min(tops)} and the rest as one: a lower bound"


def _cut(scores: NDArray[np.float32], beside: NDArray[np.float32]) -> NDArray[np.float32]:
    """Log-probabilities over the tokens that both have: rows that one has more are padding, or tokens of its own."""
    import numpy as np

    width = beside.shape[1]
    if scores.shape[1] <= width:
        return scores
    kept = scores[:, :width]
    made: NDArray[np.float32] = kept - np.log(np.exp(kept).sum(axis=1, keepdims=True))
    return made


def _shared(live: RowScores, other: RowScores) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Log-probabilities of both, [T, k], and which of them are of a token that both show."""
    import numpy as np

    shown = other if live.full is not None else live
    assert shown.top is not None and shown.top_ids is not None
    hidden = live if live.full is not None else other
    if hidden.full is not None:
        found, shared = np.take_along_axis(hidden.full, shown.top_ids, axis=1), np.isfinite(shown.top)
    else:
        assert hidden.top is not None and hidden.top_ids is not None
        same = shown.top_ids[:, :, None] == hidden.top_ids[:, None, :]
        found, shared = np.take_along_axis(hidden.top, same.argmax(axis=2), axis=1), same.any(axis=2)
    return (found, shown.top, shared) if hidden is live else (shown.top, found, shared)


def _rest(known: NDArray[Any], shared: NDArray[Any]) -> NDArray[np.float32]:
    """Probability outside the tokens that both show, kept above zero against rounding."""
    import numpy as np

    rest: NDArray[np.float32] = np.maximum(1.0 - np.where(shared, np.exp(known), 0.0).sum(axis=1), 1e-9)
    return rest
