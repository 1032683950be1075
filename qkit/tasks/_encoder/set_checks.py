"""The checks of the labels of a whole data set, from what label_checks.py finds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from qkit.core.errors import listed
from qkit.plugins.checks import NAMED_ROWS, Check, SetRow
from qkit.tasks._encoder.label_checks import LabelledRow, conflicts, near_names, rare_labels

FEWEST = 5  # rows of a label from which something can be learned and measured


def checks(rows: Sequence[SetRow], several: bool = False) -> Iterator[Check]:
    """Whether labels can be told apart, are in training, are frequent enough, are spelled alike, and are the same for the same text.

    `several`: rows have any number of labels; even one label is then told from none.
    """
    counts = Counter(name for row in rows if row.split == "train" for name in row.names)
    if len(counts) < (1 if several else 2):
        remedy = f"give rows of at least {'one label' if several else 'two labels'}, or check which column data.columns maps to label"
        number = "1 label" if counts else "no label"
        yield Check(
            "labels",
            "fail",
            f"the training rows have {number} ({listed(counts)}): nothing can be learned",
            remedy=remedy,
        )
        return
    yield _unseen(rows, counts)
    labelled = [LabelledRow(row.question, name, row.split, str(row.place)) for row in rows for name in row.names]
    yield _rare(labelled)
    yield _near(counts)
    yield _conflicts(
        [LabelledRow(row.question, ", ".join(sorted(row.names)), row.split, str(row.place)) for row in rows]
        if several
        else labelled
    )


def _unseen(rows: Sequence[SetRow], counts: Counter[str]) -> Check:
    unseen = [row for row in rows if row.split != "train" and not counts.keys() >= {*row.names}]
    if not unseen:
        span = f"{min(counts.values()):,} to {max(counts.values()):,}"
        return Check("labels", "pass", f"{len(counts):,} labels, with {span} training rows each")
    names = sorted({name for row in unseen for name in row.names} - counts.keys())
    message = f"{len(unseen):,} held-out rows have labels that no training row has: {listed(names)}; the first is {unseen[0].place}"
    places = tuple(row.place for row in unseen[:NAMED_ROWS])
    return Check(
        "labels", "fail", message, len(unseen), places, "add training rows with these labels, or correct their names"
    )


def _rare(rows: Sequence[LabelledRow]) -> Check:
    rare = rare_labels(rows, FEWEST)
    if not rare:
        return Check("rare_labels", "pass", f"every label has at least {FEWEST} training rows")
    message = f"{len(rare):,} labels have fewer than {FEWEST} training rows: {rare[0].message}"
    return Check("rare_labels", "warn", message, len(rare), remedy="add rows with these labels, or join labels")


def _near(counts: Counter[str]) -> Check:
    near = near_names(counts)
    if not near:
        return Check("label_names", "pass", "no two labels have nearly the same name")
    return Check(
        "label_names", "warn", f"{len(near):,} pairs of labels have nearly the same name: {near[0].message}", len(near)
    )


def _conflicts(rows: Sequence[LabelledRow]) -> Check:
    different = conflicts(rows)
    if not different.texts:
        return Check("label_conflicts", "pass", "no text has different labels")
    remedy = "decide on one label for each text, or accept this bound on the accuracy"
    return Check("label_conflicts", "warn", different.message, len(different.texts), remedy=remedy)
