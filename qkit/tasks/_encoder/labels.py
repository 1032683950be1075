"""The labels of a data set: their names by id, and how many rows have them."""

from __future__ import annotations

from collections.abc import Sequence

from qkit.plugins.checks import SetRow
from qkit.recipe.schema import SPLITS


def names_in(rows: Sequence[SetRow]) -> list[str]:
    """The labels of the training rows: numbers in their order, names by the alphabet."""
    names = {name for row in rows if row.split == "train" for name in row.names}
    return sorted(sorted(names), key=int if all(name.isdecimal() for name in names) else None)  # "01" before "1"


def counts(rows: Sequence[SetRow], names: Sequence[str]) -> dict[str, dict[str, int]]:
    """By split: rows with each label; labels that only held-out rows have come last."""
    by_split: dict[str, dict[str, int]] = {split: dict.fromkeys(names, 0) for split in SPLITS}
    for row in rows:
        for name in row.names:
            by_split[row.split][name] = by_split[row.split].get(name, 0) + 1
    return by_split
