"""How far one low-rank adapter is from the weighted sum of others, computed from the low-rank factors: no full-size product is made."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qkit.tensors.lora_deltas import Deltas, LowRank

if TYPE_CHECKING:
    import torch


def relative_difference(combined: Path, parts: Sequence[tuple[Path, float]]) -> float:
    """Frobenius norm of (delta of `combined` - sum of weight * delta of each part), divided by the norm of the sum; over all weights.

    Raises:
        MissingArtifact, ModelError: one of them is not an adapter, or is of a kind that cannot be merged.
    """
    whole, others = Deltas(combined), [(Deltas(adapter), weight) for adapter, weight in parts]
    names = whole.low_rank_weights().union(*(deltas.low_rank_weights() for deltas, _ in others))
    difference = size = 0.0
    for name in sorted(names):
        terms = [(delta, weight) for deltas, weight in others if (delta := deltas.low_rank(name, False)) is not None]
        size += _squared_norm(terms)
        total = whole.low_rank(name, False)
        negated = [(delta, -weight) for delta, weight in terms]
        difference += _squared_norm([*negated, (total, 1.0)] if total else negated)
    return float((difference / size) ** 0.5) if size else float(difference > 0)


def _squared_norm(terms: Sequence[tuple[LowRank, float]]) -> float:
    """Squared Frobenius norm of the sum of weight * scaling * up @ down, from the Gram matrices of the concatenated factors [ranks, ranks]."""
    if not terms:
        return 0.0
    up = _stacked((delta.up.T * (delta.scaling * weight) for delta, weight in terms))
    down = _stacked(delta.down for delta, _ in terms)
    return max(float(((up @ up.T) * (down @ down.T)).sum()), 0.0)


def _stacked(matrices: Iterable[torch.Tensor]) -> torch.Tensor:
    import torch

    return torch.cat([matrix.double() for matrix in matrices])
