"""The section `layers`: what is frozen stays bit for bit, layers join when they should, and rates are those of their depth."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from helpers.tiny_labelled import build_model, labelled_run
from qkit import pipeline
from qkit.core.device import detect
from qkit.core.errors import ModelError
from qkit.model.adapters import layers
from qkit.recipe.labels import Layers
from qkit.train.trainers import labelled

pytestmark = pytest.mark.slow
KINDS = ["bert", "distilbert", "modernbert", "llama"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {kind: build_model(root / kind, kind) for kind in KINDS}


def trainer_of(root: Path, model: Path, **sections: Any) -> Any:
    run = labelled_run(root, model, method="full", **sections)
    pipeline.execute(run, "data")
    return labelled.build_trainer(run, model, detect(), root)


@pytest.mark.parametrize("kind", KINDS)
def test_depths_follow_the_forward_pass(models: dict[str, Path], kind: str) -> None:
    """A change of what is at some depth leaves the states of all layers below as they are."""
    model = transformers.AutoModelForSequenceClassification.from_pretrained(models[kind], num_labels=3).eval()
    by_name = layers.depths(model)
    count = model.config.num_hidden_layers
    assert {*by_name.values()} == {*range(count + 2)}
    ids = torch.tensor([[1, 7, 8, 2]])

    def states() -> list[torch.Tensor]:
        with torch.no_grad():
            return [*model(input_ids=ids, output_hidden_states=True).hidden_states]

    before = states()
    for name, parameter in model.named_parameters():
        if 1 <= by_name[name] <= count:
            kept = parameter.data.clone()
            parameter.data += 0.5
            same = [torch.equal(old, new) for old, new in zip(before, states(), strict=True)]
            assert all(same[: by_name[name]]), name
            parameter.data = kept


@pytest.mark.parametrize("kind", KINDS)
def test_frozen_layers_stay_as_they_were(models: dict[str, Path], tmp_path: Path, kind: str) -> None:
    trainer = trainer_of(tmp_path, models[kind], layers={"frozen": 1}, train={"max_steps": 3})
    by_name = layers.depths(trainer.model)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(parameter, before[name]) == (by_name[name] <= 1), name


def test_layers_join_one_by_one(models: dict[str, Path], tmp_path: Path) -> None:
    """Two layers: the head alone for two steps, then the second layer, then the first, then the embeddings."""
    trainer = trainer_of(tmp_path, models["bert"], layers={"unfreeze_steps": 2}, train={"max_steps": 8})
    by_name, changed = layers.depths(trainer.model), []

    class Watching(transformers.TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            moved = [name for name, p in trainer.model.named_parameters() if not torch.equal(p, self.before[name])]
            changed.append(min(by_name[name] for name in moved))

    trainer.add_callback(Watching())
    trainer.train()
    assert changed == [3, 3, 2, 2, 1, 1, 0, 0]
    assert all(p.requires_grad for p in trainer.model.parameters())


def test_rates_fall_with_depth(models: dict[str, Path], tmp_path: Path) -> None:
    """Adam's first step moves each weight by the rate, as far as its gradient is not tiny."""
    train = {
        "max_steps": 1,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "max_grad_norm": 1e9,
    }
    trainer = trainer_of(tmp_path, models["bert"], layers={"rate_decay": 0.5}, train=train)
    by_name = layers.depths(trainer.model)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(1e-3)
    for name, parameter in trainer.model.named_parameters():
        if name.endswith("key.bias"):  # it moves all scores of a query alike, so its gradient is rounding
            continue
        moved = float((parameter.detach() - before[name]).abs().max())
        assert moved == pytest.approx(1e-3 * 0.5 ** (3 - by_name[name]), rel=0.02), name


def test_every_weight_is_in_one_group(models: dict[str, Path], tmp_path: Path) -> None:
    trainer = trainer_of(
        tmp_path, models["llama"], layers={"rate_decay": 0.9, "frozen": 1}, train={"weight_decay": 0.1}
    )
    optimizer = trainer.create_optimizer()
    grouped = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in trainer.model.parameters() if p.requires_grad)
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0, 0.1}
    assert trainer.create_optimizer() is optimizer and len(optimizer.param_groups) == len(
        {*map(id, optimizer.param_groups)}
    )


def test_more_layers_than_there_are(models: dict[str, Path]) -> None:
    model = transformers.AutoModelForSequenceClassification.from_pretrained(models["bert"])
    with pytest.raises(ModelError, match=r"layers\.frozen=3: BertForSequenceClassification has 2 layers"):
        layers.freeze(model, 3)


def test_a_model_without_a_stack(models: dict[str, Path]) -> None:
    model = transformers.AutoModelForSequenceClassification.from_pretrained(models["bert"])
    model.config.num_hidden_layers = 5
    with pytest.raises(ModelError, match="its layers cannot be told apart"):
        layers.unfreezing(model, Layers(unfreeze_steps=1))
