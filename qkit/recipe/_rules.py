"""Rules for the values of entries that a library takes by name, in a mapping or in a text."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Rule:
    """The values that an entry takes. `words`: them, for a message."""

    words: str
    allows: Callable[[Any], bool]


def as_number(text: str) -> int | float | str:
    """A text as the number that it is, if it is one."""
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return text


def is_number(value: Any) -> bool:
    """Whether a value is a finite number, and not true or false."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def number(words: str, allows: Callable[[float], bool]) -> Rule:
    """A rule for numbers."""
    return Rule(words, lambda value: is_number(value) and allows(value))


def whole(least: int) -> Rule:
    """A rule for whole numbers from `least` on."""
    return Rule(
        f"a whole number of at least {least}",
        lambda value: isinstance(value, int) and not isinstance(value, bool) and value >= least,
    )


def one_of(*names: str) -> Rule:
    """A rule for a choice of words."""
    return Rule(f"one of {', '.join(names)}", lambda value: value in names)


ABOVE_0 = number("a number above 0", lambda value: value > 0)
AT_LEAST_0 = number("a number of at least 0", lambda value: value >= 0)
SHARE = number("a share of at least 0 and below 1", lambda value: 0 <= value < 1)
INSIDE = number("a share above 0 and below 1", lambda value: 0 < value < 1)
