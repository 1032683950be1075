"""Running the data stage on a few files, and reading what it wrote."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qkit.core.progress import Progress
from qkit.data import stage as data_stage
from qkit.recipe.load import from_dict
from qkit.recipe.schema import Recipe

Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Prepared:
    """What `prepare` made of a recipe."""

    folder: Path
    summary: Mapping[str, Any]

    @property
    def suspicious(self) -> dict[str, str]:
        """The checks that did not pass, with their status."""
        found = {check["name"]: check["status"] for check in self.summary["checks"]}
        return {name: status for name, status in found.items() if status in ("warn", "fail")}

    def check(self, name: str) -> Mapping[str, Any]:
        return next(check for check in self.summary["checks"] if check["name"] == name)

    def rows(self, split: str = "train") -> list[dict[str, Any]]:
        return _table(self.folder / f"{split}.parquet")

    @property
    def ledger(self) -> list[dict[str, Any]]:
        return _table(self.folder / "ledger.parquet")


def _table(file: Path) -> list[dict[str, Any]]:
    import pyarrow.parquet as pq

    found: list[dict[str, Any]] = pq.read_table(file).to_pylist()
    return found


def lines(rows: Iterable[Any]) -> bytes:
    """JSON lines; what is bytes already is a line as it stands."""
    return b"".join((row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" for row in rows)


def recipe(model: Path, sources: Mapping[str, Sequence[Path]], settings: Iterable[str] = ()) -> Recipe:
    """A recipe that prepares these files; `settings` as on the command line."""
    given = {split: [{"source": str(file)} for file in files] for split, files in sources.items()}
    raw = {
        "task": "chat",
        "model": {"source": str(model)},
        "data": {**given, "max_length": 1024, "batch_tokens": 1024},
    }
    return from_dict(raw, list(settings), "these settings")


def prepare(how: Recipe, folder: Path) -> Prepared:
    """Run the data stage into a new folder."""
    folder.mkdir(parents=True)
    return Prepared(folder, data_stage.prepare(how, folder, Progress()))


def prepare_rows(model: Path, folder: Path, train: Rows, test: Rows = (), settings: Iterable[str] = ()) -> Prepared:
    """Run the data stage on rows, written as JSON lines beside the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    sources: dict[str, list[Path]] = {}
    for split, rows in (("train", train), ("test", test)):
        if rows:
            (folder / f"{split}.jsonl").write_bytes(lines(rows))
            sources[split] = [folder / f"{split}.jsonl"]
    return prepare(recipe(model, sources, settings), folder / "data")
