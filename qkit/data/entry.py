"""What the links of the chain hand on: a record with its place (`Sourced`), then what is known of each row it makes (`Entry`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from qkit.data.read import Broken, Record


@dataclass(frozen=True)
class Sourced:
    """A record, the split it was given for, and the number of its source there."""

    pool: str
    source: int
    record: Record | Broken


@dataclass
class Entry:
    """What is known of a record, or of one of the rows it makes (`part`). `rule`: the check under which it is dropped, or "".

    `record` counts records from 0, `candidate` the rows of the candidates file (-1: it has none). `key`: digest of the normalized prompt;
    `near`: MinHash signature. `names`: the labels of the row. `unread`: names in the record that nothing reads; `ignored`: the patterns of
    data.ignore that match one. `about`: what checks of the whole set need beside.
    """

    pool: str
    origin: int
    source: str
    line: int
    format: str
    record: int = 0
    part: int = 0
    candidate: int = -1
    sha256: str = ""
    key: str = ""
    group: str = ""
    label: str | None = None
    near: Any = None
    tokens: int = 0
    labelled_tokens: int = 0
    truncated_by: int = 0
    rule: str = ""
    reason: str = ""
    names: tuple[str, ...] = ()
    findings: tuple[tuple[str, str], ...] = ()
    unread: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    about: Any = None

    @property
    def place(self) -> str:
        return f"{self.source}:{self.line}"
