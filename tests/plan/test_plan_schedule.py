"""`qkit plan --schedule`: the chart, the table, the JSON, and what it needs to know."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from helpers import paths
from qkit.core.errors import RecipeError
from qkit.plan import _rates, _rates_screen
from qkit.plan._rates import Course, Curve
from qkit.recipe.load import from_dict

MAXIMUM = 2e-4


def course(rates: list[float], warmup: int = 0, kind: str = "linear") -> Course:
    return Course(kind, {}, len(rates), warmup, (Curve("main", MAXIMUM, tuple(rates)),))


def points(lines: list[str]) -> dict[int, set[int]]:
    """The rows that are marked in each column of a chart, from the bottom."""
    rows = [line[_rates_screen.EDGE + 2 :] for line in lines[: _rates_screen.HEIGHT]]
    marked: dict[int, set[int]] = {}
    for row, text in enumerate(reversed(rows)):
        for column, mark in enumerate(text):
            if mark == "•":
                marked.setdefault(column, set()).add(row)
    return marked


def test_a_short_training_has_a_column_for_each_step() -> None:
    rates = [MAXIMUM * share for share in (0.5, 1.0, 0.75, 0.25, 0.0)]
    marked = points(_rates_screen.chart(course(rates).groups[0]))
    top = _rates_screen.HEIGHT - 1
    assert marked == {0: {top // 2}, 1: {top}, 2: {top * 3 // 4}, 3: {top // 4}, 4: {0}}


def test_a_column_of_many_steps_shows_all_of_their_rates() -> None:
    """So a restart within one column is seen."""
    rates = [MAXIMUM] * 640
    rates[105] = 0.0
    marked = points(_rates_screen.chart(course(rates).groups[0]))
    top = _rates_screen.HEIGHT - 1
    assert len(marked) == _rates_screen.WIDTH and marked.pop(10) == {*range(top + 1)}
    assert all(rows == {top} for rows in marked.values())


@pytest.mark.parametrize("steps", [1, 2, 7, 1000])
def test_the_table_has_the_ends_and_the_turn(steps: int) -> None:
    table = _rates_screen._table(course([MAXIMUM] * steps, warmup=steps // 3))
    shown = [text.replace(",", "") for text in table.columns[0].cells]
    assert {"1", str(steps)} <= {*map(str, shown)} and shown == sorted(shown, key=int)


def test_lines_fit_a_terminal() -> None:
    assert max(map(len, _rates_screen.chart(course([MAXIMUM] * 5000).groups[0]))) <= 80


def _recipe(**train: Any) -> Any:
    return from_dict({"task": "chat", "model": {"source": "owner/x"}, "data": {}, "train": train}, (), "the test")


def test_steps_that_are_not_known_yet() -> None:
    with pytest.raises(RecipeError, match=r"the number of steps is known after the data stage .*train\.max_steps"):
        _rates.course(_recipe())


@pytest.mark.slow
def test_rows_tell_the_steps() -> None:
    drawn = _rates.course(_recipe(num_train_epochs=2.0), lengths=[[2000, 5, 5]])
    assert drawn.steps == 10 == len(drawn.groups[0].rates)


@pytest.mark.slow
def test_the_program_prints_a_chart_or_json(tmp_path: Path) -> None:
    recipe = {
        "task": "chat",
        "model": {"source": "Qwen/Qwen2.5-0.5B-Instruct"},
        "data": {"train": [{"source": "rows.jsonl"}]},
        "lora": {"loraplus_lr_ratio": 8},
        "train": {"max_steps": 40, "warmup_steps": 0.1},
    }
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")

    def plan(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "qkit", "plan", str(tmp_path / "r.yaml"), "--schedule", *arguments]
        return subprocess.run(command, capture_output=True, text=True, cwd=paths.ROOT)

    document = json.loads(plan("--json").stdout)
    assert [group["learning_rate"] for group in document["groups"]] == [2e-4, 16e-4]
    assert document["warmup_steps"] == 4 and len(document["groups"][0]["rates"]) == document["steps"] == 40
    shown = plan()
    assert shown.returncode == 0 and "B of LoRA" in shown.stdout and "•" in shown.stdout
    refused = plan("--card", "rtx-4090")
    assert refused.returncode == 2 and "--card: no effect with --schedule" in refused.stderr
