"""The largest batches that training makes: as rows of equal length, because a batch is padded to its longest row."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

from qkit.core.batching import within_budget
from qkit.plan._known import Known
from qkit.recipe.schema import Recipe


class BatchShape(NamedTuple):
    """Rows of a micro-batch, and the tokens of each, padding included."""

    rows: int
    length: int


def largest(recipe: Recipe, known: Known) -> tuple[BatchShape, ...]:
    """The micro-batches that can need most: that with most tokens, and that with most pairs of tokens, which is often the same.

    Of the rows, if their lengths are known; else of any that the recipe allows.
    """
    batches = set(_of_rows(recipe, known) if known.lengths else _of_any_rows(recipe))
    tokens = max(batches, key=lambda batch: (batch.rows * batch.length, batch.length))
    pairs = max(batches, key=lambda batch: batch.rows * batch.length**2)
    divided = (BatchShape(-(-batch.rows // recipe.micro_batches), batch.length) for batch in (tokens, pairs))
    return tuple(dict.fromkeys(divided))


def _of_any_rows(recipe: Recipe) -> Iterator[BatchShape]:
    """Rows of full length; and one row more, of the length that the budget then leaves."""
    length, budget = recipe.data.max_length, recipe.data.batch_tokens
    most = recipe.data.batch_rows or budget
    full = max(1, min(budget // length, most))
    yield BatchShape(full, length)
    if full < most and budget // (full + 1):
        yield BatchShape(full + 1, min(length, budget // (full + 1)))


def _of_rows(recipe: Recipe, known: Known) -> Iterator[BatchShape]:
    """The batches that training makes of rows of these lengths: shortest rows first, as long as the budget lasts."""
    lengths = _kept(recipe, known)
    for batch in within_budget(lengths, recipe.data.batch_tokens, recipe.data.batch_rows or math.inf):
        yield BatchShape(len(batch), lengths[batch.stop - 1])


def _kept(recipe: Recipe, known: Known) -> list[int]:
    """The length of each row, in order; longer rows are cut to max_length or dropped. A row of full length if none is left."""
    most, cut = recipe.data.max_length, recipe.data.too_long == "truncate"
    entries = [(min(tokens, most), rows) for tokens, rows in known.lengths if cut or tokens <= most]
    return sorted(tokens for tokens, rows in entries for _ in range(rows)) or [most]
