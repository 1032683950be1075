"""One row between the workers and the ledger."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from qkit.data.read import Broken, Record


@dataclass(frozen=True)
class Sourced:
    """A record with the split it was given for and the number of its source there."""

    pool: str
    source: int
    record: Record | Broken


@dataclass
class Entry:
    """What is known of a record, or of one of the rows it makes. `rule`: the check under which it is dropped, or "".

    `record` counts records from 0, `row` the rows of the candidates file (-1: none). `key` is the digest of its prompt in plain writing.
    `unread`: what of the record nothing reads; `ignored`: the patterns of data.ignore that match a name of it.
    """

    pool: str
    origin: int
    source: str
    line: int
    format: str
    record: int = 0
    part: int = 0
    row: int = -1
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
    findings: tuple[tuple[str, str], ...] = ()
    unread: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
