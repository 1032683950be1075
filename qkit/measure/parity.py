"""How far an opened artifact is from the model that was trained, per completion token of the held-out rows.

The reference model is the adapter on its base, computed in fp32. Computed in bf16, as in training, it is already at some distance from that,
and so is every artifact that computes in 16 bits, through no fault of its own. An artifact is judged by what exceeds this rounding and chance.
The bootstrap samples whole rows, because the tokens of one row are not independent.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from qkit.measure import scores as measure_scores
from qkit.measure.divergence import Distances, row_sums
from qkit.plugins.runtime import RowScores
from qkit.tasks._distributions import divergence

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from qkit.measure.divergence import Distance


CONFIDENCE = 0.95  # of the intervals, two-sided
DRAWS = 2000
FEW_TOKENS = 8  # a shorter row counts as if it had this many tokens: one token can differ by chance
# What rounding to a dtype does, as a multiple of the reference model's distance from fp32 when it is computed in bf16. A divergence grows
# with the square of the relative error: fp16 has three bits more than bf16, fp32 sixteen.
ROUNDING = {"bfloat16": 1.0, "float16": 2.0**-6, "float32": 2.0**-32}
SPARE = 3.0  # times that: other kernels round in other places, and a rounded sum is not always rounded evenly


@dataclass(frozen=True)
class Reference:
    """The reference model (base + adapter as trained) in fp32: its scores of the first held-out rows, and the base's of the first few of them.

    `rounding`: for each of these rows, the sum over its tokens of KL(this || the same adapter computed in bf16), in nats; () where it was not
    measured. `bf16`: the whole distance of that computation. `distance`: the task's, between two models' scores of a row.
    """

    scores: tuple[RowScores, ...]
    base: tuple[RowScores, ...]
    rounding: tuple[float, ...] = ()
    bf16: Parity | None = None
    distance: Distance = divergence


@dataclass(frozen=True)
class Parity:
    """Distance to the reference model. KL(reference || artifact) in nats per completion token; `top1`: share of tokens with the same top token.

    `kl_low`, `kl_high`: interval of `kl_mean` over rows. `rounding`: mean KL of the reference model computed in bf16, on the same rows.
    `beyond`: lower end of the interval of `kl_mean` less what rounding may do in the artifact's dtypes. None where they were not measured.
    `kl_base`: mean KL(base model || artifact) on the rows that the base was scored on; `kl_base_live`: mean KL(reference || artifact) on these
    rows; `nearer_base`: lower end of the interval of their difference. None without such rows. `worst_row`: the mean of the farthest row, less
    what rounding may do there: an interval over rows does not show damage in only a few of them. `max_difference`: the largest difference of
    any log-probability, None where only the top ones are known. `over`: what the divergence is summed over.
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
        """Whether the artifact is closer to the base model than to the reference model, by more than chance: the fine-tune is not in it."""
        if self.nearer_base is not None:
            return self.nearer_base > 0
        return self.kl_base is not None and self.kl_base_live is not None and self.kl_base < self.kl_base_live

    @property
    def excess(self) -> float:
        """How much farther than rounding to 16 bits explains the artifact certainly is from the reference model, in nats per token."""
        return self.kl_mean if self.beyond is None else self.beyond

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class ArtifactDistances:
    """Collects an artifact's distances to the reference model and to the base, row by row."""

    def __init__(self, reference: Reference):
        self.reference = reference
        self.to_reference = Distances(reference.scores, reference.distance)
        self.to_base: list[NDArray[np.float32]] = []
        self.differences: list[float | None] = []

    def add(self, scores: RowScores) -> None:
        """The artifact's scores of the next held-out row."""
        index = len(self.to_reference.targets)
        if index < len(self.reference.scores):
            self.differences.append(largest_difference(self.reference.scores[index], scores))
        if index < len(self.reference.base):
            self.to_base.append(self.reference.distance(self.reference.base[index], scores))
        self.to_reference.add(scores)

    def parity(self, computed: str = "bfloat16", weights: str = "bfloat16") -> Parity:
        """The figures, as `measure` returns them."""
        figures = self.to_reference.figures("the artifact")
        del figures["kl_max"]
        return Parity(
            **figures,
            heldout_loss=measure_scores.mean_loss(self.to_reference.targets),
            max_difference=max((value for value in self.differences if value is not None), default=None),
            **self._beyond_rounding(SPARE * (ROUNDING[computed] + ROUNDING[weights])),
            **self._compared_with_base(),
        )

    def _beyond_rounding(self, times: float) -> dict[str, Any]:
        """The interval of the mean, and what certainly exceeds `times` the rounding of bf16."""
        import numpy as np

        sums, sizes = self.to_reference.sums(), np.array([len(row) for row in self.to_reference.kl])
        low, high = interval(sums, sizes)
        if not self.reference.rounding:
            return {"kl_low": low, "kl_high": high}
        rounding = np.array(self.reference.rounding[: len(sums)])
        mean = float(rounding.sum() / sizes.sum())
        beyond, _ = interval(sums - times * rounding, sizes)
        excess = sums - times * np.maximum(rounding, mean * sizes)
        worst = float(np.max(excess / np.maximum(sizes, FEW_TOKENS)))
        return {"kl_low": low, "kl_high": high, "rounding": mean, "beyond": beyond, "worst_row": worst}

    def _compared_with_base(self) -> dict[str, Any]:
        """The distance to the base alone, and that to the reference model on the same rows."""
        import numpy as np

        if not self.to_base:
            return {}
        same_rows = self.to_reference.kl[: len(self.to_base)]
        sizes = np.array([len(row) for row in self.to_base])
        nearer, _ = interval(row_sums(same_rows) - row_sums(self.to_base), sizes)
        return {"kl_base": _mean(self.to_base), "kl_base_live": _mean(same_rows), "nearer_base": nearer}


def measure(
    reference: Reference, scores: Iterable[RowScores], computed: str = "bfloat16", weights: str = "bfloat16"
) -> Parity:
    """The parity of an artifact from its scores of all held-out rows, in order.

    `computed`: the dtype that the artifact computes in; `weights`: the dtype of the weights that the adapter was added to. Each rounds once.

    Raises:
        ParityFailed: a log-probability is NaN or infinite (gate `numbers`).
    """
    distances = ArtifactDistances(reference)
    for row in scores:
        distances.add(row)
    return distances.parity(computed, weights)


def interval(sums: NDArray[np.float64], sizes: NDArray[Any]) -> tuple[float, float]:
    """The percentile bootstrap interval of the mean per token; whole rows are sampled with replacement.

    `sums` [rows]: the sum of each row's values; `sizes` [rows]: its number of tokens. Every call draws the same rows, so that figures of two
    artifacts, or of two releases of qkit, can be compared to the last digit; scipy.stats.bootstrap would draw others.
    """
    import numpy as np

    picks = np.random.default_rng(0).integers(0, len(sums), (DRAWS, len(sums)))
    means = sums[picks].sum(1) / sizes[picks].sum(1)
    low, high = np.quantile(means, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def _mean(rows: Sequence[NDArray[np.float32]]) -> float:
    import numpy as np

    return float(np.concatenate(rows).mean())


def largest_difference(reference: RowScores, other: RowScores) -> float | None:
    """The largest difference of a log-probability in a row; None where only the top ones are known."""
    import numpy as np

    return None if reference.full is None or other.full is None else float(np.abs(reference.full - other.full).max())
