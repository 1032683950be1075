"""Weights of rows: loss and gradients of a batch are those of rows one by one, times their weights, divided by the weights of all labels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch.nn.functional import cross_entropy

from helpers.first_step import first_step
from helpers.tiny_labelled import build_model, labelled_rows, labelled_run
from helpers.training import CAPACITY, LENGTHS, Heard, _json, _labelled, _losses, _rows, _run
from qkit import pipeline
from qkit.core.batching import IGNORED
from qkit.core.device import detect
from qkit.core.errors import StageFailed
from qkit.data.entry import Sourced
from qkit.data.prepare import weight_of
from qkit.data.read import Record
from qkit.model import source
from qkit.plugins.example import RowError
from qkit.recipe.load import from_dict
from qkit.train import row_weights
from qkit.train import stage as train_stage
from qkit.train.label_sums import Sums
from qkit.train.trainers import labelled, sft

WEIGHTS = [1.0 + 0.25 * (number % 7) for number in range(len(LENGTHS))]


@pytest.mark.parametrize("given", [None, "", 0, -1, "much", True, float("inf"), float("nan"), [2]])
def test_a_training_row_needs_a_number_above_zero(given: Any) -> None:
    row = {} if given is None else {"importance": given}
    with pytest.raises(RowError, match=r"data\.weight=weight: must be a number above 0") as refused:
        _weight_of(row)
    assert refused.value.rule == "malformed"


def test_weights_are_read_from_the_column_that_is_mapped() -> None:
    assert _weight_of({"importance": "2.5", "weight": 9}) == 2.5 and _weight_of({"importance": 3}) == 3.0
    assert _weight_of({}, pool="test") == 1.0 and _weight_of({"importance": 4}, pool="validation") == 4.0


def _weight_of(row: dict[str, Any], pool: str = "train") -> float:
    data = {"train": [{"source": "org/rows"}], "weight": "weight", "columns": {"weight": "importance"}}
    recipe = from_dict({"task": "chat", "model": {"source": "org/model"}, "data": data}, (), "the test")
    return weight_of(Sourced(pool, 0, Record("rows.jsonl", 1, row)), recipe)


def _batch(weights: Any, labels: Any, packing: bool = False, **more: Any) -> dict[str, torch.Tensor]:
    batch = {"labels": torch.tensor(labels), **more}
    return {**batch, "weights": row_weights.of_batch(weights, batch, packing)}


def test_a_divisor_is_the_sum_of_the_weights_of_labels() -> None:
    rows = _batch([0.5, 2.0], [[IGNORED, 4, 5], [IGNORED, IGNORED, 6]])
    pack = _batch([0.5, 2.0], [[IGNORED, 4, 5, IGNORED, 6, IGNORED]], True, lengths=torch.tensor([3, 2]))
    assert pack["weights"].tolist() == [[0.5, 0.5, 0.5, 2.0, 2.0, 0.0]]
    assert row_weights.divisor([rows]) == row_weights.divisor([pack]) == 3.0
    classes, numbers = _batch([0.5, 2.0], [1, 0]), _batch([0.5, 2.0], [[0.1, 0.2], [0.3, 0.4]])
    assert row_weights.divisor([classes]) == row_weights.divisor([numbers]) == 2.5
    assert row_weights.divisor([rows, pack]) == 6.0
    places = torch.tensor([1, 2]), torch.tensor([0, 4])
    assert row_weights.at(rows["weights"], torch.tensor([0, 1]), places[0]).tolist() == [0.5, 2.0]
    assert row_weights.at(pack["weights"], torch.tensor([0, 0]), places[1]).tolist() == [0.5, 2.0]


def test_weights_that_get_lost_are_seen() -> None:
    right = Sums(drawn=10, in_batches=10, divided_by=12.5, drawn_weight=12.5)
    assert right.problem(0.5, 20) is None
    assert "weights of labels disagree" in str(Sums(10, 10, 12.6, drawn_weight=12.5).problem(0.5, 20))
    assert "label counts disagree" in str(Sums(10, 9, 12.5, drawn_weight=12.5).problem(0.5, 20))
    assert "label counts disagree" in str(Sums(10, 10, 11).problem(0.5, 20))


def _weighted(root: Path, model: Path, packing: bool = False, progress: Any = None, **train: Any) -> Any:
    """A run whose prepared rows have weights, in fp32 and without an optimizer that matters."""
    run, out = _run(
        root,
        model,
        progress,
        data={"packing": packing, "weight": "weight"},
        quantization={"load_in_4bit": False},
        train=train,
    )
    file = root / "data" / "train.parquet"
    pq.write_table(pq.read_table(file).append_column("weight", pa.array(WEIGHTS, pa.float32())), file)
    return run, out


@pytest.mark.slow
@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize(("tokens", "accumulation"), [(CAPACITY, 1), (CAPACITY // 2, 3)])
def test_a_step_is_that_of_weighted_rows(
    tiny_model: Path, tmp_path: Path, packing: bool, tokens: int, accumulation: int
) -> None:
    run, out = _weighted(
        tmp_path, tiny_model, packing, max_steps=1, gradient_accumulation_steps=accumulation if not packing else 2
    )
    device = detect()
    if not packing:
        data = run.recipe.data.model_copy(update={"batch_tokens": tokens})
        run.recipe = run.recipe.model_copy(update={"data": data})
    trainer = sft.build_trainer(run, source.resolve(run.recipe.model), device, out)
    trainer.args.bf16, trainer.accelerator.native_amp = False, False
    trainer.model.float()
    seen: list[int] = []
    counted = trainer._count
    trainer._count = lambda inputs, items: (seen.extend(inputs["rows"].tolist()), counted(inputs, items))[1]
    start = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    step = first_step(trainer)
    trainer.model.load_state_dict(start)
    trainer.model.zero_grad()
    loss = _by_row(trainer, seen)
    assert step.loss == pytest.approx(float(loss), rel=1e-5)
    for name, parameter in trainer.model.named_parameters():
        if parameter.grad is not None:
            assert (step.gradients[name] - parameter.grad).norm() <= 1e-5 * parameter.grad.norm(), name
    assert trainer.sums.drawn_weight == pytest.approx(trainer.sums.divided_by, rel=1e-6)


def _by_row(trainer: Any, numbers: list[int]) -> torch.Tensor:
    """The loss of these rows, one at a time through the plain model, with its gradients."""
    rows = _rows()
    labels = {n: torch.tensor(rows[n]["labels"]) for n in numbers}
    total = sum(WEIGHTS[n] * int((labels[n] != IGNORED).sum()) for n in numbers)
    whole = torch.tensor(0.0)
    for n in numbers:
        ids = torch.tensor(rows[n]["input_ids"])[None]
        states = trainer.base_model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
        logits = trainer.base_model.get_output_embeddings()(states)[0, :-1]
        loss = WEIGHTS[n] * cross_entropy(logits, labels[n][1:], ignore_index=IGNORED, reduction="sum") / total
        loss.backward()
        whole += loss.detach()
    return whole


@pytest.mark.slow
def test_weights_are_counted_and_losses_of_rows_are_without_them(tiny_model: Path, tmp_path: Path) -> None:
    heard = Heard()
    run, out = _weighted(
        tmp_path / "weighted", tiny_model, True, heard, num_train_epochs=1, gradient_accumulation_steps=2
    )
    run.recipe = run.recipe.model_copy(update={"ledger": run.recipe.ledger.model_copy(update={"losses": True})})
    train_stage.run(run, out)
    sums = _json(out / "sums.json")
    labels = [sum(label != IGNORED for label in row["labels"]) for row in _rows()]
    wanted = sum(count * weight for count, weight in zip(labels, WEIGHTS, strict=True))
    assert sums["in_batches"] == sums["drawn_labelled_tokens"] == _labelled()
    assert sums["drawn_weight"] == pytest.approx(wanted) and sums["divided_by"] == pytest.approx(wanted)
    assert any(f"which weigh {wanted:,.6g}" in line for line in heard.lines)
    plain, other = _run(
        tmp_path / "plain",
        tiny_model,
        quantization={"load_in_4bit": False},
        ledger={"losses": True},
        train={"max_steps": 1},
    )
    train_stage.run(plain, other)
    assert [row["loss_before"] for row in _losses(out)] == [row["loss_before"] for row in _losses(other)]


@pytest.mark.slow
def test_a_lost_weight_stops_the_training(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = row_weights.divisor
    monkeypatch.setattr(row_weights, "divisor", lambda batches: right(batches) + 1)
    run, out = _weighted(tmp_path, tiny_model, max_steps=2)
    with pytest.raises(StageFailed, match="weights of labels disagree"):
        train_stage.run(run, out)


@pytest.mark.slow
@pytest.mark.parametrize("accumulation", [1, 4])
def test_a_step_of_a_task_with_labels_is_that_of_weighted_rows(tmp_path: Path, accumulation: int) -> None:
    folder = build_model(tmp_path / "bert", "bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    rows = [{**row, "importance": f"{1 + number % 5}"} for number, row in enumerate(labelled_rows(96))]
    data = {"weight": "importance", "batch_rows": 8 // accumulation}
    train = {"max_steps": 1, "gradient_accumulation_steps": accumulation, "bf16": False}
    run = labelled_run(tmp_path, folder, rows=rows, method="full", data=data, train=train)
    pipeline.execute(run, "data")
    prepared = pq.read_table(run.folder("data") / "train.parquet").to_pylist()
    assert {row["weight"] for row in prepared} == {1.0, 2.0, 3.0, 4.0, 5.0}
    assert "importance" not in (run.folder("data") / "summary.json").read_text()
    trainer = labelled.build_trainer(run, folder, detect(), tmp_path)
    seen: list[int] = []
    counted: Any = trainer._count  # type: ignore[attr-defined]
    trainer._count = lambda inputs, items: (seen.extend(inputs["rows"].tolist()), counted(inputs, items))[1]  # type: ignore[attr-defined]
    start = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    step = first_step(trainer)
    trainer.model.load_state_dict(start)
    trainer.model.zero_grad()
    total, whole = sum(prepared[n]["weight"] for n in seen), 0.0
    for n in seen:
        logits = trainer.model(input_ids=torch.tensor([prepared[n]["input_ids"]])).logits
        loss = prepared[n]["weight"] * cross_entropy(logits, torch.tensor(prepared[n]["labels"])) / total
        loss.backward()
        whole += float(loss.detach())
    assert step.loss == pytest.approx(whole, rel=1e-5)
    for name, parameter in trainer.model.named_parameters():
        if parameter.grad is not None and float(parameter.grad.norm()) > 1e-6:
            assert (step.gradients[name] - parameter.grad).norm() <= 1e-5 * parameter.grad.norm(), name
