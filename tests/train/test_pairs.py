"""Training on pairs against TRL's own DPOTrainer, in fp32: the same losses and gradients, whatever the loss, layout and accumulation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoTokenizer, TrainingArguments
from trl import DPOConfig, DPOTrainer

from helpers.first_pairs import adapted, arguments, copy_adapter, model_of, same, step
from helpers.training import Heard
from qkit.core.batching import IGNORED
from qkit.recipe.preference import Preference
from qkit.tasks._preference.collate import collate_pairs
from qkit.train._preference import layout, reference
from qkit.train._preference.losses import LOSSES
from qkit.train._preference.trainer import trainer_class
from qkit.train.fast.pairs import labelled_tokens

pytestmark = pytest.mark.slow

PAIRS = [
    {"prompt": "name a colour", "chosen": "blue", "rejected": "a stone, perhaps"},
    {"prompt": "count", "chosen": "one two three four", "rejected": "no"},
    {"prompt": "what is the time", "chosen": "noon", "rejected": "late"},
    {"prompt": "go", "chosen": "I went to the shop", "rejected": "I stayed at home"},
]
OPTIONS: dict[str, dict[str, Any]] = {
    **{name: {"loss_type": name} for name in LOSSES},
    "exo_pair": {"loss_type": "exo_pair", "label_smoothing": 1e-3},
    "robust": {"loss_type": "robust", "label_smoothing": 0.1},
    "aot": {"loss_type": "aot", "label_smoothing": 0.1},
    "beta": {"loss_type": "sigmoid", "beta": 0.7},
    "mpo": {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
    "ld_alpha": {"loss_type": "sigmoid", "ld_alpha": 0.3},
    "wpo": {"loss_type": "sigmoid", "use_weighting": True},
    "forward_kl": {"loss_type": "sigmoid", "f_divergence_type": "forward_kl"},
    "js": {"loss_type": "hinge", "f_divergence_type": "js_divergence"},
    "alpha": {"loss_type": "ipo", "f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.3},
    "temperature": {"loss_type": "discopop", "discopop_tau": 0.2},
}
# The exponential of a log-ratio has the rounding of sums near 100 nats, 8e-6, as a relative error.
EXPONENTIALS, ROUNDED = ("discopop", "forward_kl", "temperature", "alpha"), 3e-5


def _trl(model: Path, folder: Path, options: dict[str, Any], batch: int = 4, accumulation: int = 1) -> Any:
    options = {**options, "loss_type": [options["loss_type"]]} if isinstance(options["loss_type"], str) else options
    steps = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
    lora = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = DPOTrainer(
        model=model_of(model),
        args=DPOConfig(**arguments(folder, **steps), **options),
        train_dataset=Dataset.from_list(PAIRS),
        processing_class=AutoTokenizer.from_pretrained(str(model)),
        peft_config=lora,
    )
    copy_adapter(adapted(model), trainer.model)
    return trainer


def _rows(trl: Any) -> Dataset:
    """The pairs as TRL has tokenized them, in qkit's columns."""
    rows = []
    for row in trl.train_dataset:
        prompt, chosen, rejected = (row[f"{name}_ids"] for name in ("prompt", "chosen", "rejected"))
        rows.append(
            {
                "input_ids": prompt + chosen + rejected,
                "labels": [IGNORED] * len(prompt) + chosen + rejected,
                "start": len(prompt),
                "rejected_start": len(prompt) + len(chosen),
            }
        )
    return Dataset.from_list(rows)


