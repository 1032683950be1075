"""How far an opened artifact is from the model that was trained, per completion token of the held-out rows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from qkit import scoring
from qkit.errors import ParityFailed
from qkit.live import Live
from qkit.runtime import RowScores

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True)
class Parity:
    """Distance to the live adapter. KL(live || artifact) in nats per completion token; `top1`: share of tokens with the same most likely one.

    `kl_base`: mean KL(base model || artifact) on the rows that the base was scored on, `kl_base_live` mean KL(live || artifact) on these same
    rows; None without such rows. `max_difference`: the largest difference of any log-probability, None where only the top ones are known.
    `over`: what the divergence is summed over.
    """

    kl_mean: float
    kl_p99: float
    top1: float
    heldout_loss: float
    rows: int
    tokens: int
    over: str
    max_difference: float | None = None
    kl_base: float | None = None
    kl_base_live: float | None = None

    @property
    def lost(self) -> bool:
        """Whether the artifact is as near to the base model as to the adapter: then the fine-tune is not in it."""
        return self.kl_base is not None and self.kl_base_live is not None and self.kl_base <= self.kl_base_live

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def measure(live: Live, others: Iterable[RowScores]) -> Parity:
    """The parity of an artifact from its scores of all held-out rows, in order.

    Raises:
        ParityFailed: it gives numbers that are none.
    """
    import numpy as np

    to_live, to_base, agreements, targets, differences, over = [], [], [], [], [], ""
    for index, other in enumerate(others):
        targets.append(other.targets)
        if index < len(live.scores):
            over = scoring.over(live.scores[index], other)
            to_live.append(scoring.divergence(live.scores[index], other))
            agreements.append(live.scores[index].top1 == other.top1)
            differences.append(largest_difference(live.scores[index], other))
        if index < len(live.base):
            to_base.append(scoring.divergence(live.base[index], other))
    kl = np.concatenate(to_live)
    if not np.isfinite(kl).all():
        raise ParityFailed("the artifact gives log-probabilities that are no numbers: it is broken")
    known = [value for value in differences if value is not None]
    return Parity(
        kl_mean=float(kl.mean()),
        kl_p99=float(np.quantile(kl, 0.99)),
        top1=float(np.concatenate(agreements).mean()),
        heldout_loss=scoring.mean_loss(targets),
        rows=len(to_live),
        tokens=len(kl),
        over=over,
        max_difference=max(known, default=None),
        kl_base=_mean(to_base),
        kl_base_live=_mean(to_live[: len(to_base)]),
    )


def _mean(rows: Sequence[NDArray[np.float32]]) -> float | None:
    import numpy as np

    return float(np.concatenate(rows).mean()) if rows else None


def largest_difference(live: RowScores, other: RowScores) -> float | None:
    """Of any log-probability of a row; None where only the top ones are known."""
    import numpy as np

    return None if live.full is None or other.full is None else float(np.abs(live.full - other.full).max())
