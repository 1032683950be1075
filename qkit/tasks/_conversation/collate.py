"""Collates rows into padded batches, or into packs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from qkit.core.batching import IGNORED, padded_length

if TYPE_CHECKING:
    import torch


def collate(rows: Sequence[Mapping[str, Any]], pad: int) -> dict[str, torch.Tensor]:
    """Rows ({input_ids, labels}) as `input_ids`, `labels`, `position_ids` [rows, longest], and `lengths` [rows]."""
    import torch

    lengths = torch.tensor([len(row["input_ids"]) for row in rows])
    longest = padded_length(int(lengths.max()))
    input_ids = torch.full((len(rows), longest), pad)
    labels = torch.full((len(rows), longest), IGNORED)
    for index, row in enumerate(rows):
        input_ids[index, : lengths[index]] = torch.tensor(row["input_ids"])
        labels[index, : lengths[index]] = torch.tensor(row["labels"])
    positions = torch.arange(longest).expand(len(rows), longest)
    return {"input_ids": input_ids, "labels": labels, "position_ids": positions, "lengths": lengths}


def collate_pack(rows: Sequence[Mapping[str, Any]], pad: int) -> dict[str, torch.Tensor]:
    """Rows ({input_ids, labels}) concatenated as `input_ids`, `labels`, `position_ids` [1, tokens], and `lengths` [rows].

    The padding at the end is a separate document. The first label of each document must be ignored, since the token before it belongs to
    another document.
    """
    import torch

    lengths = torch.tensor([len(row["input_ids"]) for row in rows])
    filler = padded_length(int(lengths.sum())) - int(lengths.sum())
    ids = [token for row in rows for token in row["input_ids"]] + [pad] * filler
    labels = [label for row in rows for label in row["labels"]] + [IGNORED] * filler
    positions = torch.cat([torch.arange(length) for length in (*lengths.tolist(), filler)])
    return {
        "input_ids": torch.tensor([ids]),
        "labels": torch.tensor([labels]),
        "position_ids": positions[None],
        "lengths": lengths,
    }
