"""The fast paths against TRL's plain one, in fp32: the same loss and the same gradients."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaModel
from trl import SFTConfig, SFTTrainer

from helpers.first_pairs import step
from qkit.core.batching import IGNORED, TokenBudgetBatches, packed, part_sizes
from qkit.plugins.task import open_task
from qkit.tasks._conversation.collate import collate
from qkit.train.fast import head
from qkit.train.fast.head import labelled_loss, row_losses
from qkit.train.fast.token_loss import PLAIN, TokenLoss
from qkit.train.trainer import trainer_class

pytestmark = pytest.mark.slow

LENGTHS = (9, 14, 14, 21, 30, 17, 2, 25)


def _rows(labelled: Any) -> list[dict[str, Any]]:
    """Rows of distinct tokens; `labelled` (place, length) says which of them carry loss, the first never does."""
    rows = []
    for number, length in enumerate(LENGTHS):
        ids = [3 + (7 * number + place) % 250 for place in range(length)]
        rows.append(
            {"input_ids": ids, "labels": [i if p and labelled(p, length) else IGNORED for p, i in enumerate(ids)]}
        )
    return rows


LABELS = {
    "completion": _rows(lambda place, length: place >= length // 2),
    "all": _rows(lambda place, length: True),
    "spans": _rows(lambda place, length: place % 7 in (1, 2, 5)),
}
ROWS = LABELS["completion"]


def _settings(tmp_path: Path, **more: Any) -> SFTConfig:
    return SFTConfig(
        output_dir=str(tmp_path),
        seed=0,
        use_cpu=True,
        bf16=False,
        report_to=[],
        max_length=None,
        max_steps=1,
        max_grad_norm=0,  # gradients as they are
        logging_steps=1,
        dataset_kwargs={"skip_prepare_dataset": True},
        **{"gradient_checkpointing": False} | more,
    )


def _model(folder: Path) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32)


def _common(tiny_model: Path) -> dict[str, Any]:
    lora = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    return {
        "model": _model(tiny_model),
        "processing_class": AutoTokenizer.from_pretrained(str(tiny_model)),
        "peft_config": lora,
    }


# How eight rows can come to one step: (token budget, capacity of a pack or none, batches that are accumulated).
WAYS = {
    "1 x 8": (1, None, 8),
    "8 x 1": (10_000, None, 1),
    "some": (64, None, 3),
    "packs": (1, 48, 3),
    "pack": (1, 200, 1),
}


def _trainer(
    tiny_model: Path,
    tmp_path: Path,
    rows: list[dict[str, Any]],
    way: str,
    labelled_head: bool,
    micro_batches: int = 1,
    token_loss: TokenLoss = PLAIN,
    **more: Any,
) -> Any:
    budget, capacity, accumulation = WAYS[way]
    places = packed(LENGTHS, capacity) if capacity else [(0, 0)] * len(rows)
    trainer = trainer_class()(
        args=_settings(tmp_path, gradient_accumulation_steps=accumulation, **more),
        train_dataset=Dataset.from_list(
            [{**row, "pack": pack, "position": position} for row, (pack, position) in zip(rows, places, strict=True)]
        ),
        pad=0,
        batch_tokens=budget,
        collator=open_task("chat").collate,
        labelled_head=labelled_head,
        token_loss=token_loss,
        packing=capacity is not None,
        micro_batches=micro_batches,
        **_common(tiny_model),
    )
    assert len(trainer.get_train_dataloader()) == accumulation
    return trainer


def _assert_same(found: Any, wanted: Any) -> None:
    assert found[0] == pytest.approx(wanted[0], rel=1e-5)
    assert found[1].keys() == wanted[1].keys()
    for name, gradient in found[1].items():
        assert (gradient - wanted[1][name]).norm() <= 1e-5 * wanted[1][name].norm(), name


@pytest.fixture(scope="module")
def plain(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """TRL's own path for each kind of labels: its collator with masks, its head over every position, one row at a time."""
    found = {}
    for kind, rows in LABELS.items():
        settings = _settings(
            tmp_path_factory.mktemp("plain"), per_device_train_batch_size=1, gradient_accumulation_steps=len(rows)
        )
        found[kind] = step(SFTTrainer(args=settings, train_dataset=Dataset.from_list(rows), **_common(tiny_model)))
    return found


