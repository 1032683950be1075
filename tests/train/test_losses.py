"""Losses of tasks with labels, alone and through the trainer: values, weights, and the same gradient whatever the accumulation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from helpers.first_step import first_step
from helpers.tiny_labelled import LABELS, build_model, labelled_run, text
from qkit import pipeline
from qkit.core.device import detect
from qkit.core.errors import RecipeError, StageFailed
from qkit.recipe.labels import Loss
from qkit.recipe.load import from_dict
from qkit.train import losses
from qkit.train.trainers import labelled

COUNTS = {"fruit": 6, "tree": 3, "wood": 1}
OWN = """
import torch

def squared(logits, labels):
    return (1 - logits.softmax(-1).gather(1, labels[:, None])[:, 0]) ** 2

def mean(logits, labels):
    return torch.nn.functional.cross_entropy(logits, labels)

def one(logits, labels):
    return mean(logits, labels)[None]
"""


@pytest.fixture
def data(tmp_path: Path) -> Path:
    (tmp_path / "labels.json").write_text(json.dumps({"names": [*COUNTS], "rows": {"train": COUNTS}}))
    return tmp_path


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a module on the path."""
    name = f"losses_of_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(OWN, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    return name


def sample() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return torch.randn(10, 3) * 3, torch.tensor([0] * 6 + [1] * 3 + [2])


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_cross_entropy(data: Path, smoothing: float) -> None:
    logits, labels = sample()
    own = losses.open_loss(Loss(label_smoothing=smoothing), data)(logits, labels)
    assert torch.equal(own, cross_entropy(logits, labels, reduction="none", label_smoothing=smoothing))
    assert own.shape == labels.shape


@pytest.mark.parametrize("given", ["balanced", {"wood": 5.0, "tree": 0.5}])
def test_class_weights_average_one_over_the_training_rows(data: Path, given: Any) -> None:
    """torch divides by the sum of the weights in the batch; qkit's have a mean of 1 over all training rows, and losses are divided by rows.

    On a batch with the proportions of the whole set, these are the same.
    """
    weights = losses.class_weights(Loss(class_weights=given), data)
    assert weights is not None
    counts = torch.tensor([*COUNTS.values()], dtype=torch.float32)
    assert float((weights * counts).sum() / counts.sum()) == pytest.approx(1, abs=1e-6)
    relative = 1 / counts if given == "balanced" else torch.tensor([1.0, 0.5, 5.0])
    assert torch.allclose(weights / weights[0], relative / relative[0])
    logits, labels = sample()
    own = losses.open_loss(Loss(class_weights=given), data)(logits, labels)
    assert torch.allclose(own.mean(), cross_entropy(logits, labels, weight=relative), atol=1e-6)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_focal_loss(data: Path, gamma: float) -> None:
    logits, labels = sample()
    own = losses.open_loss(Loss(name="focal", gamma=gamma), data)(logits, labels)
    p = logits.softmax(-1)[torch.arange(10), labels]
    assert torch.allclose(own, -((1 - p) ** gamma) * p.log(), atol=1e-6)
    if gamma == 0:
        assert torch.allclose(own, cross_entropy(logits, labels, reduction="none"), atol=1e-6)
    weighted = losses.open_loss(Loss(name="focal", gamma=gamma, class_weights={"wood": 3.0}), data)(logits, labels)
    weights = losses.class_weights(Loss(class_weights={"wood": 3.0}), data)
    assert weights is not None and torch.allclose(weighted, own * weights[labels])


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
def test_the_gradient_of_a_row_that_is_certain_is_a_number(data: Path, gamma: float) -> None:
    logits = torch.tensor([[200.0, -200.0, 0.0], [-200.0, 200.0, 0.0]], requires_grad=True)
    losses.open_loss(Loss(name="focal", gamma=gamma), data)(logits, torch.tensor([0, 0])).sum().backward()
    assert logits.grad is not None and logits.grad.isfinite().all()
    assert logits.grad[0].abs().max() < 1e-3 and logits.grad[1].abs().max() > 0.5


