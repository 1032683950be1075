"""JSON as data has it: a number is finite, a key stands once, and what is too large for a float is kept as it was written."""

from __future__ import annotations

import json
import math
from typing import Any, NoReturn

from qkit.core.errors import short


class Struct(dict[str, Any]):
    """An object out of a table: it has the keys of all others there, and null where it has nothing. What is null in JSON is meant."""


class Rounded(float):
    """A number of a table that its loader may have rounded: what JSON writes as an integer beyond 2**63 is a float there."""


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no number in JSON")


def _finite(text: str) -> float:
    number = float(text)
    return number if math.isfinite(number) else _refuse(text)


class Twice(ValueError):
    """An object has a key twice: one of its values would be read and the other not."""


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        keys = [key for key, _ in pairs]
        raise Twice(f"an object has the key {short(repr(next(key for key in keys if keys.count(key) > 1)))} twice")
    return result


# json.loads takes NaN and Infinity, which nobody else reads, and would build a decoder for every line
DECODER = json.JSONDecoder(parse_constant=_refuse, parse_float=_finite, object_pairs_hook=_each_once)


def decode(text: str) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: it is none, has a number that is not finite, or an object that has a key twice.
        RecursionError: it is nested too deeply.
    """
    return DECODER.decode(text)
