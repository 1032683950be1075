"""Packs: several rows in one, each of which sees itself alone.

A pack is one row of tokens without an attention mask; positions that start again at 0 tell transformers where a document begins, and it
builds the block mask from them. That this holds for the model of a run is measured in qkit/isolation.py before the first step.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from qkit.fast.batches import IGNORED, SeededBatches, padded_length

if TYPE_CHECKING:
    import torch


def packed(lengths: Sequence[int], capacity: int) -> list[tuple[int, int]]:
    """For each row its pack and its first token's offset there: best fit, the longest rows first, of equal ones the earliest.

    A pack holds at most `capacity` tokens; a row that is longer has one to itself. A bit for every room that some pack has left finds
    the tightest fit without a look at the packs: 100,000 rows take a fraction of a second.
    """
    places = [(0, 0)] * len(lengths)
    packs_by_room: defaultdict[int, list[int]] = defaultdict(list)
    rooms, count = 0, 0  # bit r of `rooms`: there is a pack with room for r tokens
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        fits = rooms >> lengths[row] << lengths[row]
        room = (fits & -fits).bit_length() - 1 if fits else max(capacity, lengths[row])
        if not fits:
            packs_by_room[room].append(count)
            count += 1
        pack = packs_by_room[room].pop()
        places[row] = (pack, max(capacity, lengths[row]) - room)
        if not packs_by_room[room]:
            rooms &= ~(1 << room)
        packs_by_room[room - lengths[row]].append(pack)
        rooms |= 1 << room - lengths[row]
    return places


class PackBatches(SeededBatches):
    """A batch sampler: the rows of one pack at a time, in their places; packs in an order of seed and epoch."""

    def __init__(self, packs: Sequence[int], positions: Sequence[int], seed: int):
        super().__init__(seed)
        members: defaultdict[int, list[int]] = defaultdict(list)
        for row in sorted(range(len(packs)), key=lambda row: (packs[row], positions[row])):
            members[packs[row]].append(row)
        self.members = list(members.values())

    def batches(self, rng: random.Random) -> list[list[int]]:
        return rng.sample(self.members, len(self.members))


def collate_pack(rows: Sequence[Mapping[str, Any]], pad: int) -> dict[str, torch.Tensor]:
    """Rows ({input_ids, labels}) after each other as `input_ids`, `labels`, `position_ids` [1, tokens], and `lengths` [rows].

    The padding at the end is a document of its own. Documents may share a pack only because the first label of each is ignored: it would
    be predicted from the document before.
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
