"""The learning rate of every step and group: drawn by the plan, held by the optimizer, and logged by a training."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.tiny_labelled import build_model, labelled_run
from helpers.training import Heard, _run
from qkit import pipeline
from qkit.core import device
from qkit.core.errors import RecipeError
from qkit.model import source
from qkit.model.adapters import rates
from qkit.plan import _rates
from qkit.recipe import _scheduler_kwargs
from qkit.run.directory import Run
from qkit.train import stage as train_stage
from qkit.train.trainers import labelled, sft

pytestmark = pytest.mark.slow

STEPS = 10
# Of each schedule: entries and warm-up.
SCHEDULES: dict[str, tuple[dict[str, Any], float]] = {
    "linear": ({}, 3),
    "cosine": ({"num_cycles": 0.5}, 0),
    "cosine_with_min_lr": ({"min_lr": 1e-3}, 0.2),
    "cosine_with_restarts": ({"num_cycles": 2}, 2),
    "constant": ({}, 0),
    "constant_with_warmup": ({}, 0.3),
    "polynomial": ({"power": 2.0, "lr_end": 1e-4}, 4),
    "inverse_sqrt": ({}, 3),
    "warmup_stable_decay": ({"num_decay_steps": 4, "decay_type": "1-sqrt", "min_lr_ratio": 0.1}, 2),
}


def sections(kind: str, **others: Any) -> dict[str, Any]:
    kwargs, warmup = SCHEDULES[kind]
    train = {"lr_scheduler_type": kind, "lr_scheduler_kwargs": kwargs, "warmup_steps": warmup, "max_steps": STEPS}
    return {"train": {**train, "learning_rate": 1e-2, "logging_steps": 1, "save_steps": 4}, **others}


def logged(out: Path) -> list[float]:
    lines = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [entry["learning_rate"] for entry in map(json.loads, lines) if "learning_rate" in entry]


@pytest.mark.parametrize("kind", SCHEDULES)
def test_the_plan_draws_what_a_training_logs(tiny_model: Path, tmp_path: Path, kind: str) -> None:
    """To the last bit, in a training that was stopped and resumed; never 0, and at the maximum right after a warm-up."""
    run, out = _run(tmp_path, tiny_model, Heard(stop_at=7), **sections(kind))
    with pytest.raises(KeyboardInterrupt):
        train_stage.run(run, out)
    again, _ = _run(tmp_path, tiny_model, **sections(kind))
    train_stage.run(again, out)
    (drawn,) = (course := _rates.course(run.recipe)).groups
    assert list(drawn.rates) == logged(out)
    assert min(drawn.rates) > 0 and drawn.rates[course.warmup_steps] == max(drawn.rates) == 1e-2
    assert sorted(drawn.rates[: course.warmup_steps]) == list(drawn.rates[: course.warmup_steps])


PLATEAUS = [
    ({"eval_steps": None, "eval_strategy": "no"}, "needs evaluation during training, but train.eval_strategy=no"),
    ({"warmup_steps": 2}, r"warmup_steps=2 has no effect with train\.lr_scheduler_type=reduce_lr_on_plateau"),
    ({"lr_scheduler_kwargs": {"mode": "max"}}, "mode: .* has no such entry"),
    ({"lr_scheduler_kwargs": {"min_lr": 0.1}}, "min_lr=0.1 must be below train.learning_rate=0.01"),
]
PLATEAU = {"patience": 0, "factor": 0.5, "threshold": 10.0, "threshold_mode": "abs"}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model(tmp_path_factory.mktemp("bert"), "bert")


def on_a_plateau(root: Path, encoder: Path, progress: Any = None, **train: Any) -> Run:
    section = {"lr_scheduler_type": "reduce_lr_on_plateau", "lr_scheduler_kwargs": PLATEAU, "warmup_steps": 0}
    section |= {"learning_rate": 1e-2, "max_steps": 8, "eval_steps": 2, "logging_steps": 1, "save_steps": 4}
    file = str(root / "rows.jsonl")
    data = {"train": [{"source": file, "rows": "48:"}], "validation": [{"source": file, "rows": "24:48"}]}
    run = labelled_run(root, encoder, progress, method="full", data=data, train={**section, **train})
    pipeline.execute(run, "data")
    return run


@pytest.mark.parametrize("metric", ["loss", "score"])
def test_a_rate_falls_on_a_plateau(tmp_path: Path, encoder: Path, metric: str) -> None:
    """Of which a threshold makes every evaluation one after the first. Also after a stop, to the same bytes."""
    given: dict[str, Any] = {"metric_for_best_model": metric}
    if metric == "score":
        given["lr_scheduler_kwargs"] = {**PLATEAU, "threshold": 200.0}
    run = on_a_plateau(tmp_path / "whole", encoder, **given)
    pipeline.execute(run, "train")
    seen = logged(run.folder("train"))
    assert seen == pytest.approx([1e-2] * 4 + [5e-3] * 2 + [2.5e-3] * 2)
    stopped = on_a_plateau(tmp_path / "stopped", encoder, Heard(stop_at=7), **given)
    (out := tmp_path / "stopped" / "out").mkdir()
    with pytest.raises(KeyboardInterrupt):
        train_stage.run(stopped, out)
    train_stage.run(Run(stopped.root, stopped.recipe), out)
    assert logged(out) == seen
    weights = "model/model.safetensors"
    assert (out / weights).read_bytes() == (run.folder("train") / weights).read_bytes()


def test_a_plateau_cannot_be_drawn(tmp_path: Path, encoder: Path) -> None:
    with pytest.raises(RecipeError, match="follows a metric, which is not known before training"):
        _rates.course(on_a_plateau(tmp_path, encoder).recipe)


@pytest.mark.parametrize(("train", "said"), PLATEAUS)
def test_a_plateau_of_nothing_is_refused(tmp_path: Path, encoder: Path, train: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        on_a_plateau(tmp_path, encoder, **train)


def test_every_schedule_that_needs_no_metric_is_compared() -> None:
    assert SCHEDULES.keys() == _scheduler_kwargs.RULES.keys() - {*_scheduler_kwargs.BY_METRIC}


# --- groups -------------------------------------------------------------------------------------------------------------


def held(optimizer: Any) -> set[tuple[float, int]]:
    """Rate and size of the groups that an optimizer has."""
    by_rate: dict[float, int] = {}
    for group in optimizer.param_groups:
        by_rate[group["lr"]] = by_rate.get(group["lr"], 0) + sum(p.numel() for p in group["params"])
    return {*by_rate.items()}


def chat_trainer(tiny_model: Path, tmp_path: Path, **given: Any) -> tuple[Run, Any]:
    run, out = _run(tmp_path, tiny_model, **given)
    return run, sft.build_trainer(run, source.resolve(run.recipe.model), device.detect(), out)


def of_peft(trainer: Any, ratio: float, **given: Any) -> list[tuple[float, frozenset[int]]]:
    """PEFT's own groups for LoRA+: rate, and the parameters, without empty ones."""
    from peft.optimizers import create_loraplus_optimizer

    made = create_loraplus_optimizer(trainer.model, torch.optim.AdamW, lr=1e-2, loraplus_lr_ratio=ratio, **given)
    return grouped(made)


