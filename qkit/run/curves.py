"""The curves of a training, in words: whether the validation loss rises while the training loss falls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

RISE = 1.03  # last validation loss / lowest, from which on the gap is named: less is within the noise of few rows


def evaluations(metrics: Sequence[Mapping[str, Any]]) -> list[tuple[float, float]]:
    """(step, validation loss) of each evaluation in metrics.jsonl."""
    return [(line["step"], line["eval_loss"]) for line in metrics if line.get("eval_loss") is not None]


def gap(metrics: Sequence[Mapping[str, Any]], is_restored: bool) -> str:
    """What to know where the two losses part; "" where they do not. `is_restored`: the result is the best step's."""
    points = [point for point in evaluations(metrics) if point[0] > 0]  # no loss was logged before the first step
    if len(points) < 2:
        return ""
    (best_step, best), (last_step, last) = min(points, key=lambda point: point[1]), points[-1]
    before, after = _training_loss(metrics, points, best_step), _training_loss(metrics, points, last_step)
    if last < RISE * best or before is None or after is None or after >= before:
        return ""
    kept = "" if is_restored else ", or train.load_best_model_at_end=true, which keeps the best step"
    return (
        f"the validation loss rises from {best:.4g} at step {best_step:g} to {last:.4g} at step {last_step:g}, while the training loss falls "
        f"from {before:.4g} to {after:.4g}: what is learnt after step {best_step:g} holds for the training rows only. More rows or fewer "
        f"steps help{kept}"
    )


def _training_loss(
    metrics: Sequence[Mapping[str, Any]], points: Sequence[tuple[float, float]], step: float
) -> float | None:
    """The mean training loss between the evaluation before a step and that at the step; None: not logged."""
    before = max((at for at, _ in points if at < step), default=0)
    losses = [line["loss"] for line in metrics if line.get("loss") is not None and before < line["step"] <= step]
    return fmean(losses) if losses else None
