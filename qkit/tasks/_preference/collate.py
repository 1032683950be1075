"""Pairs as one padded batch, in which the prompt of each pair stands once: prompt, chosen answer, rejected answer, padding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from qkit.tasks._conversation.collate import collate

if TYPE_CHECKING:
    import torch

REFERENCE = ("reference_chosen", "reference_rejected")  # columns: summed log-probabilities of the reference model


def whole(record: Mapping[str, Any]) -> dict[str, Any]:
    """The columns of a prepared row that training reads: all its tokens and labels, and where the two answers begin."""
    return {
        "input_ids": [*record["input_ids"], *record["rejected_ids"]],
        "labels": [*record["labels"], *record["rejected_labels"]],
        "start": record["start"],
        "rejected_start": len(record["input_ids"]),
    }


def collate_pairs(rows: Sequence[Mapping[str, Any]], pad: int) -> dict[str, torch.Tensor]:
    """Rows of `whole` as `input_ids`, `labels` [pairs, longest], `starts` [pairs, 2] and `lengths` [pairs].

    `reference` [pairs, 2] fp32, if they have the columns REFERENCE.
    """
    import torch

    batch = collate(rows, pad)
    kept = {name: batch[name] for name in ("input_ids", "labels", "lengths")}
    kept["starts"] = torch.tensor([[row["start"], row["rejected_start"]] for row in rows])
    if REFERENCE[0] in rows[0]:
        kept["reference"] = torch.tensor([[row[name] for name in REFERENCE] for row in rows])
    return kept


def collate_rated(rows: Sequence[Mapping[str, Any]], pad: int) -> dict[str, torch.Tensor]:
    """The same of rated answers: `scored` [rows, longest] are the labels of both answers, `labels` those of the row's own alone.

    `desirable`: [rows], 1 for a good answer.
    """
    import torch

    batch = collate_pairs(rows, pad)
    scored = collate([{**row, "labels": row["scored"]} for row in rows], pad)["labels"]
    return {**batch, "scored": scored, "desirable": torch.tensor([row["desirable"] for row in rows])}
