"""Keys of stages: a run of an earlier version stays up to date, and every field that does something changes the key of its stage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from helpers.tiny import tiny_settings
from qkit.recipe.load import from_dict
from qkit.recipe.schema import Recipe
from qkit.run.directory import stage_key
from qkit.run.stages import STAGES, sections_of

INPUTS = {"data/train.parquet": "0" * 64}
# The keys of `tiny_settings`, as the last version computed them that had tasks on conversations only.
BEFORE = {
    "data": "05361c12922db148",
    "train": "cf419c63c5e38d87",
    "evaluate": "2430c3bf0565fcc3",
    "merge": "4d16de408dd6ea05",
    "export": "aff2212ac7b46dd6",
    "serve": "5911e97000e92770",
    "verify": "311e309b30f57996",
    "bench": "304a363e5050695d",
    "report": "0073fdc26df369c6",
}


def key_of(recipe: Recipe, stage: str) -> str:
    return stage_key(stage, recipe, STAGES[stage].sections, INPUTS)


@pytest.mark.parametrize("stage", BEFORE)
def test_a_run_of_an_earlier_version_stays_up_to_date(stage: str) -> None:
    recipe = from_dict(tiny_settings(Path("owner/x"), Path("rows.jsonl")), (), "the test")
    assert key_of(recipe, stage).startswith(BEFORE[stage])


@pytest.mark.parametrize(
    "changed",
    [
        {"method": "full"},
        {"loss": {"label_smoothing": 0.1}},
        {"loss": {"name": "focal"}},
        {"loss": {"class_weights": {"a": 2.0}}},
        {"train": {"bf16": True}},
        {"method": "pfeiffer"},
        {"method": "pfeiffer", "bottleneck": {"reduction_factor": 4}},
    ],
)
def test_new_fields_change_the_key_of_training_only(changed: dict[str, Any]) -> None:
    raw = {"task": "classify", "model": {"source": "owner/x"}, "data": {"train": [{"source": "rows.jsonl"}]}}
    before = {**raw, "method": "pfeiffer"} if "bottleneck" in changed else raw
    recipes = [from_dict(sections, (), "the test") for sections in (before, {**raw, **changed})]
    assert key_of(recipes[0], "train") != key_of(recipes[1], "train")
    assert key_of(recipes[0], "data") == key_of(recipes[1], "data")


def test_the_rows_of_a_batch_are_part_of_the_data() -> None:
    raw = {"task": "classify", "model": {"source": "owner/x"}, "data": {"train": [{"source": "rows.jsonl"}]}}
    keys = {
        key_of(from_dict({**raw, "data": {**raw["data"], "batch_rows": rows}}, (), "the test"), "data")  # type: ignore[dict-item]
        for rows in (8, 16, None)
    }
    assert len(keys) == 3


def test_a_tracker_trains_nothing_anew() -> None:
    settings = tiny_settings(Path("owner/x"), Path("rows.jsonl"))
    keys = set()
    for tracked in ({}, {"report_to": ["tensorboard"]}, {"report_to": ["mlflow"], "run_name": "second"}):
        settings["train"] |= tracked
        keys.add(key_of(from_dict(settings, (), "the test"), "train"))
    assert len(keys) == 1


@pytest.mark.parametrize(("metric", "depends"), [("loss", False), ("score", True)])
def test_training_depends_on_the_metric_where_that_tells_the_best_step(metric: str, depends: bool) -> None:
    settings = tiny_settings(Path("owner/x"), Path("rows.jsonl"))
    settings["data"]["validation"] = [{"source": "v.jsonl"}]
    settings["train"] |= {"metric_for_best_model": metric, "eval_score_rows": 4, "early_stopping_patience": 2}
    keys = []
    for tokens in (8, 9):
        settings["evaluate"]["max_new_tokens"] = tokens
        recipe = from_dict(settings, (), "the test")
        keys.append(stage_key("train", recipe, sections_of(STAGES["train"], recipe), INPUTS))
    assert (keys[0] != keys[1]) is depends
