"""How far one model's distributions are from another's: Kullback-Leibler divergence, over all tokens or over the most likely ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from qkit.core.errors import ParityFailed
from qkit.plugins.runtime import RowScores

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class Distances:
    """Collects, row by row, how far a second model's scores are from those of the first.

    `kl`: KL(first || second) in nats, [T] per row; `same_top`: whether the most likely tokens are the same, [T] per row;
    `targets`: the second's log-probabilities of the true tokens; `over`: what the divergence is summed over.
    """

    def __init__(self, first: Sequence[RowScores]):
        self.first = first
        self.kl: list[NDArray[np.float32]] = []
        self.same_top: list[NDArray[np.bool_]] = []
        self.targets: list[NDArray[np.float32]] = []
        self.over = ""

    def add(self, second: RowScores) -> None:
        """Compare the next row. Of rows that the first model has no scores for, only the targets are kept."""
        index = len(self.targets)
        self.targets.append(second.targets)
        if index < len(self.first):
            first = self.first[index]
            self.over = over(first, second)
            self.kl.append(divergence(first, second))
            self.same_top.append(first.top1 == second.top1)

    def sums(self) -> NDArray[np.float64]:
        """The sum of each row's divergences in nats, [rows]."""
        return row_sums(self.kl)

    def figures(self, who: str) -> dict[str, Any]:
        """`kl_mean`, `kl_p99`, `kl_max` in nats per token, `top1`, and how many `rows` and `tokens` were compared, `over` what.

        Raises:
            ParityFailed: a divergence is NaN or infinite; `who` names the model in the message.
        """
        import numpy as np

        kl = np.concatenate(self.kl)
        if not np.isfinite(kl).all():
            raise ParityFailed(f"{who} returned NaN or infinite log-probabilities", gate="numbers")
        return {
            "kl_mean": float(kl.mean()),
            "kl_p99": float(np.quantile(kl, 0.99)),
            "kl_max": float(kl.max()),
            "top1": float(np.concatenate(self.same_top).mean()),
            "rows": len(self.kl),
            "tokens": len(kl),
            "over": self.over,
        }


def row_sums(rows: Sequence[NDArray[np.float32]]) -> NDArray[np.float64]:
    """The sum of each row's values, [rows]."""
    import numpy as np

    return np.array([float(row.sum(dtype="float64")) for row in rows])


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
        return "all tokens" if len(widths) == 1 else f"the {min(widths):,} tokens that both have"
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
