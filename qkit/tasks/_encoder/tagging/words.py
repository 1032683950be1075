"""Divides a text into words: at white space, or into runs of letters, digits and their marks, where every other sign is a word of its own.

By the latter, a span rarely begins or ends within a word. In scripts that write no spaces between words, each sign is one.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Mapping
from itertools import pairwise

ALONE = (  # first and last code point of Thai and Lao, kana, and Chinese characters
    *((0x0E00, 0x0EFF), (0x3040, 0x30FF), (0x3400, 0x4DBF), (0x4E00, 0x9FFF)),
    *((0xF900, 0xFAFF), (0x20000, 0x3FFFF)),
)


def word_offsets(text: str) -> list[tuple[int, int]]:
    """Return begin and end of each word, in code points."""
    begins = [place for place in range(len(text)) if not text[place].isspace() and _begins(text, place)]
    bounds = [*begins, len(text)]
    return [(begin, begin + len(text[begin:end].rstrip())) for begin, end in pairwise(bounds)]


def spaced_offsets(text: str) -> list[tuple[int, int]]:
    """Return begin and end of what white space parts, in code points."""
    return [match.span() for match in re.finditer(r"\S+", text)]


DIVIDED = "divided"  # the key in labels.json, of one of DIVISIONS
BY_KIND, BY_SPACE = "by kind of character", "at white space"
DIVISIONS: Mapping[str, Callable[[str], list[tuple[int, int]]]] = {BY_KIND: word_offsets, BY_SPACE: spaced_offsets}


def _begins(text: str, place: int) -> bool:
    """Whether a word begins at a sign that is no space."""
    if not place or text[place - 1].isspace():
        return True
    if _is_mark(text[place]):
        return False
    return not (_in_runs(text[place]) and _in_runs(_before(text, place)))


def _before(text: str, place: int) -> str:
    """The sign before a place, without the marks on it."""
    while place > 1 and _is_mark(text[place - 1]):
        place -= 1
    return text[place - 1]


def _is_mark(sign: str) -> bool:
    """Whether a sign belongs to the one before it: accents, vowel signs, joiners, variation selectors."""
    return unicodedata.category(sign) in ("Mn", "Mc", "Me", "Cf")


def _in_runs(sign: str) -> bool:
    return (sign.isalnum() or sign == "_") and not any(first <= ord(sign) <= last for first, last in ALONE)
