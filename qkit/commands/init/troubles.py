"""What is wrong with a data set as it is, counted: for the newcomer to see before training."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator

from qkit.commands.init.dataset import Dataset
from qkit.commands.init.reading import Reading
from qkit.core.errors import short
from qkit.core.figures import percent

NAMED = 5  # labels that a message names
RARE = 3  # records that a label needs to be in every split


def label_counts(reading: Reading) -> Counter[str]:
    """How many times each label is in the records that are read; none for a task without names of labels."""
    if reading.candidate.suggestion.label is None:
        return Counter()
    return Counter(
        label
        for example in reading.examples
        for label in (getattr(example, "labels", None) or getattr(example, "tags", None) or ())
    )


def troubles(dataset: Dataset, reading: Reading) -> Iterator[str]:
    """Each in one sentence, with its count."""
    records = dataset.table.records
    if dataset.broken:
        yield f"{len(dataset.broken):,} lines are no records; the first: {short(dataset.broken[0])}"
    if reading.unread:
        first, count = reading.unread[0], f"{len(reading.unread):,} of {len(records):,}"
        yield f"{count} records cannot be used; the first is record {first.place + 1}: {short(first.reason)}"
    for name in dict.fromkeys(reading.candidate.suggestion.columns.values()):
        column = dataset.table.columns.get(name)
        matters = bool(reading.unread) or name == reading.candidate.suggestion.label
        if column is not None and column.empty and matters:
            yield f"{name} is empty in {column.empty:,} of {len(records):,} records"
    if repeats := _repeats(dataset):
        yield f"{repeats:,} of {len(records):,} records ({percent(repeats / len(records))}) repeat an earlier one, and are left out"
    yield from _of_labels(label_counts(reading))


def _repeats(dataset: Dataset) -> int:
    seen = Counter(json.dumps(record, sort_keys=True, default=str) for record in dataset.table.records)
    return sum(seen.values()) - len(seen)


def _of_labels(counts: Counter[str]) -> Iterator[str]:
    if len(counts) == 1:
        yield f"all records have the label {short(repr(next(iter(counts))))}: nothing can be learned from one class"
    rare = sorted(label for label, count in counts.items() if count < RARE)
    if rare and len(counts) > 1:
        more = f" and {len(rare) - NAMED} more" if len(rare) > NAMED else ""
        yield f"labels with fewer than {RARE} records: {short(', '.join(rare[:NAMED]))}{more}; a split may lack them"
