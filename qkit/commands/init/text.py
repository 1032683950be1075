"""Writes a recipe as YAML in which every value has its reason beside it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import yaml

from qkit.core.errors import printable, short

WIDTH = 110  # of a line with its reason; a longer reason goes above the line
REASON = 300  # characters of a reason


def written(draft: Mapping[str, Any], remarks: Sequence[str]) -> str:
    """The text of a recipe. `remarks`: the lines above it."""
    lines = [*(f"# {_one_line(remark, 400)}" for remark in remarks), *_lines(draft)]
    return "\n".join(lines) + "\n"


def _lines(draft: Mapping[str, Any]) -> Iterator[str]:
    previous = ""
    for name, section in draft.items():
        if isinstance(section, Mapping) or isinstance(draft.get(previous), Mapping):
            yield ""
        if isinstance(section, Mapping):
            yield f"{name}:"
            for key, (value, why) in section.items():
                yield from _line(key, value, why, "  ")
        else:
            value, why = section
            yield from _line(name, value, why, "")
        previous = name


def _line(key: str, value: Any, why: str, indent: str) -> Iterator[str]:
    text = f"{indent}{key}: {_value(value)}"
    reason = _one_line(why, REASON)
    if not reason:
        yield text
    elif len(text) + len(reason) + 4 <= WIDTH:
        yield f"{text}  # {reason}"
    else:
        yield from (f"{indent}# {reason}", text)


def _value(value: Any) -> str:
    dumped = yaml.safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=True, sort_keys=False)
    return dumped.removesuffix("\n").removesuffix("\n...")


def _one_line(text: str, limit: int) -> str:
    """Text for a comment: nothing in it ends the line."""
    return short(printable(" ".join("".join(sign if sign.isprintable() else " " for sign in text).split())), limit)
