"""The plan of models with a new head: the tensors of a traced step against those of a real one, the batches that it takes, and what is shown."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from helpers.tiny_labelled import build_model, labelled_rows, labelled_run, settings, write_rows
from qkit import pipeline
from qkit.core import memory_watch
from qkit.core.device import Device, detect
from qkit.core.errors import ModelError, RecipeError
from qkit.plan import gpus, remedies, sheet, solve, speed
from qkit.plan import plan as plan_plan
from qkit.plan._known import Known
from qkit.plan.traced import items, shapes, step
from qkit.plan.traced.head import new_head
from qkit.recipe.load import from_dict
from qkit.recipe.schema import Recipe
from qkit.train import memory_report
from qkit.train.trainers import labelled

CPU = Device("cpu", "Some CPU", 2**34, 2)
ROWS = 12
ENCODERS = ("roberta", "electra", "deberta", "deberta-v2", "mpnet", "distilbert", "modernbert", "llama")
METHODS = ("full", "lora", "head", "houlsby", "pfeiffer", "parallel")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The folder of a tiny model of a kind, built once."""
    root, built = tmp_path_factory.mktemp("models"), set()

    def folder(kind: str, dtype: str = "float32") -> Path:
        name = f"{kind}-{dtype}"
        if name not in built:
            build_model(root / name, kind, dtype=dtype)
            built.add(name)
        return root / name

    return folder


def recipe(folder: Path, *overrides: str, **sections: Any) -> Recipe:
    return from_dict(settings(folder, folder / "rows.jsonl", **sections), overrides, "the test")


def items_of(how: Recipe, device: Device = CPU, stage: str = "train", known: Known = Known(labels=3)) -> dict[str, int]:
    return {item.name: item.bytes for item in plan_plan.plan(how, device=device, stage=stage, known=known).items}


# --- planned against measured -------------------------------------------------------------------------------------------


def both(root: Path, folder: Path, **sections: Any) -> tuple[Mapping[str, int], Mapping[str, int]]:
    """Bytes by line at the peak of the second step of training, planned and measured; each step has the same batch of rows, padded."""
    train = {"max_steps": 2, "save_steps": 50, **sections.pop("train", {})}
    data = {"batch_tokens": 1024, "batch_rows": ROWS, **sections.pop("data", {})}
    run = labelled_run(root, folder, rows=labelled_rows(24 + ROWS), data=data, train=train, **sections)
    pipeline.execute(run, "data")
    trainer = labelled.build_trainer(run, folder, detect(), root)
    known = memory_report.known_of(trainer, 3)
    watcher = memory_watch.step_watcher()
    trainer.add_callback(watcher)
    trainer.train()
    assert len({tokens for tokens, _ in known.lengths}) > 3  # so there is a mask
    planned = plan_plan.predicted_items(run.recipe, CPU, known)
    return planned, memory_report._named(watcher.alive.items(), run.recipe)


def tensors(lines: Mapping[str, int]) -> int:
    return sum(size for name, size in lines.items() if name not in ("process", "allocator", "kernels"))


@pytest.mark.slow
@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("method", METHODS)
def test_tensors_of_a_step_by_method(models: Any, tmp_path: Path, method: str, bf16: bool) -> None:
    planned, measured = both(tmp_path, models("bert"), method=method, train={"bf16": bf16})
    assert planned["weights"] == measured["weights"]
    assert planned["optimizer"] == measured["optimizer"]
    assert tensors(planned) == pytest.approx(tensors(measured), abs=0)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ENCODERS)
def test_tensors_of_a_step_by_architecture(models: Any, tmp_path: Path, kind: str) -> None:
    planned, measured = both(tmp_path, models(kind))
    assert tensors(planned) == pytest.approx(tensors(measured), abs=0)
