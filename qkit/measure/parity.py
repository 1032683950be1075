"""How far an opened artifact is from the model that was trained, per completion token of the held-out rows.

What was trained is the adapter on its base, computed in fp32. The same computed in bf16, as training did it, is already some way from that:
so is every artifact that computes in 16 bits, and no fault of its own. An artifact is judged by what it is beyond that, and beyond what
the choice of rows makes of it: rows are drawn again, whole, since the tokens of one row are no independent witnesses.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from qkit.core.errors import ParityFailed
from qkit.measure import divergence
from qkit.measure import scores as measure_scores
from qkit.plugins.runtime import RowScores

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


CONFIDENCE = 0.95  # of the intervals, two-sided
DRAWS = 2000
FEW_TOKENS = 8  # a row counts as if it had at least so many: of one token anything may be said by chance
# What rounding to a dtype does, as a multiple of what the reference model is from fp32 when it is computed in bf16. A divergence grows with the
# square of the relative error: fp16 has three bits more than bf16, fp32 sixteen.
ROUNDING = {"bfloat16": 1.0, "float16": 2.0**-6, "float32": 2.0**-32}
SPARE = 3.0  # times that: other kernels round elsewhere, and a sum that is rounded is not always rounded evenly


@dataclass(frozen=True)
class Reference:
    """What was trained, computed in fp32: scores of the first held-out rows, and those of the base alone on the first few of them.

    `rounding`: of each of these rows, the sum over its tokens of KL(this || the same adapter computed in bf16), in nats; () where it was not
    measured. `bf16`: that computation's whole distance.
    """

    scores: tuple[RowScores, ...]
    base: tuple[RowScores, ...]
    rounding: tuple[float, ...] = ()
    bf16: Parity | None = None


@dataclass(frozen=True)
class Parity:
    """Distance to what was trained. KL(trained || artifact) in nats per completion token; `top1`: share of tokens with the same top one.

    `kl_low`, `kl_high`: interval of `kl_mean` over rows. `rounding`: mean KL of the reference model computed in bf16, on the same rows;
    `beyond`: the lower end of the interval of `kl_mean` less what rounding may do in the artifact's dtypes. None where they were not measured.
    `kl_base`: mean KL(base model || artifact) on the rows that the base was scored on, `kl_base_live` mean KL(trained || artifact) on these
    same rows, `nearer_base` the lower end of the interval of their difference; None without such rows. `worst_row`: of the row that is
    farthest off, the mean less what rounding may do there: an interval over rows says nothing of damage that few rows show.
    `max_difference`: the largest difference of any log-probability, None where only the top ones are known. `over`: what the divergence is
    summed over.
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
    kl_low: float | None = None
    kl_high: float | None = None
    rounding: float | None = None
    beyond: float | None = None
    nearer_base: float | None = None
    worst_row: float | None = None

    @property
    def lost(self) -> bool:
        """Whether the artifact is nearer to the base model than to the adapter, by more than chance: then the fine-tune is not in it."""
        if self.nearer_base is not None:
            return self.nearer_base > 0
        return self.kl_base is not None and self.kl_base_live is not None and self.kl_base < self.kl_base_live

    @property
    def excess(self) -> float:
        """What the artifact is certainly farther from the trained model than rounding to 16 bits takes it, in nats per token."""
        return self.kl_mean if self.beyond is None else self.beyond

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def measure(
    reference: Reference, others: Iterable[RowScores], computed: str = "bfloat16", weights: str = "bfloat16"
) -> Parity:
    """The parity of an artifact from its scores of all held-out rows, in order.

    `computed`, `weights`: the dtypes of its products and sums, and of what the adapter was added to; each rounds once.

    Raises:
        ParityFailed: it gives numbers that are none.
    """
    import numpy as np

    to_reference, to_base, agreements, targets, differences, over = [], [], [], [], [], ""
    for index, other in enumerate(others):
        targets.append(other.targets)
        if index < len(reference.scores):
            over = divergence.over(reference.scores[index], other)
            to_reference.append(divergence.divergence(reference.scores[index], other))
            agreements.append(reference.scores[index].top1 == other.top1)
            differences.append(largest_difference(reference.scores[index], other))
        if index < len(reference.base):
            to_base.append(divergence.divergence(reference.base[index], other))
    kl = np.concatenate(to_reference)
    if not np.isfinite(kl).all():
        raise ParityFailed("the artifact gives log-probabilities that are no numbers: it is broken")
    known = [value for value in differences if value is not None]
    return Parity(
        kl_mean=float(kl.mean()),
        kl_p99=float(np.quantile(kl, 0.99)),
        top1=float(np.concatenate(agreements).mean()),
        heldout_loss=measure_scores.mean_loss(targets),
        rows=len(to_reference),
        tokens=len(kl),
        over=over,
        max_difference=max(known, default=None),
        **_intervals(reference, to_reference, SPARE * (ROUNDING[computed] + ROUNDING[weights])),
        **_beside_base(to_reference, to_base),
    )


def row_sums(rows: Sequence[NDArray[np.float32]]) -> NDArray[np.float64]:
    """The sum of each row's values, [rows]."""
    import numpy as np

    return np.array([float(row.sum(dtype="float64")) for row in rows])


def _intervals(reference: Reference, to_reference: Sequence[NDArray[np.float32]], times: float) -> dict[str, float]:
    """The interval of the mean, and what is certainly beyond `times` the rounding of bf16."""
    import numpy as np

    sums, sizes = row_sums(to_reference), np.array([len(row) for row in to_reference])
    low, high = interval(sums, sizes)
    if not reference.rounding:
        return {"kl_low": low, "kl_high": high}
    rounding = np.array(reference.rounding[: len(sums)])
    mean = float(rounding.sum() / sizes.sum())
    beyond, _ = interval(sums - times * rounding, sizes)
    worst = float(np.max((sums - times * np.maximum(rounding, mean * sizes)) / np.maximum(sizes, FEW_TOKENS)))
    return {"kl_low": low, "kl_high": high, "rounding": mean, "beyond": beyond, "worst_row": worst}


def _beside_base(
    to_reference: Sequence[NDArray[np.float32]], to_base: Sequence[NDArray[np.float32]]
) -> dict[str, float | None]:
    """The distance to the base alone, beside that to the adapter on the same rows."""
    import numpy as np

    if not to_base:
        return {}
    same = to_reference[: len(to_base)]
    sizes = np.array([len(row) for row in to_base])
    nearer, _ = interval(row_sums(same) - row_sums(to_base), sizes)
    return {"kl_base": _mean(to_base), "kl_base_live": _mean(same), "nearer_base": nearer}


def interval(sums: NDArray[np.float64], sizes: NDArray[Any]) -> tuple[float, float]:
    """The percentile bootstrap interval of the mean per token, whole rows drawn with replacement.

    `sums` [rows]: of each row's tokens; `sizes` [rows]: how many there are. The draws are the same at every call.
    """
    import numpy as np

    picks = np.random.default_rng(0).integers(0, len(sums), (DRAWS, len(sums)))
    means = sums[picks].sum(1) / sizes[picks].sum(1)
    low, high = np.quantile(means, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def _mean(rows: Sequence[NDArray[np.float32]]) -> float | None:
    import numpy as np

    return float(np.concatenate(rows).mean()) if rows else None


def largest_difference(reference: RowScores, other: RowScores) -> float | None:
    """Of any log-probability of a row; None where only the top ones are known."""
    import numpy as np

    return None if reference.full is None or other.full is None else float(np.abs(reference.full - other.full).max())
