"""Sequences of models that differ in their number of layers only: what a layer adds, and so the sequence of any number of layers.

A training step of a model with equal layers is P F^n M B^n S: n times the forward pass F of a layer, then n times its backward pass B. Three
short models tell the parts, and whether it is so at all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

T = TypeVar("T")


def extended(first: Sequence[T], second: Sequence[T], third: Sequence[T], layers: int) -> list[T] | None:
    """The sequence of a model with `layers` more layers than the first; None if layers do not add one or two equal blocks each.

    `second`, `third`: of models with one and two more layers.
    """
    for parts in _parts(list(first), list(second)):
        if _joined(parts, 2) == list(third):
            return _joined(parts, layers)
    return None


# What is before, between and behind the blocks, and the blocks: [before, block, between, block, behind].
_Parts = tuple[list[T], list[T], list[T], list[T], list[T]]


def _parts(shorter: list[T], longer: list[T]) -> Iterator[_Parts[T]]:
    """The ways in which two blocks, of which one may be empty, make the longer sequence of the shorter one."""
    added = len(longer) - len(shorter)
    if added < 0:
        return
    same = _common(shorter, longer)
    behind = _common(shorter[::-1], longer[::-1])
    begin, end = same, max(same, len(shorter) - behind)
    if begin + behind >= len(shorter):  # it may be one block, or none
        yield shorter[:begin], longer[begin : begin + added], shorter[begin:], [], []
    between = shorter[begin:end]
    for size in range(added + 1):
        if longer[begin + size : end + size] == between:
            yield (
                shorter[:begin],
                longer[begin : begin + size],
                between,
                longer[end + size : end + added],
                shorter[end:],
            )


def _common(one: Sequence[T], other: Sequence[T]) -> int:
    """How many elements two sequences begin with alike."""
    for place, (left, right) in enumerate(zip(one, other, strict=False)):
        if left != right:
            return place
    return min(len(one), len(other))


def _joined(parts: _Parts[T], times: int) -> list[T]:
    before, one, between, two, behind = parts
    return [*before, *one * times, *between, *two * times, *behind]