def grouped(optimizer: Any) -> list[tuple[float, frozenset[int]]]:
    by_rate: dict[float, set[int]] = {}
    for group in optimizer.param_groups:
        by_rate.setdefault(group["lr"], set()).update(map(id, group["params"]))
    return sorted((rate, frozenset(ids)) for rate, ids in by_rate.items() if ids)


PLUS = {"lora": {"loraplus_lr_ratio": 16.0}}


def test_the_groups_of_lora_plus_are_those_of_peft(tiny_model: Path, tmp_path: Path) -> None:
    _, trainer = chat_trainer(tiny_model, tmp_path, **sections("constant"), **PLUS)
    ours = grouped(trainer.create_optimizer())
    assert ours == of_peft(trainer, 16.0) and [rate for rate, _ in ours] == [1e-2, 16e-2]


def test_also_beside_a_new_head(tmp_path: Path) -> None:
    run = labelled_run(tmp_path, build_model(tmp_path / "bert", "bert"), method="lora", **sections("constant"), **PLUS)
    pipeline.execute(run, "data")
    trainer = labelled.build_trainer(run, tmp_path / "bert", device.detect(), tmp_path)
    assert grouped(trainer.create_optimizer()) == of_peft(trainer, 16.0)


def test_also_with_an_adapter_on_an_embedding() -> None:
    """PEFT has a third rate for these, whose default is 1e-6; here it is that of the embeddings."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    model = get_peft_model(LlamaForCausalLM(config), LoraConfig(target_modules=["embed_tokens", "q_proj"]))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    rates.divide(optimizer, model, rates.Rates(1e-2, ratio=4.0, embeddings=1e-3))
    assert grouped(optimizer) == of_peft(type("Holder", (), {"model": model}), 4.0, loraplus_lr_embedding=1e-3)


CASES: dict[str, dict[str, Any]] = {
    "lora+": PLUS,
    "added tokens": {"model": {"add_tokens": ["<a>"]}, "embeddings": 5e-3},
    "both": {**PLUS, "model": {"add_tokens": ["<a>"]}, "embeddings": 5e-3},
}


@pytest.mark.parametrize("case", CASES)
def test_the_plan_has_the_groups_of_the_optimizer(tiny_model: Path, tmp_path: Path, case: str) -> None:
    given = {**sections("linear"), **{name: value for name, value in CASES[case].items() if name != "embeddings"}}
    if "embeddings" in CASES[case]:
        given["train"]["embedding_learning_rate"] = CASES[case]["embeddings"]
    run, trainer = chat_trainer(tiny_model, tmp_path, **given)
    drawn = {curve.learning_rate for curve in _rates.course(run.recipe).groups}
    assert drawn == {rate for rate, _ in held(trainer.create_optimizer())} and len(drawn) > 1


@pytest.mark.parametrize("kind", ["bert", "distilbert", "modernbert", "llama"])
@pytest.mark.parametrize("given", [{"layers": {"rate_decay": 0.5}}, {"embedding_learning_rate": 1e-4}], ids=str)
def test_of_all_weights_too(tmp_path: Path, kind: str, given: dict[str, Any]) -> None:
    given = {**sections("linear"), **given}
    given["train"] |= {name: given.pop(name) for name in [*given] if name == "embedding_learning_rate"}
    run = labelled_run(tmp_path, build_model(tmp_path / kind, kind), method="full", **given)
    pipeline.execute(run, "data")
    trainer = labelled.build_trainer(run, tmp_path / kind, device.detect(), tmp_path)
    made = trainer.create_optimizer()
    trained = {id(p) for p in trainer.model.parameters() if p.requires_grad}
    assert {id(p) for group in made.param_groups for p in group["params"]} == trained
    drawn = _rates.course(run.recipe, labels=3).groups
    assert {curve.learning_rate for curve in drawn} == {rate for rate, _ in held(made)}
    assert drawn[0].learning_rate == made.param_groups[0]["lr"] == 1e-2
    if "layers" not in given:
        tables = [m for m in trainer.model.modules() if isinstance(m, torch.nn.Embedding)]
        slow = next(ids for rate, ids in grouped(made) if rate == 1e-4)
        assert slow == {id(table.weight) for table in tables}


def test_a_rate_of_embeddings_that_nothing_has_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    given = sections("linear")
    given["train"]["embedding_learning_rate"] = 1e-4
    run, out = _run(tmp_path, tiny_model, **given)
    with pytest.raises(RecipeError, match=r"embedding_learning_rate=0\.0001: no embedding .* is trained"):
        train_stage.run(run, out)
    assert not (out / "metrics.jsonl").exists()


@pytest.mark.parametrize("kind", ["bert", "distilbert", "modernbert", "llama"])
def test_norms_and_biases_do_not_decay(tmp_path: Path, kind: str) -> None:
    """All weights that are no norm and no bias do. transformers decides it, by class and name."""
    given = sections("linear", layers={"rate_decay": 0.5})
    given["train"]["weight_decay"] = 0.1
    run = labelled_run(tmp_path, build_model(tmp_path / kind, kind), method="full", **given)
    pipeline.execute(run, "data")
    trainer = labelled.build_trainer(run, tmp_path / kind, device.detect(), tmp_path)
    decay = {id(p): group["weight_decay"] for group in trainer.create_optimizer().param_groups for p in group["params"]}
    for name, parameter in trainer.model.named_parameters():
        assert decay[id(parameter)] == (0.1 if parameter.ndim > 1 else 0.0), name


def test_a_group_moves_at_its_rate(tiny_model: Path, tmp_path: Path) -> None:
    """Adam's first step moves each weight by the rate. B has a gradient at once; A, behind a B of zeros, has one after that."""
    given = {**sections("constant"), **PLUS}
    given["train"] |= {"max_steps": 1, "max_grad_norm": 1e9}
    _, trainer = chat_trainer(tiny_model, tmp_path, **given)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()
    moved = {n: float((p - before[n]).detach().abs().max()) for n, p in trainer.model.named_parameters() if n in before}
    assert {name for name, by in moved.items() if by == 0} == {name for name in moved if "lora_A" in name}
    assert [by for name, by in moved.items() if "lora_B" in name] == pytest.approx([0.16] * (len(moved) // 2), rel=0.02)


def test_the_course_names_the_first_group_main(tiny_model: Path, tmp_path: Path) -> None:
    run, _ = _run(tmp_path, tiny_model, **sections("linear"), **PLUS)
    course = _rates.course(run.recipe)
    assert [curve.name for curve in course.groups] == [rates.MAIN, rates.SECOND]
    assert dataclasses.asdict(course) == course.to_dict() and len(course.groups[1].rates) == STEPS
