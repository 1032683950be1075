"""What a task with any number of labels for a text shows: figures of each label, how it is missed and wrongly added, and the worst texts."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qkit.core.figures import ABSENT, percent
from qkit.plugins.sections import Cell, Column, Evaluated, Figure, Section, Table
from qkit.tasks._encoder._report.labels import ERRORS, LABEL_NOTE, missed_and_added, row_and_text, table_of_labels

# Micro F1 is the score
SEVERAL_LABELS = (
    Figure("f1_macro", "macro F1", "f1", "macro"),
    Figure("precision_micro", "micro precision", "precision", "micro"),
    Figure("recall_micro", "micro recall", "recall", "micro"),
    Figure("exact_match", "all labels right", "exact_match"),
    Figure("hamming_loss", "wrong decisions", "hamming_loss", is_error=True),
)
NONE = "(none)"


@dataclass(frozen=True)
class Difference:
    """A text whose labels are not all right: those that were missed, and those that were wrongly added."""

    line: Mapping[str, Any]
    missed: tuple[str, ...]
    added: tuple[str, ...]

    @property
    def surest(self) -> float | None:
        """The highest probability of a label that was wrongly added."""
        return max((self.line["probabilities"][name] for name in self.added), default=None)


def sections_of_several_labels(evaluated: Evaluated) -> list[Section]:
    """The sections; without predictions those that need none."""
    different = list(differences(evaluated.lines))
    labels = [Section("labels", "Labels", (LABEL_NOTE,), [table])] if (table := table_of_labels(evaluated)) else []
    note = "A label is missed where a text has it and the model does not say so, and wrongly added where it is the other way round."
    shown = [errors_of_labels(different), worst_texts(different)] if different else []
    return [*labels, Section("errors", "Errors", (note,), shown)]


def differences(lines: Sequence[Mapping[str, Any]]) -> Iterator[Difference]:
    """The texts whose labels are not all right."""
    for line in lines:
        true, said = ({*json.loads(line[key])} for key in ("reference", "prediction"))
        if true != said:
            yield Difference(line, tuple(sorted(true - said)), tuple(sorted(said - true)))


def errors_of_labels(different: Sequence[Difference]) -> Table:
    """How often each label is missed, and how often it is wrongly added."""
    missed, added = (Counter(name for one in different for name in getattr(one, key)) for key in ("missed", "added"))
    return missed_and_added(missed, added, "Label", "Wrongly added")


def worst_texts(different: Sequence[Difference]) -> Table:
    """The texts with most errors, and of these the one first where a wrong label is surest."""
    ranked = sorted(different, key=lambda one: (-len(one.missed) - len(one.added), -(one.surest or 0.0)))
    columns = [Column("Row"), Column("Text", "text"), Column("Labels", "name"), Column("Missed", "name")]
    return Table(
        f"Texts with most errors first: {min(len(ranked), ERRORS)} of {len(ranked)}",
        [*columns, Column("Wrongly added", "name"), Column("Probability of the surest")],
        [_row(one) for one in ranked[:ERRORS]],
    )


def _row(one: Difference) -> list[Cell | str]:
    surest = Cell(one.surest, percent(one.surest) if one.added else ABSENT)
    labels = json.loads(one.line["reference"])
    return [*row_and_text(one.line), *(", ".join(names) or NONE for names in (labels, one.missed, one.added)), surest]
