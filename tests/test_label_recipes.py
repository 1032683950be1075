"""The recipes of tasks with labels, each from its file to gated artifacts, on a few rows; one of them on its real encoder."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from helpers.paths import RECIPES
from helpers.tiny_labelled import LABELS, build_model, text
from qkit import pipeline
from qkit.recipe.load import load
from qkit.run.directory import Run

pytestmark = pytest.mark.slow
STAGES = ("data", "train", "evaluate", "merge", "export", "verify", "bench", "report")
PLACES = ("card", "cash", "transfer", "top up", "exchange rate", "PIN")
ASKED = {
    "arrival": "When will my {} arrive? I have been waiting for {} days.",
    "charge": "Why was I charged {1} euros for the {0}?",
    "lost": "I lost my {} and need {} new ones.",
}


def written(file: Path, rows: Sequence[dict[str, str]]) -> Path:
    with file.open("w", encoding="utf-8", newline="") as sink:
        writer = csv.DictWriter(sink, [*rows[0]])
        writer.writeheader()
        writer.writerows(rows)
    return file


def finished(root: Path, name: str, train: Path, test: Path, *overrides: str) -> Run:
    """A run of recipes/NAME.yaml with other rows."""
    sources = [f"data.{split}=[{{source: {file}}}]" for split, file in (("train", train), ("test", test))]
    run = Run.create(root / "run", load(RECIPES / f"{name}.yaml", [*sources, *overrides]))
    for stage in STAGES:
        pipeline.execute(run, stage)
    return run


def check(run: Run, least: float) -> None:
    """Whether the model learned, and each artifact passed its gate."""
    parity: dict[str, Any] = json.loads((run.folder("verify") / "parity.json").read_text(encoding="utf-8"))["parity"]
    wanted = ["merged", *run.recipe.export.formats]
    assert {name: parity[name]["status"] for name in wanted} == dict.fromkeys(wanted, "passed")
    scores = json.loads((run.folder("evaluate") / "scores.json").read_text(encoding="utf-8"))["scores"]
    assert scores[run.recipe.trained_as]["score"] >= least > scores["majority"]["score"]
    assert (run.folder("report") / "index.html").is_file()


def test_intents_on_the_real_encoder(tmp_path: Path) -> None:
    rows = [
        {"text": asked.format(place, number), "category": name}
        for name, asked in ASKED.items()
        for number, place in enumerate(PLACES, start=2)
    ]
    train, test = written(tmp_path / "train.csv", rows[::2]), written(tmp_path / "test.csv", rows[1::2])
    overrides = (
        "data.columns={label: category}",
        "data.ignore=[]",
        "train.num_train_epochs=12",
        "train.save_steps=999",
    )
    check(finished(tmp_path, "intent-banking77", train, test, *overrides), 90)


def test_sentiment(tmp_path: Path) -> None:
    model = build_model(tmp_path / "model", "bert", initializer_range=0.1)
    rows = [{"sentence": text(i), "label": LABELS[i % 3], "idx": str(i)} for i in range(96)]
    train, test = written(tmp_path / "train.csv", rows[24:]), written(tmp_path / "test.csv", rows[:24])
    run = finished(
        tmp_path,
        "sentiment",
        train,
        test,
        f"model.source={model}",
        "train.num_train_epochs=20",
        "train.learning_rate=3e-3",
    )
    check(run, 80)
