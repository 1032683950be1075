"""The fast paths against TRL's plain one, in fp32: the same loss and the same gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from qkit.fast.batches import IGNORED, TokenBudgetBatches, collate
from qkit.fast.head import labelled_loss
from qkit.train import trainer_class

ROWS = [{"input_ids": list(range(3, 3 + n)), "start": n // 2} for n in (9, 14, 14, 21, 30)]


def _settings(tmp_path: Path, **more: Any) -> SFTConfig:
    return SFTConfig(
        output_dir=str(tmp_path),
        seed=0,
        use_cpu=True,
        bf16=False,
        report_to=[],
        max_length=None,
        gradient_checkpointing=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        **more,
    )


def _gradients(trainer: Any, batches: list[dict[str, torch.Tensor]]) -> tuple[float, dict[str, torch.Tensor]]:
    """Summed loss and gradients of one optimizer step over `batches`, as the trainer divides them."""
    items = torch.tensor(sum(int((b["labels"][:, 1:] != IGNORED).sum()) for b in batches))
    trainer.model.train()
    total = 0.0
    for batch in batches:
        loss = trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=items)
        loss.backward()
        total += float(loss.detach())
    gradients = {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}
    trainer.model.zero_grad()
    return total, gradients


def _model(folder: Path) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32)


def _lora() -> LoraConfig:
    return LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")


@pytest.fixture
def plain(tiny_model: Path, tmp_path: Path) -> tuple[float, dict[str, torch.Tensor]]:
    """TRL's own path: its collator with masks, its head over every position, one row at a time."""
    labelled = [
        {"input_ids": r["input_ids"], "labels": [IGNORED] * r["start"] + r["input_ids"][r["start"] :]} for r in ROWS
    ]
    trainer = SFTTrainer(
        model=_model(tiny_model),
        args=_settings(tmp_path),
        train_dataset=Dataset.from_list(labelled),
        processing_class=AutoTokenizer.from_pretrained(str(tiny_model)),
        peft_config=_lora(),
    )
    return _gradients(trainer, [trainer.data_collator([row]) for row in labelled])


@pytest.mark.parametrize("labelled_head", [True, False])
@pytest.mark.parametrize("groups", [[[0], [1], [2], [3], [4]], [[0, 1, 2, 3, 4]], [[4, 0], [2, 1, 3]]])
def test_same_loss_and_gradients_as_trl(
    plain: Any, tiny_model: Path, tmp_path: Path, groups: list[list[int]], labelled_head: bool
) -> None:
    trainer = trainer_class()(
        model=_model(tiny_model),
        args=_settings(tmp_path),
        train_dataset=Dataset.from_list(ROWS),
        processing_class=AutoTokenizer.from_pretrained(str(tiny_model)),
        peft_config=_lora(),
        pad=0,
        batch_tokens=64,
        labelled_head=labelled_head,
    )
    loss, gradients = _gradients(trainer, [collate([ROWS[i] for i in group], pad=0) for group in groups])
    assert loss == pytest.approx(plain[0], rel=1e-5)
    assert gradients.keys() == plain[1].keys()
    for name, gradient in gradients.items():
        wanted = plain[1][name]
        assert (gradient - wanted).norm() <= 1e-5 * wanted.norm(), name


def test_accumulated_steps_are_one_large_step(tiny_model: Path, tmp_path: Path) -> None:
    """Through `train()` itself: the loss must not be divided, nor multiplied, by the number of accumulated batches."""
    logged = []
    for batch_tokens, accumulation in ((10_000, 1), (32, 4)):
        trainer = trainer_class()(
            model=_model(tiny_model),
            args=_settings(tmp_path, max_steps=1, gradient_accumulation_steps=accumulation, logging_steps=1),
            train_dataset=Dataset.from_list(ROWS),
            processing_class=AutoTokenizer.from_pretrained(str(tiny_model)),
            peft_config=_lora(),
            pad=0,
            batch_tokens=batch_tokens,
            labelled_head=True,
        )
        assert len(trainer.get_train_dataloader()) == accumulation
        trainer.train()
        logged.append(trainer.state.log_history[0])
    assert float(logged[1]["loss"]) == pytest.approx(float(logged[0]["loss"]), rel=1e-5)
    assert float(logged[1]["grad_norm"]) == pytest.approx(float(logged[0]["grad_norm"]), rel=1e-5)


def test_padding_on_the_right_is_not_seen(tiny_model: Path) -> None:
    model = _model(tiny_model)
    short, long = ROWS[0], ROWS[4]
    alone = labelled_loss(model, *_pair(collate([short], 0)), items=1)
    with torch.no_grad():
        padded = collate([short, long], 0)
        padded["labels"][1] = IGNORED
        assert labelled_loss(model, *_pair(padded), items=1) == pytest.approx(float(alone.detach()), rel=1e-5)


def _pair(batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    return batch["input_ids"], batch["labels"]


def test_labels_are_the_completion_only() -> None:
    batch = collate(ROWS[:2], pad=0)
    assert batch["labels"][0].tolist() == [IGNORED] * 4 + ROWS[0]["input_ids"][4:] + [IGNORED] * 7  # padded to 16
    assert batch["lengths"].tolist() == [9, 14]


def test_batches_keep_the_budget_and_hold_every_row_once() -> None:
    lengths = [(i * 37) % 90 + 1 for i in range(200)]
    batches = TokenBudgetBatches(lengths, budget=256, seed=3)
    seen = list(batches)
    assert sorted(i for batch in seen for i in batch) == list(range(200))
    assert all(len(batch) == 1 or max(lengths[i] for i in batch) * len(batch) <= 256 for batch in seen)
    padding = sum(max(lengths[i] for i in b) * len(b) for b in seen) / sum(lengths)
    assert padding < 1.15


def test_batches_depend_on_seed_and_epoch_alone() -> None:
    lengths = [(i * 37) % 90 + 1 for i in range(200)]
    first, again, other = (TokenBudgetBatches(lengths, 256, seed) for seed in (3, 3, 4))
    assert list(first) == list(again) != list(other)
    again.set_epoch(1)
    assert list(first) != list(again)
    assert len(first) == len(again)
