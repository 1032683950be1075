"""The run in tests/sample_run: a whole run directory with plausible figures, for what only reads one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import yaml

from helpers.paths import TESTS
from qkit.recipe.schema import Recipe
from qkit.run.directory import Run

SAMPLE = TESTS / "sample_run"
# What a run that is half way may lack, one by one.
FILES = (
    "run.json",
    "data/summary.json",
    "train/metrics.jsonl",
    "train/memory.json",
    "evaluate/scores.json",
    "evaluate/predictions.jsonl",
    "verify/parity.json",
    "bench",
    "serve/server.json",
)


def open_sample(folder: Path, *, without: str | None = None, only_recipe: bool = False) -> Run:
    """A copy of the sample in `folder`, which may lack one file, or all but the recipe."""
    root = folder / "sample_run"
    if only_recipe:
        root.mkdir()
        shutil.copy(SAMPLE / "recipe.yaml", root)
    else:
        shutil.copytree(SAMPLE, root)
    if without:
        gone = root / without
        shutil.rmtree(gone) if gone.is_dir() else gone.unlink()
    return Run(root, Recipe.model_validate(yaml.safe_load((root / "recipe.yaml").read_text(encoding="utf-8"))))


def edit(run: Run, file: str, **changes: Any) -> None:
    """Change top-level keys of a JSON file of the run."""
    path = run.root / file
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **changes}), encoding="utf-8")


def a_run(folder: Path, **statuses: str) -> Run:
    """The sample run with these exports there, as verify left them."""
    run = open_sample(folder)
    known = json.loads((run.folder("verify") / "parity.json").read_text())
    for name, status in statuses.items():
        place = run.folder("export") / name.replace("_", "-")
        place.mkdir(parents=True)
        signs = {"vllm_adapter": "adapter_config.json", "onnx": "genai_config.json"}
        (place / signs.get(name, signs.get(name.partition("_")[0], "config.json"))).write_text("{}")
        known["parity"][place.name] = {**known["parity"].get(place.name, {"kl_mean": 0.5}), "status": status}
    edit(run, "verify/parity.json", **known)
    formats = tuple(name.replace("_", "-") for name in statuses)
    export = run.recipe.export.model_copy(update={"formats": formats})
    return Run(run.root, run.recipe.model_copy(update={"export": export}))
