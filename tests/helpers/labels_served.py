"""A small run with labels, trained, exported and verified: what tests of serving, benching and predicting start from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from helpers.tiny_labelled import build_model, labelled_run
from qkit import pipeline
from qkit.run.directory import Run

FORMATS = ("onnx-fp32", "onnx-int8")


def exported_run(root: Path, kind: str = "bert", model_sizes: Mapping[str, Any] | None = None, **sections: Any) -> Run:
    """A run through all stages but bench and report. `sections` change its recipe, `model_sizes` the model's config."""
    model = build_model(root / "model", kind, **{"initializer_range": 0.1, **(model_sizes or {})})
    train = {"max_steps": 40, "learning_rate": 1e-2, "save_steps": 40}
    made = labelled_run(root, model, **{"train": train, "export": {"formats": [*FORMATS]}, **sections})
    for stage in ("data", "train", "evaluate", "merge", "export", "verify"):
        pipeline.execute(made, stage)
    return made
