"""Reads CoNLL columns: a word and its tag on each line, and a blank line between sentences.

A file with tabs may have spaces, and anything else, within a word; without tabs, runs of spaces separate the columns. Only these count as
separators: words such as a no-break space or a line separator (U+2028) stay words.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from qkit.core.errors import short

BLANK = " \t"
BLANKS = re.compile(r"[ \t]+")
LINE_END = "\r\n"
MARK = "\ufeff"  # of byte order, before the first line
DOCUMENT = "-DOCSTART-"  # the word of a line that begins a document
TAG = re.compile(r"[A-Z]-.+|[A-Z_]+")  # tells a row whose word is `#` from a remark of as many words
SHOWN = 60  # characters of a line that a reason quotes


@dataclass(frozen=True, slots=True)
class Sentence:
    """Words and their tags. `line`: of the first word, counted from 1."""

    line: int
    words: tuple[str, ...]
    tags: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class BadSentence:
    """A sentence that cannot be read: the first `line` in it that is wrong, and why."""

    line: int
    reason: str


@dataclass(frozen=True, slots=True)
class Columns:
    """Which columns hold word and tag, counted from 0, or from the end with -1."""

    word: int = 0
    tag: int = -1


FIRST_AND_LAST = Columns()


@dataclass(frozen=True, slots=True)
class Layout:
    """How the first sentence is divided, as its row at `line` is; the others must be divided alike."""

    line: int
    tabs: bool
    columns: int


Numbered = tuple[int, str]  # a line, and its number


def read_sentences(lines: Iterable[str], columns: Columns = FIRST_AND_LAST) -> Iterator[Sentence | BadSentence]:
    """Read the sentences of a file.

    A line `# ...` is a remark, unless it has a tag where the others have theirs: the word may be `#`. A line `#...` is one if it has several
    words, but not as many as columns, or a `=`; else it is a word such as `#tag`. A line whose word is -DOCSTART- is left out.

    Args:
        lines: as a text file yields them, or without their ends. Do not use str.splitlines: it also cuts at characters that words may have.
        columns: of word and tag; the first and the last by default.

    Yields:
        Each sentence; a BadSentence where a line lacks its word or tag. A column that is counted from the end must have the same number in
        every line: else a line without a tag would give another column for it.
    """
    layout = None
    for block in _blocks(lines):
        layout = layout or _layout(block)
        if rows := [(number, line) for number, line in block if not _is_remark(line, layout)]:
            yield _sentence(rows, layout, columns)


def _blocks(lines: Iterable[str]) -> Iterator[list[Numbered]]:
    """The lines between blank ones and starts of documents."""
    block: list[Numbered] = []
    for number, raw in enumerate(lines, 1):
        line = (raw.removeprefix(MARK) if number == 1 else raw).rstrip(LINE_END)
        if line.strip(BLANK) and BLANKS.split(line, maxsplit=1)[0] != DOCUMENT:
            block.append((number, line))
        elif block:
            yield block
            block = []
    if block:
        yield block


def _layout(block: Sequence[Numbered]) -> Layout | None:
    """How most rows of a sentence are divided; nothing if they have one column."""
    tabs = any("\t" in line for _, line in block)
    rows = [(number, line) for number, line in block if not _is_remark(line, Layout(0, tabs, 0))]
    counts = Counter(len(_fields(line, tabs)) for _, line in rows)
    columns = max(counts, key=lambda columns: (counts[columns], columns), default=1)
    if columns == 1:
        return None
    line = next(number for number, line in rows if len(_fields(line, tabs)) == columns)
    return Layout(line, tabs, columns)


def _is_remark(line: str, layout: Layout | None) -> bool:
    if not line.startswith("#"):
        return False
    first, *others = _fields(line, layout is not None and layout.tabs)
    if layout and layout.tabs:
        return first.startswith("# ") or (not others and (" " in first or "=" in first))
    if not others:
        return "=" in first
    tagged = TAG.fullmatch(others[-1]) is not None
    if layout is None or not layout.columns:
        return first == "#" or not tagged
    alike = len(others) + 1 == layout.columns
    return not (alike and tagged) if first == "#" else not alike


def _fields(line: str, tabs: bool) -> list[str]:
    return [field.strip(" ") for field in line.split("\t")] if tabs else BLANKS.split(line.strip(BLANK))


def _sentence(rows: Sequence[Numbered], layout: Layout | None, columns: Columns) -> Sentence | BadSentence:
    words, tags = [], []
    for number, line in rows:
        fields = _fields(line, layout is not None and layout.tabs)
        if reason := _problem(fields, layout, columns):
            return BadSentence(number, f"{short(line, SHOWN)!r} {reason}")
        words.append(fields[columns.word])
        tags.append(fields[columns.tag])
    return Sentence(rows[0][0], tuple(words), tuple(tags))


def _problem(fields: Sequence[str], layout: Layout | None, columns: Columns) -> str:
    """Why a line has no word and tag, or nothing."""
    count = len(fields)
    if count == 1:
        return "has one column: its tag is missing"
    if layout and count != layout.columns and min(columns.word, columns.tag) < 0:
        separated = "tabs" if layout.tabs else "spaces"
        return (
            f"has {count} columns, separated by {separated}, where line {layout.line} has {layout.columns}: "
            "its tag is missing, or its word is divided"
        )
    for name, column in (("word", columns.word), ("tag", columns.tag)):
        if not -count <= column < count:
            return f"has {count} columns: column {column}, of the {name}, is missing (columns are counted from 0)"
        if not fields[column]:
            return f"has an empty column {column}: its {name} is missing"
    return ""
