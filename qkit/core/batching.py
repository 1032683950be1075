"""Batches by token budget: rows of similar length together, right-padded, without an attention mask.

Under causal attention a real token never sees the padding on its right, so no mask is needed, and SDPA uses its fast causal path.
With rows of similar length, little of a batch is padding. Reference: TRL's collator, in tests/train/test_fast.py.
"""

from __future__ import annotations

import math
import random
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence

IGNORED = -100  # the label of a token that carries no loss: torch's cross_entropy skips it
LENGTH_STEP = (
    16  # of long rows, which are padded to a multiple of this, and shuffled among those of the same padded length
)


def within_budget(lengths: Iterable[int], budget: float, most: float = math.inf) -> Iterator[range]:
    """Cut rows, in their order, into batches that hold at most `budget` tokens when padded to the longest row of the batch.

    Args:
        lengths: tokens of each row.
        budget: tokens of a batch, padding included. A row that is longer has a batch to itself.
        most: rows of a batch.

    Yields:
        The indices of the rows of each batch; no batch is empty.
    """
    begin = rows = longest = 0
    for length in lengths:
        longest = max(longest, length)
        if rows and (rows >= most or longest * (rows + 1) > budget):
            yield range(begin, begin + rows)
            begin, rows, longest = begin + rows, 0, length
        rows += 1
    if rows:
        yield range(begin, begin + rows)


class SeededBatches:
    """A batch sampler whose order depends on the seed and the epoch only, so a run that resumes from a checkpoint sees the same batches as one
    without an interruption. The number of batches is the same in every epoch.
    """

    def __init__(self, seed: int):
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Select the epoch; accelerate's data loader calls this at the start of each."""
        self.epoch = epoch

    def batches(self, rng: random.Random) -> list[list[int]]:
        """Return the batches of one epoch, as lists of row indices."""
        raise NotImplementedError

    def __len__(self) -> int:
        return len(list(iter(self)))

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches(random.Random(self.seed * 1_000_003 + self.epoch)))


class TokenBudgetBatches(SeededBatches):
    """Batches of at most `most` rows whose padded size stays within `budget` tokens. `step`: rows are padded to a multiple of this."""

    def __init__(self, lengths: Sequence[int], budget: int, seed: int, step: int = LENGTH_STEP, most: float = math.inf):
        super().__init__(seed)
        self.lengths = [padded_length(length, step) for length in lengths]
        self.budget = budget
        self.most = most

    def batches(self, rng: random.Random) -> list[list[int]]:
        order = list(range(len(self.lengths)))
        rng.shuffle(order)
        order.sort(key=lambda index: self.lengths[index])
        lengths = [self.lengths[index] for index in order]
        batches = [[order[place] for place in batch] for batch in within_budget(lengths, self.budget, self.most)]
        rng.shuffle(batches)
        return batches


def count_batches(
    lengths: Sequence[tuple[int, int]], budget: int, step: int = LENGTH_STEP, most: float = math.inf
) -> int:
    """Return how many batches TokenBudgetBatches makes. `lengths`: pairs of a length in tokens and the number of rows of that length."""
    rows_by_length: dict[int, int] = {}
    for tokens, rows in lengths:
        length = padded_length(tokens, step)
        rows_by_length[length] = rows_by_length.get(length, 0) + rows
    batches = filled = 0  # `filled`: rows of the last batch
    for length, left in sorted(rows_by_length.items()):
        rows, fitting = left, int(min(budget // length, most))
        while rows:
            room = fitting - filled
            if batches == 0 or room < 1:  # a row longer than the budget is a batch of its own
                batches, filled, room = batches + 1, 0, max(1, fitting)
            taken = min(rows, room)
            rows, filled = rows - taken, filled + taken
    return batches


def padded_length(length: int, step: int = LENGTH_STEP) -> int:
    """Round a length up to `step`. Each distinct shape makes a CPU backend compile and keep kernels, and fragments the heap."""
    return -(-length // step) * step


def part_sizes(rows: int, parts: int) -> list[int]:
    """Return the rows of each part of a batch that is divided as evenly as possible; no part is empty."""
    size, larger = divmod(rows, min(parts, rows))
    return [size + (part < larger) for part in range(min(parts, rows))]


def packed(lengths: Sequence[int], capacity: int) -> list[tuple[int, int]]:
    """Assign rows to packs by best fit, the longest rows first, and of equal ones the earliest.

    A pack holds at most `capacity` tokens; a longer row has a pack of its own. One bit for each amount of free space that some pack has finds
    the tightest fit without a search: 100,000 rows take a fraction of a second.

    Returns:
        For each row, its pack and the offset of its first token there.
    """
    places = [(0, 0)] * len(lengths)
    packs_by_room: defaultdict[int, list[int]] = defaultdict(list)
    rooms, count = 0, 0  # bit r of `rooms`: some pack has room for exactly r more tokens
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
    """A batch sampler: each batch is the rows of one pack, in order; the order of the packs depends on seed and epoch."""

    def __init__(self, packs: Sequence[int], positions: Sequence[int], seed: int):
        super().__init__(seed)
        members: defaultdict[int, list[int]] = defaultdict(list)
        for row in sorted(range(len(packs)), key=lambda row: (packs[row], positions[row])):
            members[packs[row]].append(row)
        self.members = list(members.values())

    def batches(self, rng: random.Random) -> list[list[int]]:
        return rng.sample(self.members, len(self.members))
