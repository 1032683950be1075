"""How far one low-rank adapter is from the weighted sum of others, from their matrices alone: no product of a weight's size is made."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qkit.tensors.lora_deltas import LOW_RANK, Deltas, LowRank

if TYPE_CHECKING:
    import torch


def apart(combined: Path, parts: Sequence[tuple[Path, float]]) -> float:
    """Norm of (what `combined` changes - the sum of weight * what each of `parts` does), over that of the sum; over all weights.

    Raises:
        MissingArtifact, ModelError: one of them is no adapter, or of a kind that is not merged.
    """
    whole, others = Deltas(combined), [(Deltas(adapter), weight) for adapter, weight in parts]
    difference = size = 0.0
    for name in sorted(set().union(*(_changed(deltas) for deltas in (whole, *(one for one, _ in others))))):
        terms = [(delta, weight) for one, weight in others if (delta := one.low_rank(name, False)) is not None]
        size += _square(terms)
        made = whole.low_rank(name, False)
        difference += _square([*((delta, -weight) for delta, weight in terms), *([(made, 1.0)] if made else [])])
    return float((difference / size) ** 0.5) if size else float(difference > 0)


def _changed(deltas: Deltas) -> set[str]:
    """The weights that an adapter has a low-rank delta of."""
    return {f"{name.removesuffix(kind)}.weight" for kind in LOW_RANK for name in deltas.tensors if name.endswith(kind)}


def _square(terms: Sequence[tuple[LowRank, float]]) -> float:
    """Squared Frobenius norm of the sum of weight * scaling * up @ down: with all up side by side, of their products of rank by rank."""
    if not terms:
        return 0.0
    up = _stacked((delta.up.T * (delta.scaling * weight) for delta, weight in terms))
    down = _stacked(delta.down for delta, _ in terms)
    return max(float(((up @ up.T) * (down @ down.T)).sum()), 0.0)


def _stacked(matrices: Iterable[torch.Tensor]) -> torch.Tensor:
    import torch

    return torch.cat([matrix.double() for matrix in matrices])
