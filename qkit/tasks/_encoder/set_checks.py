"""Checks of the labels of a whole data set."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from qkit.core.errors import listed
from qkit.plugins.checks import NAMED_ROWS, Check, SetRow


def checks(rows: Sequence[SetRow]) -> Iterator[Check]:
    """Whether there is something to tell apart, and whether held-out rows have labels that training has."""
    counts = Counter(name for row in rows if row.split == "train" for name in row.names)
    if len(counts) < 2:
        remedy = "give rows of at least two labels, or check which column data.columns maps to label"
        yield Check(
            "labels",
            "fail",
            f"the training rows have {len(counts)} label ({listed(counts)}): nothing can be learned",
            remedy=remedy,
        )
        return
    unseen = [row for row in rows if row.split != "train" and not counts.keys() >= {*row.names}]
    if unseen:
        names = sorted({name for row in unseen for name in row.names} - counts.keys())
        message = f"{len(unseen):,} held-out rows have labels that no training row has: {listed(names)}; the first is {unseen[0].place}"
        places = tuple(row.place for row in unseen[:NAMED_ROWS])
        yield Check(
            "labels",
            "fail",
            message,
            len(unseen),
            places,
            "add training rows with these labels, or correct their names",
        )
        return
    yield Check(
        "labels",
        "pass",
        f"{len(counts):,} labels, of {min(counts.values()):,} to {max(counts.values()):,} training rows each",
    )