@pytest.mark.parametrize("labelled_head", [True, False], ids=["qkit's head", "TRL's head"])
@pytest.mark.parametrize("kind", LABELS)
@pytest.mark.parametrize("way", WAYS)
def test_same_loss_and_gradients_as_trl(
    plain: Any, tiny_model: Path, tmp_path: Path, way: str, kind: str, labelled_head: bool
) -> None:
    trainer = _trainer(tiny_model, tmp_path, LABELS[kind], way, labelled_head)
    _assert_same(step(trainer), plain[kind])
    labels = sum(label != IGNORED for row in LABELS[kind] for label in row["labels"])
    assert trainer.sums.drawn == trainer.sums.in_batches == trainer.sums.divided_by == labels


@pytest.mark.parametrize("labelled_head", [True, False], ids=["qkit's head", "TRL's head"])
@pytest.mark.parametrize(("way", "parts"), [("8 x 1", 3), ("8 x 1", 20), ("some", 2)])
def test_a_batch_in_parts_is_one_batch(
    plain: Any, tiny_model: Path, tmp_path: Path, way: str, parts: int, labelled_head: bool
) -> None:
    trainer = _trainer(tiny_model, tmp_path, ROWS, way, labelled_head, micro_batches=parts)
    sizes: list[int] = []
    trainer.model.get_decoder().register_forward_pre_hook(
        lambda _, args, given: sizes.append(len(given["input_ids"])), with_kwargs=True
    )
    _assert_same(step(trainer), plain["completion"])
    assert sum(sizes) == len(ROWS) == trainer.state.global_step * len(ROWS)
    assert len(sizes) == {3: 3, 20: 8, 2: 6}[parts]
    assert trainer.sums.drawn == trainer.sums.in_batches == trainer.sums.divided_by


@pytest.mark.parametrize("labelled_head", [True, False], ids=["qkit's head", "TRL's head"])
@pytest.mark.parametrize("way", ["8 x 1", "packs"])
def test_checkpointing_changes_nothing(
    plain: Any, tiny_model: Path, tmp_path: Path, way: str, labelled_head: bool
) -> None:
    trainer = _trainer(tiny_model, tmp_path, ROWS, way, labelled_head, gradient_checkpointing=True)
    _assert_same(step(trainer), plain["completion"])


@pytest.mark.parametrize("labelled_head", [True, False], ids=["qkit's head", "TRL's head"])
def test_the_check_of_isolation_goes_the_trainers_own_way(
    plain: Any, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, labelled_head: bool
) -> None:
    """It fires when that way leaks, and leaves the step after it as it would have been."""
    trainer = _trainer(tiny_model, tmp_path, ROWS, "packs", labelled_head)
    assert trainer.isolation().holds
    _assert_same(step(trainer), plain["completion"])
    right = LlamaModel.forward

    def seeing(self: Any, **given: Any) -> Any:
        return right(self, **{**given, "attention_mask": torch.ones_like(given["input_ids"])})

    monkeypatch.setattr(LlamaModel, "forward", seeing)
    assert trainer.isolation().verdict == "does not hold"


# --- other losses -----------------------------------------------------------------------------------------------------

LOSSES = {
    "smoothed": (TokenLoss(smoothing=0.2), {"label_smoothing_factor": 0.2}),
    "dft": (TokenLoss("dft"), {"loss_type": "dft"}),
}


