from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_pipeline import qkit

from qkit import bench_train
from qkit.bench_train import Point
from qkit.errors import RecipeError
from qkit.recipe import load


def test_the_sweep_is_every_batch_with_every_row_that_fits_it(tiny_recipe: Path) -> None:
    how = load(tiny_recipe)  # batches of 256, rows of up to 128
    assert bench_train.points(how, [], []) == [Point(128, 128), Point(256, 128), Point(512, 128)]
    assert bench_train.points(how, [64, 256], [32, 128]) == [Point(64, 32), Point(256, 32), Point(256, 128)]
    with pytest.raises(RecipeError, match="no batch of 64 tokens holds a row of 128"):
        bench_train.points(how, [64], [])


@pytest.mark.slow
def test_training_is_benched_in_a_process_of_its_own(tiny_recipe: Path, tmp_path: Path) -> None:
    done = qkit("bench", "train", tiny_recipe, "--batch-tokens", 256, "--steps", 3, "--out", tmp_path / "b", "--json")
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    assert record == json.loads((tmp_path / "b" / "train.json").read_text())
    (point,) = record["points"]
    assert (point["batch_tokens"], point["max_length"], point["steps"]) == (256, 128, 3)
    assert 0 < point["real_tokens_per_step"] <= 256
    low, high = point["tokens_per_second_range"]
    assert 0 < low <= point["tokens_per_second"] <= high
    assert point["peak_bytes"] > 100e6 and point["meter"] == "rss"
    assert point["mfu"] == pytest.approx(point["flops_per_second"] / point["achievable_flops_per_second"])
    assert 0 < point["mfu"] < 1 and "bf16 products here" in point["against"]


def test_a_point_that_cannot_be_trained_says_where(tiny_recipe: Path, tmp_path: Path) -> None:
    done = qkit(
        "bench", "train", tiny_recipe, "--set", "model.source=/nowhere", "--batch-tokens", 256, "--out", tmp_path / "b"
    )
    assert done.returncode != 0 and "/nowhere" in done.stderr and "bench-train.log" in done.stderr
    assert not (tmp_path / "b" / "train.json").exists()
