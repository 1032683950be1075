"""Counts the names in records that nothing reads: columns, and keys of turns, parts, calls and tools.

A misspelled name, or a name that only another tool reads, would otherwise be ignored silently.
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterable, Sequence

from qkit.core.errors import printable, short
from qkit.data.entry import Entry
from qkit.plugins.checks import NAMED_ROWS, Check, Place
from qkit.plugins.example import Reads
from qkit.plugins.task import Task

NAMED = 8  # names that the message has, the most frequent ones
LABELS = {"label", "labels", "class", "category", "intent", "sentiment", "tags", "ner_tags", "target"}
REMEDY = (
    "map columns with data.columns, fix the names, or list in data.ignore what should not be read "
    "(data.ignore='[id, messages.id]')"
)


def check(entries: Sequence[Entry], task: Task, reads: Reads, ignore: Sequence[str] = ()) -> Check:
    """Every name that nothing reads, the number of records that have it, and the nearest name that is read; also the patterns of
    data.ignore that match nothing. `reads`: what the template reads."""
    matched = {pattern for entry in entries for pattern in entry.ignored}
    idle = [pattern for pattern in ignore if pattern not in matched]
    remark = f"; data.ignore has {short(', '.join(idle))}, which does not match any name" if idle else ""
    unread = [entry for entry in entries if entry.part == 0 and entry.unread]
    if not unread:
        return Check("unused", "pass", f"every column and key of the records is read{remark}")
    counts = Counter(name for entry in unread for name in entry.unread)
    formats = {name: entry.format for entry in reversed(unread) for name in entry.unread}
    named = "; ".join(_described(name, count, formats[name], task, reads) for name, count in counts.most_common(NAMED))
    more = f"; and {len(counts) - NAMED:,} more names" if len(counts) > NAMED else ""
    rows = tuple(Place(entry.source, entry.line) for entry in unread[:NAMED_ROWS])
    holds = "1 record has" if len(unread) == 1 else f"{len(unread):,} records have"
    message = f"{holds} data that nothing reads: {named}{more}; the first is {rows[0]}{remark}"
    return Check("unused", "warn", message, len(unread), rows, _remedy(unread))


def _described(name: str, count: int, format: str, task: Task, reads: Reads) -> str:
    last = name.rpartition(".")[2]
    known = () if name.lower() in LABELS else sorted({*task.known_names(name, format, reads)} - {last})
    close = difflib.get_close_matches(last, known, n=1)
    nearest = f" (did you mean {close[0]}?)" if close else ""
    if place := task.misplaced(name, format):
        nearest = f" ({place})"
    return f"{short(printable(name))} in {count:,}{nearest}"


def _remedy(entries: Iterable[Entry]) -> str:
    """The remedy; for labels, it also says that they are not trained on."""
    labelled = [(entry.format, name) for entry in entries for name in entry.unread if name.lower() in LABELS]
    if not labelled:
        return REMEDY
    format, name = labelled[0]
    if format == "text":
        message = (
            f"these rows are trained on as plain text, without {name}; to train on it as the answer, set "
            f"data.columns='{{prompt: text, completion: {name}}}'"
        )
    else:
        message = f"{name} is not used: every answer is trained on, whatever its label"
    return f"{message}; otherwise {REMEDY}"
