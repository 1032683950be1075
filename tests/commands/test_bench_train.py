from __future__ import annotations

import json
from pathlib import Path

import pytest

from helpers.command import qkit
from qkit.commands import bench_training
from qkit.commands.bench_training import Point
from qkit.core.device import Device
from qkit.core.errors import RecipeError, StageFailed
from qkit.core.progress import Progress
from qkit.recipe.load import load


def test_the_sweep_is_every_batch_with_every_row_that_fits_it(tiny_recipe: Path) -> None:
    recipe = load(tiny_recipe)  # batches of 256, rows of up to 128
    assert bench_training.points(recipe, [], []) == [Point(128, 128), Point(256, 128), Point(512, 128)]
    assert bench_training.points(recipe, [64, 256], [32, 128]) == [Point(64, 32), Point(256, 32), Point(256, 128)]
    with pytest.raises(RecipeError, match="a row of 128 tokens does not fit a batch of 64 tokens"):
        bench_training.points(recipe, [64], [])


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


def test_a_point_that_fails_ends_no_sweep(tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest batch of a sweep is there to see whether it fits."""

    def point(_: object, one: Point, *__: object) -> dict[str, int]:
        if one.batch_tokens == 512:
            raise StageFailed("bench train", tmp_path, tmp_path / "log", "out of memory")
        return {"batch_tokens": one.batch_tokens}

    monkeypatch.setattr(bench_training, "_in_a_process", point)
    recipe, out = load(tiny_recipe), tmp_path / "b"
    out.mkdir()
    record = bench_training.bench(recipe, bench_training.points(recipe, [], []), 3, out, Progress())
    assert [result["batch_tokens"] for result in record["points"]] == [128, 256]
    (failed,) = record["failed"]
    assert failed["batch_tokens"] == 512 and "out of memory" in failed["why"]
    with pytest.raises(StageFailed, match="out of memory"):
        bench_training.bench(recipe, bench_training.points(recipe, [512], []), 3, out, Progress())


def test_mfu_is_measured_where_the_training_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Device, "busy_matrix_side", 64)
    flops, reference = bench_training.achievable_flops(Device("cpu", "not in the table of cards", 1, 1))
    assert flops > 0 and "bf16 products here" in reference
    with pytest.raises(Exception, match="meta"):  # its product is asked for on that device
        bench_training.achievable_flops(Device("meta", "not in the table of cards", 1, 1))


def test_a_point_that_cannot_be_trained_says_where(tiny_recipe: Path, tmp_path: Path) -> None:
    done = qkit(
        "bench", "train", tiny_recipe, "--set", "model.source=/nowhere", "--batch-tokens", 256, "--out", tmp_path / "b"
    )
    assert done.returncode != 0 and "/nowhere" in done.stderr and "bench-train.log" in done.stderr
    assert not (tmp_path / "b" / "train.json").exists()
