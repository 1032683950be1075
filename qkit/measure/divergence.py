"""How far one model's distributions are from another's: Kullback-Leibler divergence, over all tokens or over the most likely ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from qkit.core.errors import ParityFailed
from qkit.plugins.runtime import RowScores
from qkit.tasks._distributions import divergence, over

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Distance = Callable[[RowScores, RowScores], NDArray[np.float32]]


class Distances:
    """Collects, row by row, how far a second model's scores are from those of the first.

    `distance`: the task's, between two models' scores of a row, [T]. `kl`: its values, for conversations KL(first || second) in nats;
    `same_top`: whether the most likely tokens are the same, [T] per row;
    `targets`: the second's log-probabilities of the true tokens; `over`: what the divergence is summed over.
    """

    def __init__(self, first: Sequence[RowScores], distance: Distance = divergence):
        self.first = first
        self.distance = distance
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
            self.kl.append(self.distance(first, second))
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