def _ours(
    model: Path, folder: Path, rows: Dataset, section: Preference, shared: bool = True, batch: int = 4, **more: Any
) -> Any:
    accumulation = {"gradient_accumulation_steps": 4 // batch}
    trainer = trainer_class()(
        model=adapted(model, **more.pop("load", {})),
        args=TrainingArguments(
            remove_unused_columns=False, **arguments(folder, **accumulation, **more.pop("args", {}))
        ),
        train_dataset=rows,
        section=section,
        shared=shared,
        pad=0,
        batch_tokens=100_000,
        batch_rows=batch,
        collator=lambda given, pad, packed=False: collate_pairs(given, pad),
        **more,
    )
    trainer.train_dataset = reference.with_reference(rows, folder / "reference.parquet", trainer, Heard())
    return trainer


@pytest.mark.parametrize("name", OPTIONS)
def test_loss_and_gradients_are_those_of_trl(tiny_model: Path, tmp_path: Path, name: str) -> None:
    options = OPTIONS[name]
    trl = _trl(tiny_model, tmp_path, options)
    ours = _ours(tiny_model, tmp_path, _rows(trl), Preference(**options))
    same(step(ours), step(trl), ROUNDED if name in EXPONENTIALS else 1e-5)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("name", ["sigmoid", "mpo", "sft", "wpo"])
def test_accumulation_changes_nothing(tiny_model: Path, tmp_path: Path, name: str, batch: int) -> None:
    """One step of four pairs, as one batch or as several; also where lengths differ, and a loss is a mean over tokens."""
    section = Preference(**OPTIONS[name])
    rows = _rows(_trl(tiny_model, tmp_path, OPTIONS[name]))
    whole = step(_ours(tiny_model, tmp_path, rows, section))
    same(step(_ours(tiny_model, tmp_path, rows, section, batch=batch)), whole)
    same(step(_ours(tiny_model, tmp_path, rows, section, micro_batches=4 // batch)), whole)


def test_trl_divides_a_step_by_its_batches(tiny_model: Path, tmp_path: Path) -> None:
    """With a loss of single pairs and batches of one size that is the same; a mean over tokens is another number."""
    same(*(step(_trl(tiny_model, tmp_path, OPTIONS["sigmoid"], batch, 4 // batch)) for batch in (4, 1)))
    whole, parts = (step(_trl(tiny_model, tmp_path, OPTIONS["sft"], batch, 4 // batch)) for batch in (4, 1))
    assert parts[0] != pytest.approx(whole[0], rel=1e-3)


@pytest.mark.parametrize("kind", ["sdpa", "eager"])
def test_a_prompt_that_is_computed_once_changes_nothing(tiny_model: Path, tmp_path: Path, kind: str) -> None:
    section, rows = Preference(), _rows(_trl(tiny_model, tmp_path, OPTIONS["sigmoid"]))
    load = {"attn_implementation": kind}
    once, twice = (step(_ours(tiny_model, tmp_path, rows, section, way, load=load)) for way in (True, False))
    same(once, twice)
    assert once[0] != pytest.approx(0.6931, abs=1e-3) and max(float(g.abs().max()) for g in once[1].values()) > 1e-3


def test_checkpointing_changes_nothing(tiny_model: Path, tmp_path: Path) -> None:
    section, rows = Preference(), _rows(_trl(tiny_model, tmp_path, OPTIONS["sigmoid"]))
    plain = step(_ours(tiny_model, tmp_path, rows, section))
    same(step(_ours(tiny_model, tmp_path, rows, section, args={"gradient_checkpointing": True})), plain)


def test_the_base_with_its_adapter_off_is_a_separate_reference_model(tiny_model: Path, tmp_path: Path) -> None:
    """By TRL's own function, of a second model that has never had an adapter."""
    trl = _trl(tiny_model, tmp_path, OPTIONS["sigmoid"])
    trainer = _ours(tiny_model, tmp_path, _rows(trl), Preference())
    other = model_of(tiny_model)
    for row, reference_row in zip(trainer.train_dataset, trl.train_dataset, strict=True):
        for side in ("chosen", "rejected"):
            prompt, answer = reference_row["prompt_ids"], reference_row[f"{side}_ids"]
            with torch.no_grad():
                logits = other(input_ids=torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
            expected = sum(float(logits[len(prompt) + i - 1, token]) for i, token in enumerate(answer))
            assert row[f"reference_{side}"] == pytest.approx(expected, rel=1e-5)


def test_the_reference_is_computed_once(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = _rows(_trl(tiny_model, tmp_path, OPTIONS["sigmoid"]))
    first = _ours(tiny_model, tmp_path, rows, Preference())
    known = first.train_dataset["reference_chosen"][:]
    table = reference._read(tmp_path / "reference.parquet", len(rows))
    reference._write(tmp_path / "reference.parquet", {row: table[row] for row in (0, 2)})  # killed half way
    asked: list[int] = []
    of_batch = reference._sums
    monkeypatch.setattr(reference, "_sums", lambda trainer, some: asked.append(len(some)) or of_batch(trainer, some))
    again = _ours(tiny_model, tmp_path, rows, Preference())
    assert asked == [2] and again.train_dataset["reference_chosen"][:] == pytest.approx(known, rel=1e-5)


def _with_prompts(tokens: int) -> Dataset:
    """Two pairs of random tokens with prompts of this length, and answers of 40 tokens."""
    ids = [[3 + (7 * place + number) % 250 for place in range(tokens + 80)] for number in range(2)]
    rows = [{"input_ids": one, "labels": [IGNORED] * tokens + one[tokens:]} for one in ids]
    return Dataset.from_list([{**row, "start": tokens, "rejected_start": tokens + 40} for row in rows])


def test_a_model_with_a_window_computes_its_prompts_twice(tiny_model: Path, tmp_path: Path) -> None:
    trainer = _ours(tiny_model, tmp_path, _with_prompts(60), Preference())
    assert layout.shares_prompts(trainer, tmp_path)[0]
    assert layout.shares_prompts(trainer, tmp_path)[1] == "as when this run started"
    (tmp_path / layout.RECORD).unlink()
    trainer.base_model.config.sliding_window = 8
    assert not layout.shares_prompts(trainer, tmp_path)[0]


def test_short_prompts_are_computed_twice(tiny_model: Path, tmp_path: Path) -> None:
    trainer = _ours(tiny_model, tmp_path, _with_prompts(2), Preference())
    shared, why = layout.shares_prompts(trainer, tmp_path)
    assert not shared and "prompts as short as these" in why
    trainer.train_dataset = _with_prompts(400)
    assert 1 < layout.speedup(trainer) < 2


def test_a_layout_in_which_an_answer_sees_the_other_one_is_refused(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qkit.train.fast import pairs

    trainer = _ours(tiny_model, tmp_path, _with_prompts(60), Preference())
    monkeypatch.setattr(pairs, "mask", lambda batch, dtype: None)
    shared, why = layout.shares_prompts(trainer, tmp_path)
    assert not shared and "would differ" in why


def test_the_head_gives_the_gradients_of_a_plain_one(tiny_model: Path) -> None:
    """Also where the head itself is trained."""
    batch = layout.probe(model := model_of(tiny_model))
    weights = list(model.model.parameters())
    found = []
    for trained in (True, False):
        model.get_output_embeddings().requires_grad_(trained)
        values = labelled_tokens(model, batch, shared=True).log_probabilities
        scale = torch.linspace(-1, 2, len(values))
        found.append(torch.autograd.grad((values * scale).sum(), weights))
    for plain, own in zip(*found, strict=True):
        torch.testing.assert_close(own, plain, rtol=1e-5, atol=1e-5 * float(plain.abs().max()))
