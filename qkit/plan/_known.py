"""What the data stage knows of the rows and a plan needs. Before it has run, a plan assumes the most that the recipe allows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Known:
    """`labelled`: the most tokens with loss in one batch; `lengths`: (tokens, rows) by length; `labels`: how many. None, or (): unknown."""

    labelled: int | None = None
    lengths: tuple[tuple[int, int], ...] = ()
    labels: int | None = None


NOTHING = Known()


def by_length(lengths: Sequence[Sequence[int]]) -> tuple[tuple[int, int], ...]:
    """(tokens, rows) by length. `lengths`: [tokens, rows, labelled tokens] each, as data/summary.json has them."""
    return tuple((entry[0], entry[1]) for entry in lengths)
