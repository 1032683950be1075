"""What tasks of every family ask of a text."""

from __future__ import annotations

import re
from collections.abc import Iterator

from qkit.plugins.example import RowError
from qkit.recipe.schema import Data, Evaluate, Recipe

SURROGATE = re.compile("[\ud800-\udfff]")
UNUSABLE = re.compile("[\ud800-\udfff\x00-\x08\x0b\x0c\x0e-\x1f\ufffd]")
NAMES = {"\x00": "NUL", "\ufffd": "the replacement character"}


def check_characters(text: str, where: str, section: Data) -> None:
    """Check a text for characters that it cannot have, or by data.clean.unicode should not.

    Raises:
        RowError: it contains one.
    """
    keep = section.clean.unicode == "keep"
    match = (SURROGATE if keep else UNUSABLE).search(text)
    if match:
        sign = match.group()
        name = NAMES.get(sign) or ("half a surrogate pair" if SURROGATE.match(sign) else "a control character")
        raise RowError(f"{where} contains U+{ord(sign):04X} ({name})", "malformed" if keep else "unicode")


def preference_clashes(recipe: Recipe, section: str = "") -> Iterator[tuple[tuple[str | int, ...], str]]:
    """The sections of pairs of answers and of rated ones, each for the task of its name; `section`: the one that the task has."""
    for name in ("preference", "feedback"):
        values = getattr(recipe, name)
        if name != section and values != type(values)():
            yield (name,), f"{name} is for task={name}, and not for task={recipe.task}: remove it"


def windows_clashes(recipe: Recipe) -> Iterator[tuple[tuple[str | int, ...], str]]:
    """The settings of answers in a context, for a task that has none."""
    only = f"is for task=answer, and not for task={recipe.task}: remove it"
    if recipe.data.stride is not None:
        yield ("data", "stride"), f"data.stride={recipe.data.stride} {only}"
    if recipe.evaluate.max_answer_tokens != Evaluate().max_answer_tokens:
        longest = f"evaluate.max_answer_tokens={recipe.evaluate.max_answer_tokens}"
        yield ("evaluate", "max_answer_tokens"), f"{longest} {only}"
