"""Jobs for exporters, and what a model says, for the tests of export/."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from qkit.plugins.exporter import Job, exporter
from qkit.plugins.runtime import RowScores, TokenRow
from qkit.recipe.registry import split
from qkit.recipe.schema import Recipe

ROWS = [TokenRow(list(range(3, 60)), 5), TokenRow([5, 6, 7, 8, 9, 120, 121], 2)]


def recipe_of(model: Path, **sections: Any) -> Recipe:
    raw = {"task": "chat", "model": {"source": str(model)}, "data": {}, "export": {"method": "round-to-nearest"}}
    return Recipe.model_validate({**raw, **sections})


def job_of(model: Path, root: Path, adapter: Path | None = None, **sections: Any) -> Job:
    """The model as both what was merged and the base; a few rows to calibrate with."""
    rows = root / "rows.parquet"
    pq.write_table(pa.table({"input_ids": [list(row.input_ids) for row in ROWS]}), rows)
    return Job(model, model, adapter or model, rows, recipe_of(model, **sections), root / "export.log")


def exported(job: Job, name: str, root: Path) -> Path:
    out = root / name
    exporter(name).export(job, out, split(name)[1])
    return out


def kl(reference: Sequence[RowScores], other: Sequence[RowScores]) -> float:
    """Mean divergence per token."""
    rows = [(np.exp(a.full) * (a.full - b.full)).sum(-1) for a, b in zip(reference, other, strict=True)]
    return float(np.concatenate(rows).mean())


def changed_config(folder: Path, **keys: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **keys}))


def job_for(model: Path, folder: Path) -> Job:
    """`model` as a run's merged model; its training rows and log are put into `folder`."""
    import pyarrow as pa
    from pyarrow import parquet

    folder.mkdir(exist_ok=True)
    random = np.random.default_rng(0)
    rows = [random.integers(3, 250, length).tolist() for length in random.integers(4, 60, 40)]
    parquet.write_table(pa.table({"input_ids": rows, "labels": rows}), folder / "train.parquet")
    settings = {"task": "chat", "model": {"source": str(model)}, "data": {"train": [{"source": "rows.jsonl"}]}}
    recipe = Recipe.model_validate(settings)
    return Job(model, model, model, folder / "train.parquet", recipe, folder / "export.log")
