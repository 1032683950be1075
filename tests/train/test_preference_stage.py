"""Training on pairs, and what is measured of it, stage by stage; the recipe; and a run that is killed."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml

from helpers.command import qkit_here
from helpers.paths import RECIPES
from helpers.tiny_pairs import pair_rows, pair_settings, write_rows
from qkit import pipeline
from qkit.core.errors import MissingArtifact
from qkit.plugins.runtime import RowScores
from qkit.plugins.task import open_task
from qkit.recipe.load import load
from qkit.run.directory import Run
from qkit.tasks._preference.scoring import PairTokens
from qkit.train.checkpoints import SEAL

pytestmark = pytest.mark.slow


def _run(root: Path, tiny_model: Path, *overrides: str) -> Run:
    root.mkdir(exist_ok=True)
    settings = pair_settings(tiny_model, write_rows(root / "rows.jsonl", pair_rows(44)))
    (root / "recipe.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    return Run.create(root / "first", load(root / "recipe.yaml", overrides))


def _finished(run: Run, *stages: str) -> Run:
    for stage in stages:
        pipeline.execute(run, stage)
    return run


def _json(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))


def _lines(file: Path) -> list[Any]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Run:
    run = _run(tmp_path_factory.mktemp("pairs"), tiny_model, "ledger.losses=true")
    return _finished(run, "data", "train", "evaluate", "merge", "export", "verify", "bench", "report")


def test_every_pair_is_counted_and_starts_at_the_reference(done: Run) -> None:
    train = done.folder("train")
    sums = _json(train / "sums.json")
    assert sums["drawn_labelled_tokens"] == sums["in_batches"] == sums["divided_by"] > 0
    assert _lines(train / "metrics.jsonl")[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)
    losses = pq.read_table(train / "losses.parquet").to_pydict()
    assert losses["loss_before"] == pytest.approx([math.log(2)] * 32, abs=1e-4)
    assert sum(losses["loss_after"]) < 0.8 * sum(losses["loss_before"])
    assert _json(train / "pairs.json")["shared"] is True


def test_evaluation_compares_with_the_reference_itself(done: Run) -> None:
    """What the base says of the held-out pairs is, number by number, what training recorded of the reference."""
    recorded = pq.read_table(done.folder("train") / "reference_test.parquet").to_pylist()
    lines = _lines(done.folder("evaluate") / "predictions.jsonl")
    base, adapter = ([line for line in lines if line["artifact"] == name] for name in ("base", "adapter"))
    for line, row in zip(base, recorded, strict=True):
        assert (line["chosen_log_probability"], line["rejected_log_probability"]) == (row["chosen"], row["rejected"])
        assert float(line["prediction"]) == 0  # against itself
    for line, row in zip(adapter, recorded, strict=True):
        reward = line["chosen_log_probability"] - row["chosen"]
        assert float(line["prediction"]) == pytest.approx(
            reward - (line["rejected_log_probability"] - row["rejected"]), abs=1e-3
        )
    assert adapter[0]["reference"].startswith("chosen: aaa\nrejected: ")


def test_the_figures_of_an_evaluation(done: Run) -> None:
    document = _json(done.folder("evaluate") / "scores.json")
    assert document["metric"] == "preference accuracy" and document["scores"]["adapter"]["score"] > 70
    base = document["scores"]["base"]
    assert (base["score"], base["low"], base["high"]) == (50, 50, 50)  # the reference prefers nothing to itself
    assert {*base["metrics"]} == {"margin", "likelier_chosen", "answer_tokens"} and base["metrics"]["margin"][
        "value"
    ] == 0
    assert document["gain"]["points"] == document["scores"]["adapter"]["score"] - 50
    figures = document["scores"]["adapter"]["metrics"]
    assert {*figures} == {"margin", "likelier_chosen", "kl_to_reference", "answer_tokens"}
    assert all(figure["low"] <= figure["value"] <= figure["high"] for figure in figures.values())
    assert figures["kl_to_reference"]["value"] > 0 and figures["margin"]["value"] > 0


def test_artifacts_pass_their_gates_on_the_chosen_answers(done: Run) -> None:
    parity = _json(done.folder("verify") / "parity.json")["parity"]
    assert {name: parity[name]["status"] for name in ("merged", "onnx-fp32")} == dict.fromkeys(
        ("merged", "onnx-fp32"), "passed"
    )
    page = (done.folder("report") / "index.html").read_text(encoding="utf-8")
    assert "Pairs of answers" in page and "are the wrong way round" in page


def test_two_artifacts_are_compared_without_a_score(done: Run) -> None:
    """Generated answers are no pairs: only the distance of the two is told."""
    told = qkit_here("verify", done.root, done.folder("merge"), "--json")
    assert told.returncode == 0, told.stderr
    document = json.loads(told.stdout)
    assert document["kl_mean"] < 0.05 and not document["score"] and document["identical"] > 0


class _Runtime:
    """An artifact without an adapter."""

    def score(self, rows: Any) -> Any:
        return (RowScores(np.zeros(1, np.float32), np.zeros(1, np.int64)) for _ in rows)


def test_validation_pairs_are_evaluated_against_the_reference(tmp_path: Path, tiny_model: Path) -> None:
    """Their loss begins at that of the reference, and the best step is found by it and kept."""
    run = _run(
        tmp_path,
        tiny_model,
        f"data.validation=[{{source: {tmp_path / 'rows.jsonl'}, rows: ':12'}}]",
        "train.eval_on_start=true",
        "train.eval_steps=2",
        "train.eval_score_rows=8",
        "train.metric_for_best_model=score",
    )
    _finished(run, "data", "train")
    figures = [line for line in _lines(run.folder("train") / "metrics.jsonl") if "eval_loss" in line]
    assert figures[0]["eval_loss"] == pytest.approx(math.log(2), abs=1e-4) and figures[0]["eval_score"] == 50
    assert figures[-1]["eval_loss"] < figures[0]["eval_loss"] and figures[-1]["eval_score"] > 50
    table = pq.read_table(run.folder("train") / "reference_validation.parquet")
    assert table.num_rows == 12


def test_without_the_references_log_probabilities_nothing_is_measured(done: Run, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (data / "tokens.json").write_text((done.folder("data") / "tokens.json").read_text(encoding="utf-8"))
    with pytest.raises(MissingArtifact, match=r"reference_test\.parquet is missing: run the stage `train` again"):
        open_task("preference").predictor(done.recipe, data, {}).predict(_Runtime(), [PairTokens([1, 2], 1, [3])])


def test_a_killed_training_goes_on_to_the_same_result(tmp_path: Path, tiny_model: Path) -> None:
    """Killed with SIGKILL after a checkpoint; the same command ends with the same adapter, bit for bit."""
    settings = ["train.max_steps=16", "train.save_steps=4"]
    whole, cut = (_finished(_run(tmp_path / name, tiny_model, *settings), "data") for name in ("whole", "cut"))
    _finished(whole, "train")
    process = subprocess.Popen([sys.executable, "-m", "qkit", "train", str(cut.root), "--quiet"])
    while not any((cut.root / ".work" / "train" / "checkpoints").glob(f"checkpoint-*/{SEAL}")):
        assert process.poll() is None
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert not cut.folder("train").exists()
    _finished(cut, "train")
    for name in ("adapter/adapter_model.safetensors", "reference.parquet", "reference_test.parquet"):
        assert (cut.folder("train") / name).read_bytes() == (whole.folder("train") / name).read_bytes()
    losses = [[line["loss"] for line in _lines(run.folder("train") / "metrics.jsonl")] for run in (cut, whole)]
    assert losses[0] == losses[1] and len(losses[0]) == 16


@pytest.mark.parametrize("loss", ["ipo", "[sigmoid, sft]", "aot", "apo_zero"])
def test_other_losses_train_too(tmp_path: Path, tiny_model: Path, loss: str) -> None:
    run = _finished(_run(tmp_path, tiny_model, f"preference.loss_type={loss}", "train.max_steps=8"), "data", "train")
    losses = [line["loss"] for line in _lines(run.folder("train") / "metrics.jsonl")]
    assert sum(losses[-2:]) < sum(losses[:2])


def test_the_recipe_on_a_tiny_model(tmp_path: Path, tiny_model: Path) -> None:
    """recipes/preference.yaml from data to gated artifacts, with rows that have the columns of its data set."""
    extra = {"prompt_id": "x", "messages": [], "score_chosen": 8.0, "score_rejected": 3.0}
    rows = []
    for row in pair_rows(44):
        asked = {"role": "user", "content": row["prompt"]}
        sides = {side: [asked, {"role": "assistant", "content": row[side]}] for side in ("chosen", "rejected")}
        rows.append({**row, **sides, **extra})
    file = write_rows(tmp_path / "rows.jsonl", rows)
    overrides = [
        f"model={{source: {tiny_model}}}",
        f"data.train=[{{source: {file}, rows: '12:'}}]",
        f"data.test=[{{source: {file}, rows: ':12'}}]",
        "data.max_overlap=1",
        "data.max_length=192",
        "data.batch_tokens=256",
        "train.learning_rate=1e-2",
        "train.max_steps=4",
        "evaluate.max_new_tokens=8",
        "export.formats=[onnx-fp32]",
        "bench.runtimes=[transformers]",
        "serve.max_model_len=256",
    ]
    run = Run.create(tmp_path / "first", load(RECIPES / "preference.yaml", overrides))
    _finished(run, "data", "train", "evaluate", "merge", "export", "verify")
    assert _json(run.folder("verify") / "parity.json")["parity"]["onnx-fp32"]["status"] == "passed"
    unused = next(check for check in _json(run.folder("data") / "summary.json")["checks"] if check["name"] == "unused")
    assert unused["status"] == "pass"
