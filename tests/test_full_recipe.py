"""recipes/full-finetune.yaml, from its file to gated artifacts, on a tiny model and a few rows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from helpers.paths import RECIPES
from helpers.tiny_models import build
from qkit import pipeline
from qkit.recipe.load import load
from qkit.run.directory import Run

pytestmark = pytest.mark.slow
STAGES = ("data", "train", "evaluate", "merge", "export", "verify", "bench", "report")


def calls(count: int, first: int = 0) -> str:
    """Questions that a call answers, as JSON lines."""
    function = {"name": "add", "description": "add", "parameters": {"type": "dict", "properties": {}, "required": []}}
    rows = [
        {
            "id": f"row_{number}",
            "question": [[{"role": "user", "content": f"add {number}"}]],
            "function": [function],
        }
        for number in range(first, first + count)
    ]
    return "".join(json.dumps(row) + "\n" for row in rows)


def accepted(count: int, first: int = 0) -> str:
    rows = [{"id": f"row_{number}", "ground_truth": [{"add": {}}]} for number in range(first, first + count)]
    return "".join(json.dumps(row) + "\n" for row in rows)


def test_the_recipe_reaches_its_artifacts(tmp_path: Path) -> None:
    sources = {}
    for split, count, first in (("train", 16, 0), ("test", 4, 16)):
        rows, answers = tmp_path / f"{split}.json", tmp_path / f"{split}-answers.json"
        rows.write_text(calls(count, first), encoding="utf-8")
        answers.write_text(accepted(count, first), encoding="utf-8")
        sources[split] = f"data.{split}=[{{source: {rows}, answers: {answers}}}]"
    overrides = [
        *sources.values(),
        f"model.source={build(tmp_path / 'model', 'llama')}",
        "model.sha256=null",
        "train.max_steps=12",
        "train.save_steps=12",
        "train.learning_rate=1e-3",
        "train.warmup_steps=1",
        "data.clean.near_overlap=keep",
        "evaluate.max_new_tokens=4",
        "export.formats=[onnx-fp32]",
        "bench.runtimes=[transformers]",
        "bench.output_tokens=4",
        "bench.repeats=1",
    ]
    run = Run.create(tmp_path / "run", load(RECIPES / "full-finetune.yaml", overrides))
    for stage in STAGES:
        pipeline.execute(run, stage)
    parity = json.loads((run.folder("verify") / "parity.json").read_text(encoding="utf-8"))["parity"]
    assert {parity[name]["status"] for name in ("merged", "onnx-fp32")} == {"passed"}, parity
    assert not (run.folder("train") / "adapter").exists()