def test_a_label_that_class_weights_name_wrongly(data: Path) -> None:
    with pytest.raises(RecipeError, match=r"loss\.class_weights: there is no label 'frut', did you mean 'fruit'"):
        losses.open_loss(Loss(class_weights={"frut": 2.0}), data)


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (
            "crossentropy",
            "loss.name=crossentropy: must be cross_entropy, focal, bce, mse, huber, crf, or module:function",
        ),
        (
            "no_such_module:f",
            "No module named 'no_such_module'; the module must be importable, for example from PYTHONPATH",
        ),
        ("json:f", "module 'json' has no attribute 'f'"),
    ],
)
def test_losses_that_do_not_exist(data: Path, kind: str, said: str) -> None:
    with pytest.raises(RecipeError) as raised:
        losses.open_loss(Loss(name=kind), data)
    assert said in str(raised.value)


@pytest.mark.parametrize("function", ["mean", "one"])
def test_a_loss_that_returns_a_mean_is_refused(data: Path, own: str, function: str) -> None:
    loss = losses.open_loss(Loss(name=f"{own}:{function}"), data)
    with pytest.raises(
        RecipeError,
        match=r"returned a tensor of shape \((1,)?\) for labels of shape \(10,\); it must return one loss for each",
    ):
        loss(*sample())


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"name": "focal", "label_smoothing": 0.1}, "loss.label_smoothing=0.1 applies to loss.name=cross_entropy"),
        ({"gamma": 1.0}, "loss.gamma=1.0 applies to loss.name=focal, but loss.name=cross_entropy"),
        (
            {"name": "a:b", "class_weights": "balanced"},
            "loss.class_weights=balanced applies to loss.name=cross_entropy and focal",
        ),
    ],
)
def test_settings_that_a_loss_does_not_read(section: dict[str, Any], said: str) -> None:
    raw = {
        "task": "classify",
        "model": {"source": "owner/x"},
        "data": {"train": [{"source": "a.jsonl"}]},
        "loss": section,
    }
    with pytest.raises(RecipeError) as raised:
        from_dict(raw, (), "the test")
    assert said in str(raised.value)


# --- through the trainer ----------------------------------------------------------------------------------------------

LOSSES: dict[str, dict[str, Any]] = {
    "cross_entropy": {},
    "balanced": {"class_weights": "balanced"},
    "smoothing": {"label_smoothing": 0.1, "class_weights": {"wood": 3.0}},
    "focal": {"name": "focal", "class_weights": "balanced"},
    "own": {"name": "OWN:squared"},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    quiet = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return build_model(tmp_path_factory.mktemp("bert"), "bert", **quiet)


def unequal_rows() -> list[dict[str, Any]]:
    """Eight rows of one padded length, of which most have the first label."""
    return [{"text": text(7 * i), "label": LABELS[(0, 0, 0, 0, 0, 1, 1, 2)[i]]} for i in range(8)]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("name", LOSSES)
def test_gradients_do_not_depend_on_how_a_batch_is_divided(
    model: Path, tmp_path: Path, own: str, name: str, method: str
) -> None:
    section = {key: str(v).replace("OWN", own) if key == "name" else v for key, v in LOSSES[name].items()}
    results = []
    for number, (rows, accumulation, parts) in enumerate(((8, 1, 1), (1, 8, 1), (8, 1, 3), (3, 3, 2))):
        run = labelled_run(
            tmp_path / str(number),
            model,
            rows=unequal_rows(),
            method=method,
            loss=section,
            micro_batches=parts,
            held_out=0,
            data={"batch_rows": rows},
            train={"max_steps": 1, "gradient_accumulation_steps": accumulation},
        )
        pipeline.execute(run, "data")
        results.append(first_step(labelled.build_trainer(run, model, detect(), tmp_path / str(number))))
    assert [dict(step.sizes) for step in results] == [{8: 1}, {1: 8}, {3: 2, 2: 1}, {2: 2, 1: 4}]
    whole = results[0].gradients
    assert max(float(gradient.abs().max()) for gradient in whole.values()) > 1e-3
    for step in results[1:]:
        assert step.loss == pytest.approx(results[0].loss, abs=1e-6) and step.gradients.keys() == whole.keys()
        for parameter, gradient in whole.items():
            assert torch.allclose(step.gradients[parameter], gradient, rtol=0, atol=1e-6), parameter


@pytest.mark.slow
def test_the_stage_refuses_a_mean(model: Path, tmp_path: Path, own: str) -> None:
    run = labelled_run(tmp_path / "r", model, loss={"name": f"{own}:mean"})
    pipeline.execute(run, "data")
    with pytest.raises((RecipeError, StageFailed), match="it must return one loss for each"):
        pipeline.execute(run, "train")
    assert not run.folder("train").exists()
