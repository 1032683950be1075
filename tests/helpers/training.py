"""A run whose data are there, to be trained: rows of known lengths and labels."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from helpers.tiny import tiny_settings
from qkit.core.batching import IGNORED, packed
from qkit.core.progress import Progress
from qkit.recipe.load import load
from qkit.run.directory import Run

LENGTHS = [10 + (i * 37) % 60 for i in range(21)]


CAPACITY = 128


class Heard(Progress):
    """Keeps what was said; a bar may stop the run as a signal would."""

    def __init__(self, stop_at: float = float("inf")):
        self.lines: list[str] = []
        self.stop_at = stop_at
        self.steps = 0.0
        self.name = ""

    def notify(self, text: str) -> None:
        self.lines.append(text)

    @contextmanager
    def bar(self, name: str, total: float, start: float = 0) -> Iterator[Any]:
        around, self.name = self.name, name
        yield self
        self.name = around

    def advance(self, steps: float = 1, **figures: float) -> None:
        self.steps += steps if self.name == "train" else 0
        if self.steps >= self.stop_at:
            raise KeyboardInterrupt


def _rows() -> list[dict[str, Any]]:
    """Two labelled spans in each; ids that rise, so that no token is its neighbour."""
    rows = []
    for number, length in enumerate(LENGTHS):
        ids = [3 + (11 * number + place) % 250 for place in range(length)]
        labels = [i if length // 3 < p < length // 2 or p > length - 4 else IGNORED for p, i in enumerate(ids)]
        rows.append({"input_ids": ids, "labels": labels})
    return rows


def _labelled() -> int:
    return sum(label != IGNORED for row in _rows() for label in row["labels"])


def _run(root: Path, tiny_model: Path, progress: Progress | None = None, **sections: Any) -> tuple[Run, Path]:
    """A run directory whose `data` is there, and the folder to train in. `sections`: what the recipe says otherwise; or a value."""
    settings = tiny_settings(tiny_model, root / "rows.jsonl")
    settings["train"] = {"num_train_epochs": 2, "max_steps": -1, "learning_rate": 1e-2}
    settings["data"]["batch_tokens"] = CAPACITY
    for name, section in sections.items():
        settings[name] = {**settings.get(name, {}), **section} if isinstance(section, dict) else section
    (root / "data").mkdir(parents=True, exist_ok=True)
    (root / "recipe.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    recipe = load(root / "recipe.yaml")
    _write_data(root / "data", recipe.data.packing)
    out = root / "train"
    out.mkdir(exist_ok=True)
    return Run(root, recipe, progress), out


def _write_data(folder: Path, packing: bool) -> None:
    places: Any = packed(LENGTHS, CAPACITY) if packing else [(None, None)] * len(LENGTHS)
    rows = _rows()
    columns = {
        "input_ids": pa.array([row["input_ids"] for row in rows], pa.list_(pa.int32())),
        "labels": pa.array([row["labels"] for row in rows], pa.list_(pa.int32())),
        "pack": pa.array([pack for pack, _ in places], pa.int32()),
        "position": pa.array([position for _, position in places], pa.int32()),
        "answer": ["not for training"] * len(rows),
    }
    pq.write_table(pa.table(columns), folder / "train.parquet", row_group_size=5)
    counts = {"records": 25, "rows": len(rows), "dropped": 4, "tokens": sum(LENGTHS), "labelled_tokens": _labelled()}
    (folder / "summary.json").write_text(json.dumps({"splits": {"train": counts}}), encoding="utf-8")
    (folder / "tokens.json").write_text(json.dumps({"pad": 0, "stop": [2]}), encoding="utf-8")


def _json(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))


def _losses(out: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(out / "losses.parquet").to_pylist()
    return rows