@pytest.fixture(scope="module")
def other(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """TRL's own path with each of these losses, one row at a time."""
    found = {}
    for name, (_, given) in LOSSES.items():
        folder = tmp_path_factory.mktemp(name)
        settings = _settings(folder, per_device_train_batch_size=1, gradient_accumulation_steps=len(ROWS), **given)
        with warnings.catch_warnings():  # TRL will give up smoothing
            warnings.simplefilter("ignore", FutureWarning)
            found[name] = step(SFTTrainer(args=settings, train_dataset=Dataset.from_list(ROWS), **_common(tiny_model)))
    return found


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", LOSSES)
def test_other_losses_are_those_of_trl(
    plain: Any, other: Any, tiny_model: Path, tmp_path: Path, name: str, way: str
) -> None:
    trainer = _trainer(tiny_model, tmp_path, ROWS, way, True, token_loss=LOSSES[name][0])
    _assert_same(step(trainer), other[name])
    assert trainer.sums.drawn == trainer.sums.in_batches == trainer.sums.divided_by
    assert abs(other[name][0] - plain["completion"][0]) > 1e-3 * plain["completion"][0]


@pytest.mark.parametrize("way", ["1 x 8", "8 x 1", "packs"])
def test_dft_on_trls_head_is_the_same(other: Any, tiny_model: Path, tmp_path: Path, way: str) -> None:
    _assert_same(step(_trainer(tiny_model, tmp_path, ROWS, way, False, loss_type="dft")), other["dft"])


@pytest.mark.parametrize("name", LOSSES)
def test_losses_of_rows_and_isolation_are_of_the_plain_loss(tiny_model: Path, tmp_path: Path, name: str) -> None:
    trainer = _trainer(tiny_model, tmp_path, ROWS, "packs", True, token_loss=LOSSES[name][0])
    batch = collate(ROWS, 0)
    with torch.no_grad():
        assert torch.equal(trainer.row_losses(batch), row_losses(trainer.base_model, batch))
    verdict, usual = trainer.isolation(), _trainer(tiny_model, tmp_path, ROWS, "packs", True).isolation()
    assert verdict.holds and verdict == usual
    assert trainer._token_loss == LOSSES[name][0]


# --- noise on embeddings ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("labelled_head", [True, False], ids=["qkit's head", "TRL's head"])
@pytest.mark.parametrize("way", ["some", "packs"])
def test_noise_is_that_of_neftune_and_in_training_only(
    tiny_model: Path, tmp_path: Path, way: str, labelled_head: bool
) -> None:
    """The same step as the cross-entropy of a plain model on the embeddings that were seen."""
    trainer = _trainer(tiny_model, tmp_path, ROWS, way, labelled_head, neftune_noise_alpha=5.0)
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    batches: list[dict[str, torch.Tensor]] = []
    embedding, own = trainer.model.get_input_embeddings(), trainer.compute_loss

    def kept(model: Any, inputs: Any, *given: Any, **named: Any) -> Any:
        batches.append({name: tensor.clone() for name, tensor in inputs.items()})
        if len(batches) == 1:  # after NEFTune's own hook
            embedding.register_forward_hook(lambda _, given, output: seen.append((given[0], output.detach())))
        return own(model, inputs, *given, **named)

    trainer.compute_loss = kept
    start = copy.deepcopy(trainer.base_model)
    vars(start).pop("forward", None)  # TRL's, which is bound to the model that is trained
    found = step(trainer)
    assert len(seen) == len(batches) == WAYS[way][2]
    items = sum(int((batch["labels"][:, 1:] != IGNORED).sum()) for batch in batches)
    total = 0.0
    for (ids, noisy), batch in zip(seen, batches, strict=True):
        noise = noisy - embedding.weight.detach()[ids]
        limit = 5.0 / (noisy.shape[1] * noisy.shape[2]) ** 0.5
        assert 0.95 * limit < float(noise.abs().max()) <= limit * 1.0001 and abs(float(noise.mean())) < limit / 20
        logits = start(inputs_embeds=noisy, position_ids=batch["position_ids"][:1], use_cache=False).logits
        loss = cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum") / items
        loss.backward()
        total += float(loss.detach())
    gradients = {name: p.grad for name, p in start.named_parameters() if p.grad is not None}
    found_too = {name.removeprefix("base_model.model."): gradient for name, gradient in found[1].items()}
    _assert_same((found[0], found_too), (total, {name: gradients[name] for name in found_too}))


def test_noise_is_gone_after_training(tiny_model: Path, tmp_path: Path) -> None:
    trainer = _trainer(tiny_model, tmp_path, ROWS, "some", True, neftune_noise_alpha=5.0)
    batch, embedding = collate(ROWS, 0), trainer.model.get_input_embeddings()
    trainer.train()
    clean = embedding.weight[batch["input_ids"]]
    assert torch.equal(trainer.model.train().get_input_embeddings()(batch["input_ids"]), clean)
    assert not embedding._forward_hooks and not hasattr(embedding, "neftune_noise_alpha")


def test_padding_on_the_right_is_not_seen(tiny_model: Path) -> None:
    model = _model(tiny_model)
    short, long = ROWS[0], ROWS[4]
    alone = labelled_loss(model, collate([short], 0), items=1)
    with torch.no_grad():
        padded = collate([short, long], 0)
        padded["labels"][1] = IGNORED
        assert labelled_loss(model, padded, items=1) == pytest.approx(float(alone.detach()), rel=1e-5)


FAMILIES = {
    "gemma2": {"final_logit_softcapping": 0.5},
    "cohere": {"logit_scale": 0.25},
    "granite": {"logits_scaling": 4.0},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_family_does_to_its_logits_is_done(family: str) -> None:
    """Figures far from the families' own, so that leaving them out would show."""
    small = {"vocab_size": 280, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
    heads = {
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    config = AutoConfig.for_model(family, **small, **heads, initializer_range=0.2, **FAMILIES[family])
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    batch = collate(ROWS[4:5], 0)
    with torch.no_grad():
        own = model(input_ids=batch["input_ids"], labels=batch["labels"]).loss
        assert float(labelled_loss(model, batch, None)) == pytest.approx(float(own), rel=1e-5)


def test_losses_of_rows(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They add up to the loss of the batch, whatever part of it the head sees at once."""
    model, batch = _model(tiny_model), collate(LABELS["spans"], 0)
    with torch.no_grad():
        sums = row_losses(model, batch)
        assert float(sums.sum()) == pytest.approx(float(labelled_loss(model, batch, items=1)), rel=1e-5)
        for row, found in zip(LABELS["spans"], sums, strict=True):
            assert float(found) == pytest.approx(float(labelled_loss(model, collate([row], 0), items=1)), rel=1e-5)
        monkeypatch.setattr(head, "POSITIONS_AT_ONCE", 32)
        assert torch.allclose(row_losses(model, batch), sums, rtol=1e-6)


def test_labels_of_a_batch_are_those_of_its_rows() -> None:
    batch = collate(ROWS[:2], pad=0)
    assert batch["labels"][0].tolist() == ROWS[0]["labels"] + [IGNORED] * 7  # padded to 16
    assert batch["input_ids"][1].tolist() == ROWS[1]["input_ids"] + [0] * 2
    assert batch["lengths"].tolist() == [9, 14]


def test_batches_keep_the_budget_and_hold_every_row_once() -> None:
    lengths = [(i * 37) % 90 + 1 for i in range(200)]
    batches = TokenBudgetBatches(lengths, budget=256, seed=3)
    seen = list(batches)
    assert sorted(i for batch in seen for i in batch) == list(range(200))
    assert all(len(batch) == 1 or max(lengths[i] for i in batch) * len(batch) <= 256 for batch in seen)
    padding = sum(max(lengths[i] for i in b) * len(b) for b in seen) / sum(lengths)
    assert padding < 1.15


@pytest.mark.parametrize(
    ("rows", "parts", "sizes"), [(8, 3, [3, 3, 2]), (8, 1, [8]), (2, 5, [1, 1]), (1, 1, [1]), (9, 3, [3, 3, 3])]
)
def test_parts_of_a_batch(rows: int, parts: int, sizes: list[int]) -> None:
    assert part_sizes(rows, parts) == sizes


def test_batches_depend_on_seed_and_epoch_alone() -> None:
    lengths = [(i * 37) % 90 + 1 for i in range(200)]
    first, again, other = (TokenBudgetBatches(lengths, 256, seed) for seed in (3, 3, 4))
    assert list(first) == list(again) != list(other)
    again.set_epoch(1)
    assert list(first) != list(again)
    assert len(first) == len(again)
