"""Finds the columns of a record that a task reads, by its table of names, and says which are missing, unknown or left over."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from fnmatch import fnmatchcase
from typing import Any

from qkit.core.errors import listed, nearest, short
from qkit.recipe.schema import Data

Table = Mapping[str, tuple[str, ...]]  # our names, and the columns that stand for them in public data sets


def column_of(ours: str, record: Mapping[str, Any], section: Data, table: Table) -> str | None:
    """The record's column for one of our names, or None: that which data.columns maps, else the first one of the table."""
    if ours in section.columns:
        return section.columns[ours] if section.columns[ours] in record else None
    taken = {*section.columns.values()}
    return next((name for name in table[ours] if name in record and name not in taken), None)


def missing(ours: str, record: Mapping[str, Any], section: Data, table: Table) -> str:
    """What is wrong with a record that has no column for one of our names."""
    if ours in section.columns:
        return not_there(ours, record, section)
    return (
        f"has the columns {listed(record)}; it must have a column for {ours}: {', '.join(table[ours])}, or another that "
        f"data.columns maps, such as {{{ours}: your_column}}"
    )


def not_there(ours: str, record: Mapping[str, Any], section: Data) -> str:
    """What is wrong with a record that lacks the column which data.columns maps one of our names to."""
    theirs = section.columns[ours]
    close = nearest(theirs, list(record))
    return f"has no column {short(repr(theirs))} (data.columns maps {ours} to it){close}; it has the columns {listed(record)}"


def unknown_column(section: Data, table: Table) -> str:
    """The error for the first name in data.columns that nothing reads; "" if all are read."""
    known = sorted({*table, *filter(None, (section.group, section.stratify, section.weight))})
    for ours, theirs in section.columns.items():
        if ours not in known:
            return (
                f"data.columns maps {short(repr(ours))} to {short(repr(theirs))}, but {short(repr(ours))} is not a name that this task "
                f"reads{nearest(ours, known)}; it reads {', '.join(known)}"
            )
    return ""


def left_over(
    record: Mapping[str, Any], read: Collection[str | None], section: Data, beside: Collection[str] = ()
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The columns with a value that nothing reads, and the patterns of data.ignore that match a column.

    `read`: the columns that were; `beside`: those that a data set is known to have, and that are never reported as unread.
    """
    rest = [name for name in record if name in beside or (name not in read and record[name] not in (None, ""))]
    matched = {name: [pattern for pattern in section.ignore if fnmatchcase(name, pattern)] for name in rest}
    named = (section.group, section.stratify, section.weight)
    elsewhere = {section.columns.get(ours, ours) for ours in named if ours}
    unread = tuple(
        name for name, patterns in matched.items() if not patterns and name not in elsewhere and name not in beside
    )
    return unread, tuple({pattern for patterns in matched.values() for pattern in patterns})
