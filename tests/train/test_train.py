"""The stage `train` on rows that are written here: sums, packing, losses of rows, and going on from a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from helpers.tiny import build_tokenizer
from helpers.training import CAPACITY, LENGTHS, Heard, _json, _labelled, _losses, _rows, _run
from qkit import pipeline
from qkit.core import device as core_device
from qkit.core.batching import IGNORED, TokenBudgetBatches, packed
from qkit.core.errors import RecipeError, StageFailed
from qkit.model import load as model_load
from qkit.plan import gpus
from qkit.recipe.load import load
from qkit.run.directory import Run
from qkit.tasks._conversation.collate import collate
from qkit.train import _metrics, checkpoints, memory_report
from qkit.train import stage as train_stage
from qkit.train.fast import head
from qkit.train.trainers import sft

pytestmark = pytest.mark.slow

# --- sums -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("accumulation", [1, 4], ids=["no accumulation", "a last one that is not full"])
def test_every_label_of_the_ledger_is_trained_on_once_an_epoch(
    tiny_model: Path, tmp_path: Path, packing: bool, accumulation: int
) -> None:
    heard = Heard()
    run, out = _run(
        tmp_path, tiny_model, heard, data={"packing": packing}, train={"gradient_accumulation_steps": accumulation}
    )
    train_stage.run(run, out)
    sums = _json(out / "sums.json")
    assert sums == {
        "records": 25,
        "rows": 21,
        "dropped": 4,
        "epochs": 2.0,
        "ledger_labelled_tokens": _labelled(),
        "drawn_labelled_tokens": 2 * _labelled(),
        "divided_by": 2 * _labelled(),
        "in_batches": 2 * _labelled(),
    }
    assert any(f"{2 * _labelled():,} in the divisors of the loss" in line for line in heard.lines)
    assert (out / "adapter" / "adapter_model.safetensors").is_file() and _json(out / "memory.json")["predicted"]


def test_a_run_that_ends_in_mid_epoch_adds_up(tiny_model: Path, tmp_path: Path) -> None:
    run, out = _run(tmp_path, tiny_model, train={"max_steps": 3, "gradient_accumulation_steps": 2})
    train_stage.run(run, out)
    sums = _json(out / "sums.json")
    assert 0 < sums["drawn_labelled_tokens"] == sums["in_batches"] == sums["divided_by"] < _labelled()
    assert 0 < sums["epochs"] < 1


def _shifted_labels(rows: Any, pad: int) -> dict[str, torch.Tensor]:
    batch = collate(rows, pad)
    return {**batch, "labels": batch["labels"].roll(1, dims=1)}


def _shifted_mask(rows: Any, pad: int) -> dict[str, torch.Tensor]:
    batch = collate(rows, pad)
    labelled = (batch["labels"] != IGNORED).roll(-1, dims=1)
    return {**batch, "labels": batch["input_ids"].where(labelled, torch.tensor(IGNORED))}


def _cut_short(rows: Any, pad: int) -> dict[str, torch.Tensor]:
    return collate([{**row, "labels": [*row["labels"][:-1], IGNORED]} for row in rows], pad)


@pytest.mark.parametrize(
    ("broken", "said"),
    [(_shifted_labels, "counts disagree"), (_shifted_mask, "ids disagree"), (_cut_short, "counts disagree")],
)
def test_labels_that_change_on_their_way_are_seen(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: Any, said: str
) -> None:
    monkeypatch.setattr("qkit.tasks._conversation.collate.collate", broken)
    run, out = _run(tmp_path, tiny_model)
    with pytest.raises(StageFailed, match=said):
        train_stage.run(run, out)
    assert not (out / "adapter").exists() and not (out / "sums.json").exists()


def test_a_wrong_divisor_is_seen(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = transformers.Trainer._get_num_items_in_batch
    monkeypatch.setattr(transformers.Trainer, "_get_num_items_in_batch", lambda *given: right(*given) + 1)
    run, out = _run(tmp_path, tiny_model)
    with pytest.raises(StageFailed, match=r"the loss was divided by \d"):
        train_stage.run(run, out)


def test_an_epoch_that_leaves_rows_out_is_seen(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = TokenBudgetBatches.batches
    monkeypatch.setattr(TokenBudgetBatches, "batches", lambda self, rng: whole(self, rng)[1:])
    run, out = _run(tmp_path, tiny_model)
    with pytest.raises(StageFailed, match=f"1 x {_labelled():,} in the ledger"):
        train_stage.run(run, out)


@pytest.mark.parametrize("spoilt", ["loss", "gradient norm"])
def test_training_stops_at_a_step_that_is_no_number(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spoilt: str
) -> None:
    """Checkpoints are written every two steps and logs every four, so that step 4 would be kept and step 3 averaged."""
    step, whole = transformers.Trainer.training_step, transformers.Trainer._clip_grad_norm

    def loss(trainer: Any, *given: Any) -> torch.Tensor:
        own: torch.Tensor = step(trainer, *given)
        return own * float("nan") if spoilt == "loss" and trainer.state.global_step == 3 else own

    def norm(trainer: Any, model: Any) -> Any:
        own = whole(trainer, model)
        return own * float("inf") if spoilt == "gradient norm" and trainer.state.global_step == 3 else own

    monkeypatch.setattr(transformers.Trainer, "training_step", loss)
    monkeypatch.setattr(transformers.Trainer, "_clip_grad_norm", norm)
    run, out = _run(tmp_path, tiny_model, train={"max_steps": 6, "save_steps": 2, "logging_steps": 4})
    with pytest.raises(
        StageFailed, match=rf"training diverged at step 4: {spoilt} is (nan|inf)\. Lower train\.learning_rate"
    ):
        train_stage.run(run, out)
    kept = checkpoints.newest_whole(out / "checkpoints")
    assert kept is not None and kept.name == "checkpoint-2" and not (out / "adapter").exists()


def test_a_model_is_loaded_on_the_cpu_where_torch_sees_a_card(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer

    run, _ = _run(tmp_path, tiny_model)
    monkeypatch.setattr(Bnb4BitHfQuantizer, "update_device_map", lambda _, asked: asked or {"": "meta"})
    loaded = model_load.load_base(tiny_model, run.recipe, core_device.detect())
    assert {parameter.device.type for parameter in loaded.parameters()} == {"cpu"}


def test_a_model_that_cannot_be_planned_is_trained(tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    tokenizer, folder, heard = build_tokenizer(), tmp_path / "falcon", Heard()
    config = transformers.FalconConfig(vocab_size=len(tokenizer), alibi=False, **sizes)
    transformers.FalconForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    exports = {"export": {"formats": ["vllm"]}, "bench": {"runtimes": ["transformers"]}}
    run, out = _run(tmp_path, folder, heard, train={"max_steps": 2}, **exports)
    train_stage.run(run, out)
    (said,) = [line for line in heard.lines if line.startswith("not planned: ")]
    assert "lacks intermediate_size" in said
    assert (
        "train: gradient checkpointing is on: this model cannot be planned for, and training needs less memory with it"
        in heard.lines
    )
    assert (out / "adapter" / "adapter_model.safetensors").is_file()


def test_an_unknown_optimizer_is_refused_before_the_model_is_loaded(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_load, "load_base", _interrupted)
    run, out = _run(tmp_path, tiny_model, train={"optim": "paged_adam_8bit"})
    with pytest.raises(RecipeError, match=r"train\.optim=paged_adam_8bit: .* similar names: paged_adamw_8bit"):
        train_stage.run(run, out)


def test_a_model_that_cannot_compute_its_layers_twice_is_said_to(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transformers.LlamaPreTrainedModel, "supports_gradient_checkpointing", False)
    run, out = _run(tmp_path, tiny_model, train={"gradient_checkpointing": True})
    with pytest.raises(RecipeError, match=r"LlamaForCausalLM .* set train.gradient_checkpointing=false"):
        train_stage.run(run, out)


def test_one_card_is_trained_on_where_several_are_visible(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = transformers.TrainingArguments.__post_init__

    def among_two(args: Any) -> None:
        alone(args)
        args._n_gpu = 2

    monkeypatch.setattr(transformers.TrainingArguments, "__post_init__", among_two)
    run, out = _run(tmp_path, tiny_model, train={"max_steps": 2})
    train_stage.run(run, out)
    sums = _json(out / "sums.json")
    assert 0 < sums["in_batches"] == sums["divided_by"]


# --- packing ----------------------------------------------------------------------------------------------------------


def test_packs_are_trained_on_when_their_isolation_holds(tiny_model: Path, tmp_path: Path) -> None:
    heard = Heard()
    run, out = _run(tmp_path, tiny_model, heard, data={"packing": True})
    train_stage.run(run, out)
    found = _json(out / "packing.json")
    assert found["packing"] and found["verdict"] == "holds" and found["attn_implementation"] == "sdpa"
    packs = max(pack for pack, _ in packed(LENGTHS, CAPACITY)) + 1
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 2 * packs
    assert any(line.startswith("packing: ") for line in heard.lines)


def test_packs_that_leak_are_not_trained_on(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def with_cache(model: Any, batch: Any) -> torch.Tensor:
        states: torch.Tensor = model.get_decoder()(
            input_ids=batch["input_ids"], position_ids=batch["position_ids"][:1], use_cache=True
        ).last_hidden_state
        return states

    monkeypatch.setattr(head, "_hidden", with_cache)
    heard = Heard()
    run, out = _run(tmp_path, tiny_model, heard, data={"packing": True})
    train_stage.run(run, out)
    found = _json(out / "packing.json")
    assert not found["packing"] and found["verdict"] == "does not hold" and found["difference"] > 1e-3
    assert any("warning: packing is off for this run" in line for line in heard.lines)
    batches = len(TokenBudgetBatches(LENGTHS, CAPACITY, seed=run.recipe.seed))
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 2 * batches
    assert _json(out / "sums.json")["drawn_labelled_tokens"] == 2 * _labelled()


@pytest.mark.parametrize("packing", [False, True])
def test_most_labelled_is_that_of_one_batch(tiny_model: Path, tmp_path: Path, packing: bool) -> None:
    run, out = _run(tmp_path, tiny_model, data={"packing": packing})
    trainer = sft.build_trainer(run, tiny_model, core_device.detect(), out)
    batches = [int((batch["labels"] != IGNORED).sum()) for batch in trainer.get_train_dataloader()]
    assert memory_report.most_labelled(trainer) == max(batches)


# --- losses of rows ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", [False, True])
def test_losses_of_rows_before_and_after(tiny_model: Path, tmp_path: Path, packing: bool) -> None:
    run, out = _run(tmp_path, tiny_model, data={"packing": packing}, ledger={"losses": True})
    train_stage.run(run, out)
    rows = _losses(out)
    assert [row["row"] for row in rows] == list(range(len(LENGTHS)))
    assert sum(row["loss_after"] < row["loss_before"] for row in rows) == len(rows)
    trainer = sft.build_trainer(run, tiny_model, core_device.detect(), tmp_path)
    with torch.no_grad(), trainer.accelerator.autocast():
        for row, given in zip(rows[:3], _rows(), strict=False):
            alone = head.labelled_loss(trainer.base_model, collate([given], 0), None)
            assert row["loss_before"] == pytest.approx(float(alone), rel=2**-6)  # bf16, and another batch


def test_losses_leave_the_training_as_it_is(tiny_model: Path, tmp_path: Path) -> None:
    adapters = []
    for losses in (False, True):
        run, out = _run(tmp_path / str(losses), tiny_model, ledger={"losses": losses})
        train_stage.run(run, out)
        adapters.append((out / "adapter" / "adapter_model.safetensors").read_bytes())
    assert adapters[0] == adapters[1]


# --- gradient checkpointing where the recipe leaves it open -----------------------------------------------------------


def test_checkpointing_is_decided_said_kept_and_recorded(
    tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Off where there is room; stopped and gone on where there is none, it stays off, and run.json has it."""
    seen: list[bool] = []
    config = sft.sft_config

    def watched(*given: Any) -> Any:
        args = config(*given)
        seen.append(args.gradient_checkpointing)
        return args

    monkeypatch.setattr(sft, "sft_config", watched)
    heard = Heard(stop_at=3)
    run = Run.create(tmp_path / "run", load(tiny_recipe), heard)
    pipeline.execute(run, "data")
    with pytest.raises(KeyboardInterrupt):
        pipeline.execute(run, "train")
    assert any(
        line.startswith("train: gradient checkpointing is off: without it, training needs ") for line in heard.lines
    )
    monkeypatch.setattr(gpus, "usable_bytes", lambda device: 1)
    heard.stop_at, heard.steps = float("inf"), 0
    pipeline.execute(run, "train")
    assert heard.lines[-3:] != [] and "train: gradient checkpointing is off: as when this run started" in heard.lines
    recorded = run.manifest()["stages"]["train"]["decided"]
    assert recorded["train.gradient_checkpointing"] is False and seen == [False, False]
    assert load(run.root / "recipe.yaml").train.gradient_checkpointing == "auto"
    other = Run.create(tmp_path / "other", run.recipe)
    pipeline.execute(other, "data")
    pipeline.execute(other, "train")
    assert other.manifest()["stages"]["train"]["decided"]["train.gradient_checkpointing"] is True and seen[-1]


