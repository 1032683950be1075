"""What the report shows of answers: their F1, questions with and without an answer, and the wrong answers that the model was surest of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qkit.plugins.sections import Cell, Column, Evaluated, Figure, Section, Table
from qkit.tasks._answering.squad import f1
from qkit.tasks._encoder._report.labels import ERRORS, row_and_text

# The share of exact answers is the score
ANSWERS = (
    Figure("f1", "F1 of the words", "f1"),
    Figure("has_answer_exact", "exact match where there is an answer", "exact_match"),
    Figure("has_answer_f1", "F1 where there is an answer", "f1"),
    Figure("no_answer_exact", "no answer where there is none", "exact_match"),
)
BETWEEN = " | "  # accepted answers, in predictions.jsonl
NONE = "(no answer)"


def sections_of_answers(evaluated: Evaluated) -> list[Section]:
    """The wrong answers; no section without predictions."""
    if not evaluated.lines:
        return []
    note = "Many a wrong answer is a right one with a word more or less: its F1 is above 0."
    return [Section("errors", "Errors", (note,), [_wrong(evaluated.lines)])]


def _wrong(lines: Sequence[Mapping[str, Any]]) -> Table:
    """Wrong answers, the worst F1 and the most confident first."""
    judged = [(_f1(line), line) for line in lines if not line["correct"]]
    ranked = sorted(judged, key=lambda pair: (pair[0], -(pair[1].get("confidence") or 0.0)))
    rows: list[list[Cell | str]] = [
        [
            *row_and_text(line),
            line["reference"] or NONE,
            line["prediction"] or NONE,
            Cell(figure, f"{figure:.2f}"),
        ]
        for figure, line in ranked[:ERRORS]
    ]
    columns = [
        Column("Row"),
        Column("Question", "text"),
        Column("Accepted", "text"),
        Column("Answer", "text"),
        Column("F1"),
    ]
    return Table(f"Wrong answers: {len(rows)} of {len(judged)}, of {len(lines)} questions", columns, rows)


def _f1(line: Mapping[str, Any]) -> float:
    return f1(line["prediction"], [one for one in line["reference"].split(BETWEEN) if one])
