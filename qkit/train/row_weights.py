"""Weights of rows (data.weight): a row's loss counts so much, and the divisor is the sum of the weights of the batch's labels."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from qkit.core.batching import IGNORED

if TYPE_CHECKING:
    import torch
    from datasets import Dataset


COLUMN = "weight"  # of train.parquet, and `weights` of a batch


def of_rows(rows: Dataset) -> list[float] | None:
    """The weight of each row; None if rows have none."""
    return list(rows[COLUMN]) if COLUMN in rows.column_names else None


def of_batch(weights: Iterable[float], batch: Mapping[str, torch.Tensor], packing: bool) -> torch.Tensor:
    """The weights of a batch whose rows have these: [rows] fp32; of a pack those of its tokens, [1, tokens], 0 for padding."""
    import torch

    rows = torch.tensor(list(weights), dtype=torch.float32)
    if not packing:
        return rows
    tokens = rows.repeat_interleave(batch["lengths"])
    return torch.nn.functional.pad(tokens, (0, batch["labels"].shape[1] - len(tokens)))[None]


def at(weights: torch.Tensor, rows: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """The weights [n] of n tokens of a batch, given their rows and places."""
    return weights[rows, places] if weights.dim() == 2 else weights[rows]


def divisor(batches: Iterable[Mapping[str, torch.Tensor]]) -> torch.Tensor:
    """The sum of the weights of all labels with loss, fp64; a row whose labels are numbers counts once."""
    import torch

    return torch.stack([_weighed(batch["labels"], batch["weights"]) for batch in batches]).sum()


def _weighed(labels: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    if labels.is_floating_point():
        return weights.double().sum()
    labelled = (labels != IGNORED).reshape(len(labels), -1)
    each = weights.double() if weights.dim() == 2 else weights.double()[:, None]
    return (each * labelled).sum()
