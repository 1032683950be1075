"""What tasks with several labels and with numbers add to a report; for single labels see tests/report/test_labelled_report.py."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers.svgs import parsed
from qkit.core.figures import ABSENT
from qkit.plugins.resampling import with_intervals
from qkit.plugins.sections import Cell, Evaluated, Plot, Section, Table
from qkit.plugins.task import Prediction
from qkit.report import section_charts
from qkit.tasks import multi_label, regress
from qkit.tasks._encoder.numbers import figures_of_numbers
from qkit.tasks._encoder.several_labels import figures_of_labels

NAMES = ["a", "b, c", "d"]


def shown(table: Table) -> list[list[str]]:
    return [[cell.text if isinstance(cell, Cell) else cell for cell in row] for row in table.rows]


def evaluated(folder: Path, names: Sequence[str], lines: Sequence[Mapping[str, Any]], metrics: Any) -> Evaluated:
    (folder / "labels.json").write_text(json.dumps({"names": names}), encoding="utf-8")
    return Evaluated([{"row": n, "prompt": f"text {n}", **line} for n, line in enumerate(lines)], metrics, 0.95, folder)


# --- several labels ---------------------------------------------------------------------------------------------------

PAIRS: list[tuple[list[str], dict[str, float]]] = [
    (["a"], {"a": 0.9}),
    (["a", "b, c"], {"a": 0.8, "d": 0.7}),
    ([], {"a": 0.6}),
    (["b, c"], {"a": 0.95}),
]


def several(folder: Path) -> Sequence[Section]:
    task = multi_label.TASK
    lines = [
        {
            "reference": task.answer({"names": true}),
            "prediction": json.dumps([*said]),
            "probabilities": said,
            "correct": task.correct(json.dumps([*said]), true, None),  # type: ignore[arg-type]
        }
        for true, said in PAIRS
    ]
    sample = figures_of_labels(
        [Prediction(str(line["prediction"]), {}) for line in lines], [p[0] for p in PAIRS], NAMES
    )
    return task.sections(evaluated(folder, NAMES, lines, with_intervals(sample, 0.95, 0)))


def test_missed_and_added_labels_are_counted(tmp_path: Path) -> None:
    labels, errors = several(tmp_path)
    (table,) = labels.parts
    assert isinstance(table, Table) and table.on_card
    assert [row[:2] for row in shown(table)] == [["b, c", "2"], ["a", "2"]]  # d is in no text
    counts, texts = errors.parts
    assert isinstance(counts, Table) and isinstance(texts, Table)
    assert shown(counts) == [["a", "0", "2"], ["b, c", "2", "0"], ["d", "0", "1"]]
    assert shown(texts) == [
        ["3", "text 3", "b, c", "b, c", "a", "95.0 %"],
        ["1", "text 1", "a, b, c", "b, c", "d", "70.0 %"],
        ["2", "text 2", "(none)", "(none)", "a", "60.0 %"],
    ]


def test_a_text_whose_labels_were_only_missed_has_no_probability(tmp_path: Path) -> None:
    line = {"reference": '["a"]', "prediction": "[]", "probabilities": {}, "correct": False}
    (errors,) = multi_label.TASK.sections(evaluated(tmp_path, NAMES, [line], {}))
    assert isinstance(errors.parts[1], Table)
    assert shown(errors.parts[1]) == [["0", "text 0", "a", "a", "(none)", ABSENT]]


# --- numbers ----------------------------------------------------------------------------------------------------------


def numbers(
    folder: Path, true: Sequence[Sequence[float]], said: Sequence[Sequence[float]], names: Sequence[str]
) -> Any:
    texts = [" ".join(map(repr, row)) for row in said]
    references = [regress.TASK.answer({"labels": row}) for row in true]
    lines = [
        {"reference": one, "prediction": other, "correct": -1.0} for one, other in zip(references, texts, strict=True)
    ]
    metrics = with_intervals(figures_of_numbers(texts, true, names), 0.95, 0)
    return regress.TASK.sections(evaluated(folder, names, lines, metrics))


def test_numbers_are_drawn_and_the_largest_errors_come_first(tmp_path: Path) -> None:
    true, said = [[1.0], [2.0], [3.0], [4.0]], [[1.5], [2.0], [0.5], [4.25]]
    scatter, errors = numbers(tmp_path, true, said, ["value"])
    (plot,) = scatter.parts
    assert isinstance(plot, Plot)
    assert list(plot.series[1].points) == [(1.0, 1.5), (2.0, 2.0), (3.0, 0.5), (4.0, 4.25)]
    assert plot.series[0].points == [(0.5, 0.5), (4.25, 4.25)]
    (table,) = errors.parts
    assert shown(table) == [
        ["2", "text 2", "3", "0.5", "-2.5"],
        ["0", "text 0", "1", "1.5", "+0.5"],
        ["3", "text 3", "4", "4.25", "+0.25"],
        ["1", "text 1", "2", "2", "+0"],
    ]
    dots = parsed(section_charts.drawn(plot)).iter("circle")
    assert len([dot for dot in dots if float(dot.attrib["cy"]) > section_charts.TOP - 1]) == 4


def test_several_numbers_have_a_plot_and_figures_each(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    true = generator.normal(size=(30, 2))
    said = true + generator.normal(size=(30, 2)) / [10, 2]
    scatter, errors = numbers(tmp_path, true.tolist(), said.tolist(), ["value_0", "value_1"])
    table, *plots = scatter.parts
    assert [plot.name for plot in plots] == ["scatter-value_0-chart", "scatter-value_1-chart"]
    mae = np.abs(said - true).mean(0)
    assert [row[2].value for row in table.rows] == pytest.approx(mae, abs=1e-4) and table.on_card
    worst = np.abs(said - true).max(1).argmax()
    assert errors.parts[0].rows[0][0].value == worst


def test_of_many_rows_a_plot_has_some(tmp_path: Path) -> None:
    true = [[float(n)] for n in range(4001)]
    plot = numbers(tmp_path, true, true, ["value"])[0].parts[0]
    assert len(plot.series[1].points) == 1334 and "one row of 3" in plot.caption
    assert "4001 rows" in plot.description


def test_no_predictions_no_sections(tmp_path: Path) -> None:
    assert not regress.TASK.sections(evaluated(tmp_path, ["value"], [], {}))
    assert not [
        part for section in multi_label.TASK.sections(evaluated(tmp_path, NAMES, [], {})) for part in section.parts
    ]
