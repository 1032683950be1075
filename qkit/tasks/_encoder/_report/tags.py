"""What a task that tags words shows: figures of each type of entity, how entities are missed and wrongly found, and the worst sentences."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qkit.plugins.sections import Column, Evaluated, Figure, Section, Table
from qkit.tasks._encoder._report.labels import ERRORS, LABEL_NOTE, missed_and_added, row_and_text, table_of_labels

# Micro F1 of entities is the score
ENTITIES = (
    Figure("precision_micro", "precision", "precision", "micro"),
    Figure("recall_micro", "recall", "recall", "micro"),
    Figure("f1_macro", "macro F1 of types", "f1", "macro"),
    Figure("token_accuracy", "right tags of words", "accuracy"),
)
NONE = "(none)"


@dataclass(frozen=True)
class Difference:
    """A sentence whose entities are not all right. Entities are written as `type: words`."""

    line: Mapping[str, Any]
    missed: tuple[str, ...]
    added: tuple[str, ...]


def sections_of_tags(evaluated: Evaluated) -> list[Section]:
    """The sections; without predictions those that need none."""
    different = list(differences(evaluated.lines))
    table = table_of_labels(evaluated, "Type")
    types = [Section("labels", "Types", (LABEL_NOTE,), [table])] if table else []
    note = "An entity is right if its type, begin and end are. One with another begin, end or type is missed, and another one wrongly found."
    shown = [errors_of_types(different), worst_sentences(different)] if different else []
    return [*types, Section("errors", "Errors", (note,), shown)]


def differences(lines: Sequence[Mapping[str, Any]]) -> Iterator[Difference]:
    """The sentences whose entities are not all right."""
    for line in lines:
        true, said = Counter(json.loads(line["reference"])), Counter(line["entities"])
        if true != said:
            yield Difference(line, tuple((true - said).elements()), tuple((said - true).elements()))


def errors_of_types(different: Sequence[Difference]) -> Table:
    """How often entities of each type are missed, and how often they are wrongly found."""
    missed, added = (
        Counter(entity.partition(": ")[0] for one in different for entity in getattr(one, key))
        for key in ("missed", "added")
    )
    return missed_and_added(missed, added, "Type", "Wrongly found")


def worst_sentences(different: Sequence[Difference]) -> Table:
    """The sentences with most errors."""
    ranked = sorted(different, key=lambda one: -len(one.missed) - len(one.added))
    return Table(
        f"Sentences with most errors first: {min(len(ranked), ERRORS)} of {len(ranked)}",
        [Column("Row"), Column("Sentence", "text"), Column("Missed", "text"), Column("Wrongly found", "text")],
        [
            [*row_and_text(one.line), *("; ".join(entities) or NONE for entities in (one.missed, one.added))]
            for one in ranked[:ERRORS]
        ],
    )
