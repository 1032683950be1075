"""Evaluation during training: it changes nothing in training, stops early, and goes back to the best step."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from helpers.tiny import chat_rows, tiny_settings
from helpers.tiny_labelled import LABELS, build_model, labelled_rows, labelled_run, text, write_rows
from helpers.training import Heard, _json
from qkit import pipeline
from qkit.core.device import detect
from qkit.core.errors import RecipeError, StageFailed
from qkit.core.files import read_lines
from qkit.measure import answers, scores
from qkit.measure.held_out import read_held_out
from qkit.model import source
from qkit.plugins.runtime import open_runtime
from qkit.plugins.task import open_task
from qkit.recipe.load import from_dict
from qkit.report import stage as report_stage
from qkit.run.directory import Run
from qkit.train import best_step

pytestmark = pytest.mark.slow
ADAPTER = "adapter/adapter_model.safetensors"
EVALUATED = {"max_steps": 12, "eval_steps": 2, "save_steps": 3}


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model(tmp_path_factory.mktemp("bert"), "bert")


def noisy_rows(count: int) -> list[dict[str, Any]]:
    """Texts whose labels mean nothing: what is learnt of them holds for no other."""
    rng = random.Random(3)
    return [{"text": text(number), "label": rng.choice(LABELS)} for number in range(count)]


def prepared(root: Path, model: Path, progress: Any = None, rows: Any = None, **sections: Any) -> Run:
    """24 test rows, 24 of validation, and 48 to train on."""
    file = root / "rows.jsonl"
    data = {
        "train": [{"source": str(file), "rows": "48:"}],
        "validation": [{"source": str(file), "rows": "24:48"}],
        "max_overlap": 1.0,
    }
    run = labelled_run(root, model, progress, rows, **{**sections, "data": {**data, **sections.get("data", {})}})
    pipeline.execute(run, "data")
    return run


def evaluations(run: Run) -> list[dict[str, Any]]:
    return [line for line in read_lines(run.folder("train") / "metrics.jsonl") if "eval_loss" in line]


def scored_again(run: Run, split: str) -> tuple[float, float]:
    """Loss and score of the trained model as saved, on the rows of a split, by the runtime that the stage evaluate uses."""
    task = open_task(run.recipe.task)
    rows = read_held_out(run.folder("data") / f"{split}.parquet", task)
    runtime = open_runtime(
        "transformers", source.resolve(run.recipe.model), detect(), recipe=run.recipe, adapter=run.trained()
    )
    said = answers.answered(run, runtime, rows, tuned={})
    targets = [one.targets for one in task.outputs(runtime, rows.rows)]
    return scores.mean_loss(targets), scores.percent(said.grades)


# --- nothing changes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["lora", "full"])
def test_training_is_the_same_with_evaluation_and_without(bert: Path, tmp_path: Path, method: str) -> None:
    """With dropout, so that random numbers drawn by an evaluation would show."""
    runs = []
    for name, section in {"with": EVALUATED, "without": {"max_steps": 12, "eval_strategy": "no"}}.items():
        train = {**section, "gradient_accumulation_steps": 2}
        runs.append(prepared(tmp_path / name, bert, method=method, train=train))
        pipeline.execute(runs[-1], "train")
    weights = ADAPTER if method == "lora" else "model/model.safetensors"
    assert len({(run.folder("train") / weights).read_bytes() for run in runs}) == 1
    assert [line["step"] for line in evaluations(runs[0])] == [2, 4, 6, 8, 10, 12] and not evaluations(runs[1])
    losses = [
        [line["loss"] for line in read_lines(run.folder("train") / "metrics.jsonl") if "loss" in line] for run in runs
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 12


def chat_run(root: Path, model: Path, progress: Any = None, **train: Any) -> Run:
    """Four test rows, two sources of validation, and the rest to train on, on a base in 4 bit."""
    files = [
        write_rows(root / f"{name}.jsonl", rows)
        for name, rows in (("rows", chat_rows(24)), ("other", chat_rows(30)[24:]))
    ]
    settings = tiny_settings(model, files[0])
    settings["data"]["validation"] = [{"source": str(files[0]), "rows": "4:8"}, {"source": str(files[1])}]
    settings["data"]["train"][0]["rows"] = "8:"
    settings["train"] |= train
    run = Run.create(root / "run", from_dict(settings, (), "the test"), progress)
    pipeline.execute(run, "data")
    return run


def test_a_base_in_4_bit_is_the_same_after_an_evaluation(tiny_model: Path, tmp_path: Path) -> None:
    """bitsandbytes would repack its weights in evaluation mode."""
    runs = [
        chat_run(tmp_path / name, tiny_model, eval_strategy=strategy)
        for name, strategy in (("with", "epoch"), ("without", "no"))
    ]
    for run in runs:
        pipeline.execute(run, "train")
    assert len({(run.folder("train") / ADAPTER).read_bytes() for run in runs}) == 1
    assert evaluations(runs[0])


def test_a_language_model_is_evaluated_by_source_and_by_its_metric(tiny_model: Path, tmp_path: Path) -> None:
    heard = Heard()
    run = chat_run(
        tmp_path,
        tiny_model,
        heard,
        eval_steps=2,
        eval_on_start=True,
        eval_score_rows=4,
        metric_for_best_model="loss/other",
    )
    pipeline.execute(run, "train")
    lines = evaluations(run)
    assert [line["step"] for line in lines] == [0, 2, 4]
    assert all({"eval_loss/rows", "eval_loss/other", "eval_score"} <= line.keys() for line in lines)
    table = read_held_out(run.folder("data") / "validation.parquet", open_task("chat"))
    counts = [sum(len(row.input_ids) - row.start for row in part) for part in (table.rows[:4], table.rows[4:])]
    last = lines[-1]
    mean = (last["eval_loss/rows"] * counts[0] + last["eval_loss/other"] * counts[1]) / sum(counts)
    assert mean == pytest.approx(last["eval_loss"], rel=1e-9)
    assert scored_again(run, "validation")[0] == pytest.approx(last["eval_loss"], rel=2e-3)  # dequantized once, in bf16
    recorded = _json(run.folder("train") / "validation.json")
    assert recorded["best"]["value"] == min(line["eval_loss/other"] for line in lines[1:]) and not recorded["restored"]
    assert any(line.startswith("step 2: validation loss ") for line in heard.lines)


# --- the best step ----------------------------------------------------------------------------------------------------


def test_early_stopping_goes_back_to_the_best_step(bert: Path, tmp_path: Path) -> None:
    heard = Heard()
    train = {"max_steps": 60, "learning_rate": 3e-3, "eval_steps": 2, "early_stopping_patience": 3, "save_steps": 1000}
    run = prepared(tmp_path, bert, heard, noisy_rows(96), method="full", train=train)
    pipeline.execute(run, "train")
    lines, recorded = evaluations(run), _json(run.folder("train") / "validation.json")
    best = min(lines, key=lambda line: line["eval_loss"])
    assert recorded["best"] == {"step": best["step"], "value": best["eval_loss"]}
    assert recorded["last_step"] == best["step"] + 6 == lines[-1]["step"] < 60
    assert recorded["again"] == best["eval_loss"] < lines[-1]["eval_loss"]
    loss, score = scored_again(run, "validation")
    assert loss == pytest.approx(best["eval_loss"], rel=2e-2) and score == pytest.approx(best["eval_score"], abs=1e-9)
    kept = [path.name for path in (run.folder("train") / "best").iterdir()]
    assert kept == [f"step-{best['step']}"]
    assert any("stopped early at step" in line for line in heard.lines)


def test_the_test_score_is_that_of_the_best_step(bert: Path, tmp_path: Path) -> None:
    """A training that ends at the best step gives the same weights."""
    train = {"max_steps": 12, "learning_rate": 3e-3, "lr_scheduler_type": "constant", "eval_steps": 1}
    run = prepared(tmp_path / "best", bert, None, noisy_rows(96), train={**train, "load_best_model_at_end": True})
    pipeline.execute(run, "train")
    best = _json(run.folder("train") / "validation.json")["best"]["step"]
    assert best < 12
    short = prepared(tmp_path / "short", bert, None, noisy_rows(96), train={**train, "max_steps": best})
    pipeline.execute(short, "train")
    assert (run.folder("train") / ADAPTER).read_bytes() == (short.folder("train") / ADAPTER).read_bytes()


@pytest.mark.parametrize("metric", ["score", "f1_macro", "ece"])
def test_other_figures_tell_the_best_step(bert: Path, tmp_path: Path, metric: str) -> None:
    run = prepared(tmp_path, bert, train={**EVALUATED, "metric_for_best_model": metric, "load_best_model_at_end": True})
    pipeline.execute(run, "train")
    figures = [line[f"eval_{metric}"] for line in evaluations(run)]
    recorded = _json(run.folder("train") / "validation.json")
    assert recorded["best"]["value"] == (min if metric == "ece" else max)(figures) == recorded["again"]
    assert recorded["best"]["step"] == 2 * (1 + figures.index(recorded["best"]["value"]))


def test_weights_that_give_another_figure_are_an_error(
    bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = prepared(
        tmp_path, bert, None, noisy_rows(96), train={**EVALUATED, "load_best_model_at_end": True, "learning_rate": 0.05}
    )
    monkeypatch.setattr(best_step, "restore", lambda trainer: None)
    with pytest.raises(StageFailed, match="and not"):
        pipeline.execute(run, "train")


KILLED = """
import os, signal, sys

