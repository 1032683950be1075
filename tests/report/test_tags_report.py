"""What the report shows of tagged words: types with their figures, and entities that are missed or wrongly found."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qkit.plugins.sections import Evaluated
from qkit.tasks._encoder._report.tags import sections_of_tags


def line(row: int, reference: list[str], said: list[str]) -> dict[str, Any]:
    text = f"sentence {row}"
    return {
        "row": row,
        "prompt": text,
        "reference": json.dumps(reference),
        "entities": said,
        "correct": reference == said,
    }


LINES = [
    line(0, ["person: Ada"], ["person: Ada"]),
    line(1, ["person: Ada", "person: Ada", "place: Rome: centre"], ["person: Ada", "place: Rome"]),
    line(2, [], ["person: Rome"]),
]
METRICS = {
    f"{name}:{kind}": {"value": value, "low": 0.1, "high": 0.9}
    for kind, f1, support in (("person", 0.75, 3), ("place", 0.0, 1))
    for name, value in (("f1", f1), ("precision", 0.5), ("recall", 0.5), ("support", support))
}


def test_errors_are_counted_by_type_and_sentence() -> None:
    types, errors = sections_of_tags(Evaluated(LINES, METRICS, 0.95, Path("data")))
    (table,) = types.parts
    assert [row[0] for row in table.rows] == ["place", "person"]  # type: ignore[union-attr]
    by_type, worst = errors.parts
    counts = {row[0]: [cell.value for cell in row[1:]] for row in by_type.rows}  # type: ignore[union-attr]
    assert counts == {"person": [1, 1], "place": [1, 1]}
    assert [row[0].text for row in worst.rows] == ["1", "2"]  # type: ignore[union-attr]
    assert worst.rows[0][2:] == ["person: Ada; place: Rome: centre", "place: Rome"]  # type: ignore[union-attr]
    assert worst.rows[1][2:] == ["(none)", "person: Rome"]  # type: ignore[union-attr]


def test_nothing_wrong_and_nothing_there() -> None:
    (errors,) = sections_of_tags(Evaluated(LINES[:1], {}, None, Path("data")))
    assert errors.parts == []
    assert sections_of_tags(Evaluated([], {}, None, Path("data")))[-1].parts == []
