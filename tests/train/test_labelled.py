"""The trainer of tasks with labels: the same step as transformers' own Trainer, batches of one row or several, and going on after a kill."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch.nn.functional import cross_entropy

from helpers.first_step import first_step
from helpers.tiny_labelled import build_model, labelled_rows, labelled_run
from helpers.training import Heard, _json
from qkit import pipeline
from qkit.core.device import detect
from qkit.core.errors import StageFailed
from qkit.model.adapters import new_heads
from qkit.run.directory import Run
from qkit.train import _metrics, losses
from qkit.train.trainers import labelled

pytestmark = pytest.mark.slow
QUIET = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model(tmp_path_factory.mktemp("bert"), "bert", **QUIET)


@pytest.fixture(scope="module")
def with_dropout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model(tmp_path_factory.mktemp("bert"), "bert")


def prepared(root: Path, model: Path, progress: Any = None, **sections: Any) -> Run:
    run = labelled_run(root, model, progress, **sections)
    pipeline.execute(run, "data")
    return run


def plain_trainer(trainer: Any, folder: Path, smoothing: float, loss: Any) -> Any:
    """transformers' own, on the rows of the first batch, with its own padding; the model has the same first weights."""
    numbers = next(iter(trainer.batches()))
    rows = [{name: value for name, value in trainer.train_dataset[n].items() if name != "labels"} for n in numbers]
    for row, number in zip(rows, numbers, strict=True):
        row["labels"] = trainer.train_dataset[number]["labels"][0]
    same = transformers.AutoModelForSequenceClassification.from_config(trainer.model.config)
    same.load_state_dict(trainer.model.state_dict())
    arguments = transformers.TrainingArguments(
        output_dir=str(folder / "plain"),
        per_device_train_batch_size=len(rows),
        max_steps=1,
        learning_rate=trainer.args.learning_rate,
        weight_decay=trainer.args.weight_decay,
        lr_scheduler_type=trainer.args.lr_scheduler_type,
        label_smoothing_factor=smoothing,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(trainer.model.config.name_or_path)
    collator = transformers.DataCollatorWithPadding(tokenizer)
    return transformers.Trainer(same, arguments, collator, rows, compute_loss_func=loss)


@pytest.mark.parametrize("name", ["cross_entropy", "smoothing", "weights"])
def test_a_step_is_that_of_a_plain_trainer(model: Path, tmp_path: Path, name: str) -> None:
    """With class weights, torch divides by the weights of the batch, and qkit by its rows, with weights whose mean over all rows is 1."""
    section = {"cross_entropy": {}, "smoothing": {"label_smoothing": 0.2}, "weights": {"class_weights": {"wood": 3.0}}}[
        name
    ]
    run = prepared(tmp_path, model, method="full", loss=section, train={"max_steps": 1, "weight_decay": 0.1})
    weights = losses.class_weights(run.recipe.loss, run.folder("data"))

    def weighted(outputs: Any, labels: Any, num_items_in_batch: Any) -> torch.Tensor:
        return cross_entropy(outputs.logits, labels, weight=weights, reduction="sum") / num_items_in_batch

    trainer = labelled.build_trainer(run, model, detect(), tmp_path)
    plain = plain_trainer(trainer, tmp_path, run.recipe.loss.label_smoothing, weighted if weights is not None else None)
    theirs, ours = first_step(plain), first_step(trainer)
    assert theirs.sizes == ours.sizes and len(ours.sizes) == 1 and max(ours.sizes) > 4
    assert ours.loss == pytest.approx(theirs.loss, abs=1e-5) and ours.gradients.keys() == theirs.gradients.keys()
    assert max(float(gradient.abs().max()) for gradient in theirs.gradients.values()) > 1e-2
    for parameter, gradient in theirs.gradients.items():
        assert torch.allclose(ours.gradients[parameter], gradient, rtol=0, atol=1e-5), parameter
    for (parameter, own), other in zip(trainer.model.named_parameters(), plain.model.parameters(), strict=True):
        significant = theirs.gradients[parameter].abs() > 1e-5  # Adam's first step divides a gradient by its own size
        assert torch.allclose(own[significant], other[significant], atol=1e-5), parameter


def test_every_label_is_trained_on_once_an_epoch(model: Path, tmp_path: Path) -> None:
    train = {"max_steps": -1, "num_train_epochs": 2, "gradient_accumulation_steps": 4}
    run = prepared(tmp_path, model, train=train)
    pipeline.execute(run, "train")
    sums = _json(run.folder("train") / "sums.json")
    counts = {"ledger": 72, "drawn": 144, "in_batches": 144, "divided_by": 144}
    assert counts == {
        "ledger": sums["ledger_labelled_tokens"],
        "drawn": sums["drawn_labelled_tokens"],
        "in_batches": sums["in_batches"],
        "divided_by": sums["divided_by"],
    }


def test_labels_that_change_on_their_way_are_seen(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from qkit.tasks._encoder import collate as module

    own = module.collate

    def shifted(rows: Any, pad: int) -> Any:
        batch = own(rows, pad)
        return {**batch, "labels": (batch["labels"] + 1).clamp(max=2)}

    run = prepared(tmp_path, model)
    monkeypatch.setattr(module, "collate", shifted)
    with pytest.raises(StageFailed, match="ids disagree"):
        pipeline.execute(run, "train")


@pytest.mark.parametrize("ledger", [False, True])
def test_losses_of_rows_leave_the_training_as_it_is(model: Path, tmp_path: Path, ledger: bool) -> None:
    import pyarrow.parquet as pq

    run = prepared(tmp_path, model, ledger={"losses": ledger}, train={"max_steps": 40})
    pipeline.execute(run, "train")
    plain = prepared(tmp_path / "plain", model, train={"max_steps": 40})
    pipeline.execute(plain, "train")
    name = "adapter/adapter_model.safetensors"
    assert (run.folder("train") / name).read_bytes() == (plain.folder("train") / name).read_bytes()
    file = run.folder("train") / "losses.parquet"
    assert file.exists() == ledger
    if ledger:
        rows = pq.read_table(file).to_pylist()
        means = [sum(row[column] for row in rows) / len(rows) for column in ("loss_before", "loss_after")]
        assert len(rows) == 72 and means[1] < means[0]


# --- going on ---------------------------------------------------------------------------------------------------------

KILLED = """
import os, signal, sys

if "train" in sys.orig_argv:
    from qkit.train.trainer import Counted

    def killed(self, model, inputs, items=None, whole=Counted.training_step):
        if self.state.global_step == 7 and "KILLED" in os.environ:
            os.kill(os.getpid(), signal.SIGKILL)
        return whole(self, model, inputs, items)

    Counted.training_step = killed
"""


@pytest.mark.parametrize("method", ["lora", "full", "head", "gradual", "lora+", "embeddings"])
def test_a_killed_training_goes_on_to_the_same_bytes(with_dropout: Path, tmp_path: Path, method: str) -> None:
    slow = {"embedding_learning_rate": 1e-4, "optim": "lion_8bit"} if method == "embeddings" else {}
    sections: dict[str, Any] = {
        "method": {"gradual": "full", "embeddings": "full", "lora+": "lora"}.get(method, method),
        **({"layers": {"unfreeze_steps": 4, "rate_decay": 0.8}} if method == "gradual" else {}),
        **({"lora": {"lora_dropout": 0.1}} if method == "lora" else {}),
        **({"lora": {"lora_dropout": 0.1, "loraplus_lr_ratio": 8.0}} if method == "lora+" else {}),
        "train": {"max_steps": 12, "save_steps": 3, "gradient_accumulation_steps": 2, **slow},
    }
    straight, cut = (prepared(tmp_path / name, with_dropout, **sections) for name in ("straight", "cut"))
    pipeline.execute(straight, "train")
    (tmp_path / "sitecustomize.py").write_text(KILLED, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}:{Path.cwd()}"}
    command = [sys.executable, "-m", "qkit", "train", str(cut.root)]
    done = subprocess.run(command, env={**environment, "KILLED": "1"}, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not cut.folder("train").exists()
    heard = Heard()
    pipeline.execute(Run.create(cut.root, cut.recipe, heard), "train")
    assert "train: resuming from checkpoint-6" in heard.lines
    weights = "adapter/adapter_model.safetensors" if "lora" in method else "model/model.safetensors"
    assert (cut.folder("train") / weights).read_bytes() == (straight.folder("train") / weights).read_bytes()
    assert _json(cut.folder("train") / "sums.json") == _json(straight.folder("train") / "sums.json")
    lines = [_metrics.lines(run.folder("train") / "metrics.jsonl") for run in (straight, cut)]
    assert [[line["step"], line["loss"]] for line in lines[0]] == [[line["step"], line["loss"]] for line in lines[1]]


@pytest.mark.parametrize("method", ["lora", "full", "head"])
def test_the_same_recipe_gives_the_same_bytes_and_another_seed_others(
    with_dropout: Path, tmp_path: Path, method: str
) -> None:
    weights = "adapter/adapter_model.safetensors" if method == "lora" else "model/model.safetensors"
    contents = []
    for number, seed in enumerate((1, 1, 2)):
        run = prepared(tmp_path / str(number), with_dropout, method=method, seed=seed)
        torch.manual_seed(number)
        pipeline.execute(run, "train")
        contents.append((run.folder("train") / weights).read_bytes())
    assert contents[0] == contents[1] != contents[2]


def test_a_head_that_the_base_has_already_is_named(model: Path, tmp_path: Path) -> None:
    first = prepared(tmp_path / "first", model, method="full", train={"max_steps": 2})
    pipeline.execute(first, "train")
    rows = [{"text": row["text"], "label": row["label"].upper()} for row in labelled_rows(96)]
    heard = Heard()
    second = prepared(tmp_path / "second", first.trained(), heard, method="full", rows=rows, train={"max_steps": 2})
    pipeline.execute(second, "train")
    said = "(classifier), for the labels fruit, tree, wood; training goes on from its weights, with the labels FRUIT, TREE, WOOD"
    assert any(said in line for line in heard.lines)
    again = Heard()
    pipeline.execute(prepared(tmp_path / "third", model, again, method="full", train={"max_steps": 2}), "train")
    assert not any("has a head already" in line for line in again.lines)


def test_a_head_for_masked_words_is_not_one_for_labels(tmp_path: Path) -> None:
    folder = build_model(tmp_path / "model", "modernbert", "AutoModelForMaskedLM")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3)
    assert "head" in new_heads.of(model, folder) and not new_heads.stored(model, folder)