if "train" in sys.orig_argv:
    from qkit.train.trainer import Counted

    def killed(self, model, inputs, items=None, whole=Counted.training_step):
        if self.state.global_step == int(os.environ.get("KILLED", -1)):
            os.kill(os.getpid(), signal.SIGKILL)
        return whole(self, model, inputs, items)

    Counted.training_step = killed
"""


@pytest.mark.parametrize("step", [8, 11])
def test_a_killed_training_stops_where_it_would_have_and_keeps_the_same(bert: Path, tmp_path: Path, step: int) -> None:
    train = {"max_steps": 40, "learning_rate": 3e-3, "eval_steps": 2, "early_stopping_patience": 3, "save_steps": 3}
    straight, cut = (prepared(tmp_path / name, bert, None, noisy_rows(96), train=train) for name in ("straight", "cut"))
    pipeline.execute(straight, "train")
    (tmp_path / "sitecustomize.py").write_text(KILLED, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}:{Path.cwd()}"}
    command = [sys.executable, "-m", "qkit", "train", str(cut.root)]
    done = subprocess.run(
        command, env={**environment, "KILLED": str(step)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    pipeline.execute(Run.create(cut.root, cut.recipe), "train")
    assert (cut.folder("train") / ADAPTER).read_bytes() == (straight.folder("train") / ADAPTER).read_bytes()
    records = [_json(run.folder("train") / "validation.json") for run in (straight, cut)]
    assert [{**record, "seconds": 0} for record in records[:1]] == [{**record, "seconds": 0} for record in records[1:]]
    timeless = [[{**line, "eval_runtime": 0} for line in evaluations(run)] for run in (straight, cut)]
    assert timeless[0] == timeless[1]


# --- rows -------------------------------------------------------------------------------------------------------------


def test_few_rows_of_many_are_evaluated(bert: Path, tmp_path: Path) -> None:
    run = prepared(tmp_path, bert, train={**EVALUATED, "eval_rows": 10, "eval_score_rows": 5})
    pipeline.execute(run, "train")
    assert _json(run.folder("train") / "validation.json")["rows"] == 10
    assert all(line["eval_score"] * 5 % 100 == 0 for line in evaluations(run))


def test_each_source_has_a_row_among_few(tiny_model: Path, tmp_path: Path) -> None:
    run = chat_run(tmp_path, tiny_model, eval_steps=2, eval_rows=3, metric_for_best_model="loss/other")
    pipeline.execute(run, "train")
    assert all({"eval_loss/rows", "eval_loss/other"} <= line.keys() for line in evaluations(run))


def test_a_figure_that_the_rows_do_not_have_is_named(bert: Path, tmp_path: Path) -> None:
    """Of one row there is no correlation."""
    rows = [{"text": row["text"], "label": float(number % 3)} for number, row in enumerate(labelled_rows(96))]
    train = {**EVALUATED, "metric_for_best_model": "pearson", "eval_score_rows": 1}
    heard = Heard()
    run = prepared(tmp_path, bert, heard, rows, task="regress", train=train)
    pipeline.execute(run, "train")
    assert _json(run.folder("train") / "validation.json")["best"] == {"step": None, "value": None}
    assert any("no evaluation gave a finite pearson" in line for line in heard.lines)
    assert "No evaluation gave a finite pearson." in report_stage.page(run)


def test_a_training_that_makes_it_worse_is_named(bert: Path, tmp_path: Path) -> None:
    heard = Heard()
    train = {"max_steps": 4, "learning_rate": 1.0, "eval_steps": 2, "eval_on_start": True}
    run = prepared(tmp_path, bert, heard, noisy_rows(96), train=train)
    pipeline.execute(run, "train")
    assert [line["step"] for line in evaluations(run)] == [0, 2, 4]
    assert any("no step is better than the model before training" in line for line in heard.lines)


def test_without_validation_rows_nothing_is_evaluated(bert: Path, tmp_path: Path) -> None:
    run = labelled_run(tmp_path, bert)
    pipeline.execute(run, "data")
    pipeline.execute(run, "train")
    assert not evaluations(run) and not (run.folder("train") / "validation.json").exists()


def test_a_split_that_leaves_no_validation_rows_is_an_error(bert: Path, tmp_path: Path) -> None:
    data = {
        "train": [{"source": str(tmp_path / "rows.jsonl")}],
        "test": [],
        "split": {"train": 0.98, "validation": 0.01, "test": 0.01},
    }
    run = labelled_run(tmp_path, bert, None, labelled_rows(9), data=data, train={"eval_steps": 2})
    pipeline.execute(run, "data")
    with pytest.raises(RecipeError, match=r"train\.eval_steps.*no validation rows"):
        pipeline.execute(run, "train")


def test_a_source_that_is_not_there_is_named_before_the_model_is_loaded(bert: Path, tmp_path: Path) -> None:
    run = prepared(tmp_path, bert, train={"metric_for_best_model": "loss/other"})
    with pytest.raises(RecipeError, match="no such loss"):
        pipeline.execute(run, "train")
