"""Metrics of one's own: a number for each row, or one for all; what they may not return; and their way into scores.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers.tiny_labelled import build_model, labelled_run
from qkit import pipeline
from qkit.core.errors import RecipeError
from qkit.plugins import own_metrics
from qkit.report import summary

SOURCE = """
def same(predictions, references):
    return [p == r for p, r in zip(predictions, references, strict=True)]

def share(predictions, references):
    return sum(p == r for p, r in zip(predictions, references, strict=True)) / len(predictions)

def words(predictions, references):
    return "many"

def too_few(predictions, references):
    return [1.0]
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    name = f"metrics_of_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(SOURCE, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    return name


def test_a_mean_over_rows_and_a_figure_of_all_rows_agree(module: str) -> None:
    rng = np.random.default_rng(0)
    predictions, references = (["ab"[k] for k in rng.integers(2, size=200)] for _ in range(2))
    names = [f"{module}:same", f"{module}:share"]
    figures = own_metrics.figures(names, predictions, references, 0.95, 0)
    same, share = (figures[name] for name in names)
    wanted = np.mean([p == r for p, r in zip(predictions, references, strict=True)])
    assert same["value"] == share["value"] == pytest.approx(wanted)
    half = 1.96 * (wanted * (1 - wanted) / 200) ** 0.5
    for one in (same, share):
        assert one["low"] == pytest.approx(wanted - half, abs=0.015) and one["high"] == pytest.approx(
            wanted + half, abs=0.015
        )


@pytest.mark.parametrize(
    ("function", "said"), [("words", "returned 'many'"), ("too_few", r"one for each of the 2 rows"), ("none", "none")]
)
def test_what_a_metric_may_not_return(module: str, function: str, said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        own_metrics.figures([f"{module}:{function}"], ["a", "b"], ["a", "c"], 0.95, 0)


@pytest.mark.slow
def test_it_is_in_scores_and_summary(module: str, tmp_path: Path) -> None:
    model = build_model(tmp_path / "model", "bert")
    run = labelled_run(tmp_path / "r", model, evaluate={"metrics": [f"{module}:same"]})
    for stage in ("data", "train", "evaluate"):
        pipeline.execute(run, stage)
    scores: dict[str, Any] = json.loads((run.folder("evaluate") / "scores.json").read_text(encoding="utf-8"))["scores"]
    own = scores["adapter"]["metrics"][f"{module}:same"]
    assert 100 * own["value"] == pytest.approx(scores["adapter"]["score"])
    shown = summary.summary(run)["scores"]["adapter"]["metrics"][f"{module}:same"]
    assert shown["title"] == "same" and shown["value"] == own["value"]
