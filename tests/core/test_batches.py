"""Batches of rows of like length: every row once, the same number in each epoch, and other company in each."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator

import pytest

from qkit.core.batching import POOL_BATCHES, TokenBudgetBatches, pool_rows


def epochs(batches: TokenBudgetBatches, count: int) -> Iterator[list[list[int]]]:
    for epoch in range(count):
        batches.set_epoch(epoch)
        yield list(batches)


def lengths_of(rows: int) -> list[int]:
    draw = random.Random(1)
    return [min(64, 4 + int(draw.expovariate(1 / 12))) for _ in range(rows)]


@pytest.mark.parametrize("rows", [1, 31, 33, 385, 3000])
def test_every_row_is_in_each_epoch_once(rows: int) -> None:
    lengths = lengths_of(rows)
    for epoch in epochs(TokenBudgetBatches(lengths, 2048, 0, 1, 32), 3):
        assert sorted(row for batch in epoch for row in batch) == list(range(rows))
        assert len(epoch) == math.ceil(rows / 32) and max(map(len, epoch)) <= 32


def test_few_rows_meet_others_in_each_epoch() -> None:
    """Sorted all at once, most rows of a batch would be together again: those of their length."""
    lengths = lengths_of(385)

    def again(budget: int) -> float:
        first, second = epochs(TokenBudgetBatches(lengths, budget, 0, 1, 32), 2)
        partners = {row: {*batch} for batch in first for row in batch}
        shared = [len(partners[row] & {*batch}) - 1 for batch in second for row in batch]
        return sum(shared) / sum(len(batch) - 1 for batch in second for _ in batch)

    assert again(2048) < 0.15 < 0.5 < again(32 * max(lengths) - 1)  # by chance, 31 of 384 others


@pytest.mark.parametrize(("rows", "most"), [(10_003, 1.1), (100_000, 1.07)])
def test_many_rows_are_hardly_padded(rows: int, most: float) -> None:
    lengths = lengths_of(rows)
    (epoch,) = epochs(TokenBudgetBatches(lengths, 2048, 0, 1, 32), 1)
    padded = sum(max(lengths[row] for row in batch) * len(batch) for batch in epoch)
    assert padded < most * sum(lengths)


def test_pools_are_whole_batches() -> None:
    assert pool_rows(lengths_of(385), 2048, 32) == 32 and pool_rows(lengths_of(3000), 2048, 32) == 11 * 32
    assert pool_rows(lengths_of(100_000), 2048, 32) == POOL_BATCHES * 32
    assert pool_rows([65] * 100, 2048, 32) == 100 and pool_rows([5] * 100, 2048, math.inf) == 100
