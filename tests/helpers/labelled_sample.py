"""A run with labels that has been evaluated, without a model: logits are made up, and the stage `evaluate` does the rest."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from helpers.tiny_labelled import settings
from qkit.evaluate import stage as evaluate_stage
from qkit.plugins.runtime import Encodes, TextRow
from qkit.recipe.load import from_dict
from qkit.run.directory import Run

SURE = 3.0  # what the logit of a text's label is above the others, before noise


class MadeUp(Encodes):
    """Logits of each row: its label's is higher, and noise is added, the same each time."""

    def __init__(self, labels: int, noise: float):
        self.labels, self.noise = labels, noise

    def logits(self, rows: Sequence[TextRow]) -> Iterator[Any]:
        generator = np.random.default_rng(0)
        for row in rows:
            logits = generator.normal(0, self.noise, self.labels).astype(np.float32)
            logits[row.labels[0]] += SURE
            yield logits

    def memory_bytes(self) -> int:
        return 0


def evaluated_run(
    root: Path,
    names: Sequence[str] = ("fruit", "tree", "wood"),
    rows: int = 60,
    noise: float = 2.0,
    present: int | None = None,
    **sections: Any,
) -> Run:
    """A run with the folders data, train and evaluate.

    `rows`: held-out ones, of the first `present` labels in turn, or of all; with `noise` 0 all of them are right.
    """
    raw = settings(root / "model", root / "rows.jsonl", **sections)
    run = Run.create(root / "run", from_dict(raw, (), "the test"))
    _write_data(run.folder("data"), names, rows, present or len(names))
    run.folder("train").mkdir()
    steps = [
        {"step": n, "epoch": n / 4, "loss": 1 / n, "learning_rate": 0.01 / n, "grad_norm": 2.0 / n, "tokens": 100 * n}
        for n in range(1, 13)
    ]
    (run.folder("train") / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    out = run.folder("evaluate")
    out.mkdir()
    opened = evaluate_stage._opened
    with pytest.MonkeyPatch.context() as patch:
        made_up = MadeUp(len(names), noise)
        patch.setattr(evaluate_stage, "_opened", lambda run, name: opened(run, name) if name == "majority" else made_up)
        evaluate_stage.run(run, out)
    return run


def _write_data(folder: Path, names: Sequence[str], rows: int, present: int) -> None:
    folder.mkdir()
    labels = [number % present for number in range(rows)]
    counts = {name: labels.count(number) for number, name in enumerate(names)}
    split = {"records": rows, "kept": rows, "dropped": 0, "rows": rows, "tokens": 9 * rows, "labelled_tokens": rows}
    empty = dict.fromkeys(split, 0)
    summary = {"splits": {"train": split, "validation": empty, "test": split}, "dropped": {}, "checks": []}
    (folder / "summary.json").write_text(json.dumps(summary))
    known = {"names": list(names), "rows": {"train": counts, "validation": dict.fromkeys(names, 0), "test": counts}}
    (folder / "labels.json").write_text(json.dumps(known))
    records = [
        {
            "input_ids": [1, 5, 2],
            "token_type_ids": [],
            "labels": [label],
            "names": [names[label]],
            "text": f"text {number} that speaks of {names[label]}, at some length so that a line of it is filled",
            "pair": None,
        }
        for number, label in enumerate(labels)
    ]
    pq.write_table(pa.Table.from_pylist(records), folder / "test.parquet")