# --- going on ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", [False, True])
def test_a_run_that_goes_on_ends_in_the_same_sums_losses_and_adapter(
    tiny_model: Path, tmp_path: Path, packing: bool
) -> None:
    settings: dict[str, Any] = {
        "data": {"packing": packing},
        "ledger": {"losses": True},
        "train": {"num_train_epochs": 3, "save_steps": 3, "gradient_accumulation_steps": 2},
    }
    run, straight = _run(tmp_path / "straight", tiny_model, **settings)
    train_stage.run(run, straight)
    steps = len((straight / "metrics.jsonl").read_text().splitlines())
    stopped, out = _run(tmp_path / "cut", tiny_model, Heard(stop_at=steps - 2), **settings)
    with pytest.raises(KeyboardInterrupt):
        train_stage.run(stopped, out)
    checkpoint = checkpoints.newest_whole(out / "checkpoints")
    assert checkpoint is not None and not (out / "sums.json").exists()
    assert [row["loss_after"] for row in _losses(out)] == [None] * len(LENGTHS)
    train_stage.run(Run(stopped.root, stopped.recipe), out)
    assert _json(out / "sums.json") == _json(straight / "sums.json")
    assert _losses(out) == _losses(straight)
    name = "adapter/adapter_model.safetensors"
    assert (out / name).read_bytes() == (straight / name).read_bytes()


def _interrupted(*_: Any) -> None:
    raise KeyboardInterrupt


def test_a_run_that_was_killed_after_its_last_step_makes_no_other(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {"ledger": {"losses": True}, "train": {"max_steps": 5, "save_steps": 3}}
    run, straight = _run(tmp_path / "straight", tiny_model, **settings)
    train_stage.run(run, straight)
    killed, out = _run(tmp_path / "cut", tiny_model, **settings)
    with monkeypatch.context() as patched:
        patched.setattr(train_stage, "_save", _interrupted)
        with pytest.raises(KeyboardInterrupt):
            train_stage.run(killed, out)
    train_stage.run(Run(killed.root, killed.recipe), out)
    steps = [[line["step"] for line in _metrics.lines(folder / "metrics.jsonl")] for folder in (straight, out)]
    assert steps[0] == steps[1] == list(range(1, len(steps[0]) + 1))
    assert _json(out / "sums.json") == _json(straight / "sums.json")
    assert _losses(out) == _losses(straight)
    name = "adapter/adapter_model.safetensors"
    assert (out / name).read_bytes() == (straight / name).read_bytes()
