"""How questions with contexts are told by their columns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qkit.plugins.first_recipe import CERTAIN, Suggestion, Table
from qkit.tasks._answering.reading import COLUMNS, NEEDED


def of_answers(table: Table) -> Suggestion | None:
    """A question, a context, and answers that are parts of it."""
    columns = {ours: table.named(COLUMNS[ours]) for ours in NEEDED}
    named = {ours: column.name for ours, column in columns.items() if column is not None}
    if len({*named.values()}) < len(NEEDED):
        return None
    given = [record for record in table.records if record.get(named["answers"]) not in (None, "")]
    if not given or not all(_is_answered(record, named) for record in given):
        return None
    why = f"{named['answers']} has parts of {named['context']}"
    return Suggestion(CERTAIN, why, named)


def _is_answered(record: Mapping[str, Any], named: Mapping[str, str]) -> bool:
    """Whether the answers say where they begin, or are in the context."""
    context, answers = record.get(named["context"]), record[named["answers"]]
    if isinstance(answers, Mapping):
        return {"text", "answer_start"} <= answers.keys()
    for answer in answers if isinstance(answers, list) else [answers]:
        if isinstance(answer, Mapping):
            if not {"text", "answer_start"} <= answer.keys():
                return False
        elif not isinstance(answer, str) or answer not in str(context):
            return False
    return True
