"""Distance between two models whose output for a token, or for a row, is a distribution: Kullback-Leibler divergence.

Over all classes where both models have them, else over the most likely ones. Shared by the tasks on tokens and the tasks on classes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qkit.plugins.runtime import RowScores

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


def divergence(reference: RowScores, other: RowScores) -> NDArray[np.float32]:
    """KL(reference || other) in nats at each completion token of a row, [T].

    Over the whole vocabulary if both have it; otherwise over the tokens that both show, with the rest as one: a lower bound of the true KL.
    """
    import numpy as np

    if reference.full is not None and other.full is not None:
        ours, theirs = _cut(reference.full, other.full), _cut(other.full, reference.full)
        difference: NDArray[np.float32] = np.sum(np.exp(ours) * (ours - theirs), axis=1)
        return difference
    ours, theirs, shared = _shared(reference, other)
    with np.errstate(invalid="ignore"):
        inside = np.where(shared, np.exp(ours) * (ours - theirs), 0.0).sum(axis=1)
    our_rest, their_rest = _rest(ours, shared), _rest(theirs, shared)
    bound: NDArray[np.float32] = (inside + our_rest * (np.log(our_rest) - np.log(their_rest))).astype(np.float32)
    return bound


def over(reference: RowScores, other: RowScores) -> str:
    """What `divergence` sums over, as text."""
    tops = [scores.top.shape[1] for scores in (reference, other) if scores.full is None and scores.top is not None]
    widths = {scores.full.shape[1] for scores in (reference, other) if scores.full is not None}
    if not tops:
        return f"all {other.unit}" if len(widths) == 1 else f"the {min(widths):,} tokens that both have"
    both = "both servers'" if len(tops) > 1 else "the server's"
    return f"{both} top {min(tops)} and the rest as one: a lower bound"


def _cut(scores: NDArray[np.float32], other: NDArray[np.float32]) -> NDArray[np.float32]:
    """Log-probabilities over the tokens that both have. What one has beyond these is padding, or tokens that were added."""
    import numpy as np

    width = other.shape[1]
    if scores.shape[1] <= width:
        return scores
    kept = scores[:, :width]
    normalized: NDArray[np.float32] = kept - np.log(np.exp(kept).sum(axis=1, keepdims=True))
    return normalized


def _shared(reference: RowScores, other: RowScores) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Both models' log-probabilities, [T, k], and a mask of those whose token both show."""
    import numpy as np

    shown = other if reference.full is not None else reference
    assert shown.top is not None and shown.top_ids is not None
    hidden = reference if reference.full is not None else other
    if hidden.full is not None:
        known, shared = np.take_along_axis(hidden.full, shown.top_ids, axis=1), np.isfinite(shown.top)
    else:
        assert hidden.top is not None and hidden.top_ids is not None
        same = shown.top_ids[:, :, None] == hidden.top_ids[:, None, :]
        known, shared = np.take_along_axis(hidden.top, same.argmax(axis=2), axis=1), same.any(axis=2)
    return (known, shown.top, shared) if hidden is reference else (shown.top, known, shared)


def _rest(known: NDArray[Any], shared: NDArray[Any]) -> NDArray[np.float32]:
    """Probability outside the tokens that both show, at least 1e-9: rounding must not make it zero or negative."""
    import numpy as np

    rest: NDArray[np.float32] = np.maximum(1.0 - np.where(shared, np.exp(known), 0.0).sum(axis=1), 1e-9)
    return rest


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """Log-probabilities over the last axis, [..., labels] in float32."""
    import numpy as np

    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    result: NDArray[np.float32] = (shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))).astype(np.float32)
    return result
