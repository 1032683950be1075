"""Strict JSON for data: numbers must be finite and keys unique; integers keep all their digits."""

from __future__ import annotations

import json
import math
from typing import Any, NoReturn

from qkit.core.errors import short


class Struct(dict[str, Any]):
    """An object from a table. It has the keys of all rows, with null where a row has no value; a null from JSON is intended."""


class Rounded(float):
    """A number that a table loader may have rounded: it stores integers beyond 2**63 as floats."""


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not a number in JSON")


def _finite(text: str) -> float:
    number = float(text)
    return number if math.isfinite(number) else _refuse(text)


class Twice(ValueError):
    """An object has a key twice, so one of the two values would be lost."""


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        keys = [key for key, _ in pairs]
        raise Twice(f"an object has the key {short(repr(next(key for key in keys if keys.count(key) > 1)))} twice")
    return result


# json.loads accepts NaN and Infinity, which other parsers reject, and would build a decoder for every line
DECODER = json.JSONDecoder(parse_constant=_refuse, parse_float=_finite, object_pairs_hook=_each_once)


def decode(text: str) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: the text is not JSON, or has a number that is not finite or an object with a duplicate key.
        RecursionError: it is nested too deeply.
    """
    return DECODER.decode(text)
