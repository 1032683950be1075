"""Checks before training: what each one found, in which rows, how serious it is, and how to fix it.

A check that fails stops the stage `data`, because training on these rows would teach the model something wrong. A task says which checks over
rows there are (`Task.CHECKS`), and adds those that need its whole data set (`Task.set_checks`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

NAMED_ROWS = 5  # how many of the rows that it found a check names


@dataclass(frozen=True)
class Place:
    """Where a row comes from: the file or data set, and the line."""

    source: str
    line: int

    def __str__(self) -> str:
        return f"{self.source}:{self.line}"


@dataclass(frozen=True)
class Check:
    """`status`: pass, warn, fail or skipped. `found`: how many rows the check found; `rows`: the first of them."""

    name: str
    status: str
    message: str
    found: int = 0
    rows: tuple[Place, ...] = ()
    remedy: str = ""


@dataclass(frozen=True)
class Kind:
    """A check over rows. `passes`: its message when it finds nothing; `problem`: what is wrong with the rows that it finds, and `status`
    how serious that is."""

    passes: str
    problem: str
    status: str
    remedy: str


@dataclass(frozen=True)
class SetRow:
    """A row that is used, as checks of the whole set see it.

    `split`: train, validation or test; `question`: a digest of what the model reads, without case and white space; `names`: its labels.
    `format`: in which its record was read; `about`: what else the task's own checks of the whole set need, from `about` of its row.
    """

    split: str
    question: str
    names: tuple[str, ...]
    place: Place
    format: str = ""
    about: Any = None


# Checks over rows that tasks share. The code that examines a row describes what it finds there; these texts say what that means.
COMMON: Mapping[str, Kind] = {
    "malformed": Kind(
        "every record has a known format",
        "cannot be read",
        "fail",
        "fix them, map their columns with data.columns, or drop them with data.clean.malformed=drop",
    ),
    "unicode": Kind("no invalid characters", "contain invalid characters", "warn", "fix the encoding at the source"),
    "empty": Kind("no empty rows", "are empty", "warn", "check how these rows were made"),
    "duplicate": Kind(
        "no exact duplicates",
        "are exact duplicates",
        "warn",
        "if repeating rows is intended, keep them with data.clean.duplicate=keep",
    ),
    "near_duplicate": Kind(
        "no near-duplicates",
        "are near-duplicates",
        "warn",
        "look at a few; data.clean.near_duplicate=drop keeps the first of each group",
    ),
    "vocabulary": Kind(
        "every token id is in the model's vocabulary",
        "contain token ids that are not in the model's vocabulary",
        "fail",
        "tokenize with this model's own tokenizer",
    ),
    "rounded": Kind(
        "no number was rounded when its table was read",
        "contain numbers beyond 2**63 that the table stores as floats: if they were integers, their last digits are lost",
        "warn",
        "write such numbers as text, or provide the rows as JSON lines, which keep every digit",
    ),
}
