"""The plan of a language model whose own weights are trained, or an adapter other than LoRA: a traced step against a real one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from helpers.training import Heard, _run
from qkit.core import memory_watch
from qkit.core.device import Device, detect
from qkit.plan import gpus, sheet
from qkit.plan import plan as plan_plan
from qkit.recipe.load import from_dict
from qkit.recipe.schema import Recipe
from qkit.train import memory_report
from qkit.train.trainers import open_trainer

CPU = Device("cpu", "Some CPU", 2**34, 2)
PLAIN = {"load_in_4bit": False}
FULL: dict[str, Any] = {"method": "full", "quantization": PLAIN}
BESIDE = ("process", "allocator", "kernels")


def both(root: Path, tiny_model: Path, **sections: Any) -> tuple[Mapping[str, int], Mapping[str, int]]:
    """Bytes by line at the peak of the second step of training, planned and measured; each step has the same batch of rows."""
    train = {"max_steps": 2, "num_train_epochs": 1, "gradient_checkpointing": False, **sections.pop("train", {})}
    data = {"batch_tokens": 4096, **sections.pop("data", {})}
    run, out = _run(root, tiny_model, Heard(), train=train, data=data, **sections)
    trainer = open_trainer("chat").build_trainer(run, tiny_model, detect(), out)
    known = memory_report.known_of(trainer, 0)
    watcher = memory_watch.step_watcher()
    trainer.add_callback(watcher)
    trainer.train()
    return plan_plan.predicted_items(run.recipe, CPU, known), memory_report._named(watcher.alive.items(), run.recipe)


def near(planned: Mapping[str, int], measured: Mapping[str, int]) -> None:
    """A plan is an upper bound, and no more than 8 % above."""
    tensors, taken = sum(size for name, size in planned.items() if name not in BESIDE), sum(measured.values())
    assert 0.99 * taken < tensors < 1.08 * taken, (planned, measured)


@pytest.mark.slow
@pytest.mark.parametrize(
    "sections",
    [
        {},
        {"train": {"bf16": False}},
        {"train": {"gradient_checkpointing": True}},
        {"train": {"trainable": ["layers.1"]}},
        {"micro_batches": 3},
        {"data": {"packing": True, "batch_tokens": 128}},
    ],
    ids=lambda sections: json.dumps(sections)[1:-1].replace('"', ""),
)
def test_a_step_of_all_weights(tiny_model: Path, tmp_path: Path, sections: dict[str, Any]) -> None:
    planned, measured = both(tmp_path, tiny_model, **FULL, **sections)
    for name in ("weights", "trained", "optimizer"):
        assert planned[name] == pytest.approx(measured[name], rel=0.001), name
    near(planned, measured)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["IA3", "OFT"])
def test_a_step_of_another_adapter(tiny_model: Path, tmp_path: Path, kind: str) -> None:
    section = {"peft_type": kind, "target_modules": ["q_proj", "down_proj"]}
    section |= {"feedforward_modules": ["down_proj"]} if kind == "IA3" else {"oft_block_size": 4}
    planned, measured = both(tmp_path, tiny_model, method="peft", peft=section, quantization=PLAIN)
    assert (planned["adapter"], planned["weights"]) == pytest.approx(
        (measured["adapter"], measured["weights"]), rel=0.01
    )
    near(planned, measured)


@pytest.mark.slow
@pytest.mark.parametrize("four_bit", [False, True])
@pytest.mark.parametrize("lora", [{"use_dora": True}, {"init_lora_weights": "pissa"}], ids=["dora", "pissa"])
def test_a_step_of_lora_that_is_more(tiny_model: Path, tmp_path: Path, lora: dict[str, Any], four_bit: bool) -> None:
    if four_bit and "use_dora" not in lora:
        pytest.skip("a part of the base is taken out of 16 bits only")
    planned, measured = both(tmp_path, tiny_model, lora=lora, quantization={"load_in_4bit": four_bit})
    assert planned["adapter"] == measured["adapter"]
    tables = 0.15 if four_bit else 0.001  # of quantization: much, beside matrices as small as these
    assert planned["weights"] == pytest.approx(measured["weights"], rel=tables)
    near(planned, measured)


def recipe_of(**sections: Any) -> Recipe:
    data = {"max_length": 512, "batch_tokens": 512}
    return from_dict(
        {"task": "chat", "model": {"source": "Qwen/Qwen2.5-0.5B"}, "data": data, **sections}, (), "the test"
    )


@pytest.mark.slow
@pytest.mark.parametrize("card", ["rtx-4090", "h200"])
def test_every_stage_of_a_known_model_is_planned(card: str) -> None:
    """Nothing is loaded: its config is known. Training takes 16 bytes a parameter and more."""
    shown = sheet.sheet(recipe_of(**FULL), gpus.device(card))
    train = next(stage for stage in shown.stages if stage.stage == "train")
    assert [stage.stage for stage in shown.stages] == list(plan_plan.STAGES)
    assert 16 * shown.parameters < train.peak_bytes < 30 * shown.parameters
    assert shown.pace.tokens is None or shown.pace.tokens > 0


@pytest.mark.slow
def test_a_plan_that_does_not_fit_proposes_an_adapter() -> None:
    planned = plan_plan.plan(recipe_of(**FULL), device=plan_plan.device_for(None, "6GiB"))
    assert not planned.fits or planned.remedies
    assert any("method=lora" in text for remedy in planned.remedies for text in remedy.set), plan_plan.refusal(planned)
