"""Keys of stages: a run of an earlier version stays up to date, and every field that does something changes the key of its stage."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from helpers.tiny import tiny_settings
from qkit.recipe.load import from_dict
from qkit.recipe.schema import Recipe
from qkit.run.directory import stage_key
from qkit.run.stages import STAGES

INPUTS = {"data/train.parquet": "0" * 64}
NEW_SECTIONS = ("method", "loss", "bottleneck")
BEFORE = {  # the sections of stages, and the fields of `train`, before tasks with labels
    "data": ("task", "model", "data", "seed"),
    "train": ("seed", "model", "quantization", "lora", "data", "ledger", "train", "micro_batches"),
    "merge": ("task", "seed", "model", "quantization", "evaluate", "merge"),
}
TRAIN_BEFORE = {
    *("learning_rate", "lr_scheduler_type", "warmup_steps", "max_steps", "num_train_epochs", "gradient_accumulation_steps"),
    *("gradient_checkpointing", "activation_offloading", "weight_decay", "max_grad_norm", "optim", "logging_steps"),
    *("save_steps", "save_total_limit"),
}


def recipe_of(**sections: Any) -> Recipe:
    raw = tiny_settings(Path("owner/x"), Path("rows.jsonl"))
    for name, section in sections.items():
        raw[name] = {**raw.get(name, {}), **section} if isinstance(section, dict) else section
    return from_dict(raw, (), "the test")


def key_of(recipe: Recipe, stage: str) -> str:
    return stage_key(stage, recipe, STAGES[stage].sections, INPUTS)


@pytest.mark.parametrize("stage", BEFORE)
def test_a_run_of_an_earlier_version_has_the_same_keys(stage: str) -> None:
    """The key as an earlier version computed it: it had no new section, and no train.bf16."""
    recipe = recipe_of()
    sections = tuple(name for name in STAGES[stage].sections if name not in NEW_SECTIONS)
    assert {*sections} == {*BEFORE[stage]}
    dumped = recipe.model_dump(mode="json")
    dumped["train"] = {name: value for name, value in dumped["train"].items() if name in TRAIN_BEFORE}
    content = {"stage": stage, "recipe": {name: dumped[name] for name in sections}, "inputs": INPUTS}
    assert key_of(recipe, stage) == hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


@pytest.mark.parametrize(
    "changed",
    [
        {"method": "full", "quantization": {"load_in_4bit": False}},
        {"loss": {"label_smoothing": 0.1}},
        {"loss": {"kind": "focal"}},
        {"loss": {"class_weights": {"a": 2.0}}},
        {"train": {"bf16": False}},
        {"bottleneck": {"reduction_factor": 4}},
    ],
)
def test_new_fields_change_the_key_of_training_only(changed: dict[str, Any]) -> None:
    recipe = recipe_of(**changed)
    before = recipe_of(quantization=changed.get("quantization", {}))
    assert key_of(recipe, "train") != key_of(before, "train")
    assert key_of(recipe, "data") == key_of(before, "data")
