"""Comparing two sequences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def first_difference(a: Sequence[Any], b: Sequence[Any]) -> int | None:
    """The first index at which two sequences differ: the length of the shorter one if it begins the longer one; None if they are equal."""
    shorter = min(len(a), len(b))
    place = next((index for index in range(shorter) if a[index] != b[index]), shorter)
    return None if place == len(a) == len(b) else place
