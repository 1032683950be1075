"""Rows of token ids as padded batches, with a mask."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def padded(rows: Sequence[Mapping[str, Any]], pad: int) -> dict[str, torch.Tensor]:
    """`input_ids`, `attention_mask` and, where rows have them, `token_type_ids`: [rows, longest], padded on the right."""
    import torch

    width = max(len(row["input_ids"]) for row in rows)
    ids = torch.full((len(rows), width), pad)
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    types = torch.zeros((len(rows), width), dtype=torch.long)
    for index, row in enumerate(rows):
        length = len(row["input_ids"])
        ids[index, :length] = torch.tensor(row["input_ids"])
        mask[index, :length] = 1
        if row["token_type_ids"]:
            types[index, :length] = torch.tensor(row["token_type_ids"])
    batch = {"input_ids": ids, "attention_mask": mask}
    return {**batch, "token_type_ids": types} if rows[0]["token_type_ids"] else batch


def with_numbers(rows: Sequence[Mapping[str, Any]], pad: int) -> dict[str, torch.Tensor]:
    """Padded rows with `labels` [rows, n] fp32, as many numbers as each row has, and `lengths` [rows]."""
    import torch

    lengths = torch.tensor([len(row["input_ids"]) for row in rows])
    numbers = torch.tensor([row["labels"] for row in rows], dtype=torch.float32)
    return {**padded(rows, pad), "labels": numbers, "lengths": lengths}


def collate(rows: Sequence[Mapping[str, Any]], pad: int) -> dict[str, torch.Tensor]:
    """Padded rows with `labels` [rows], the id of each row's label, and `lengths` [rows]."""
    import torch

    lengths = torch.tensor([len(row["input_ids"]) for row in rows])
    return {**padded(rows, pad), "labels": torch.tensor([row["labels"][0] for row in rows]), "lengths": lengths}
