"""Training on tagged words: a step of plain transformers, a CRF by its definition, batches of one row or several, counts, and going on."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from helpers.first_step import first_step
from helpers.tiny_labelled import build_model
from helpers.tiny_tagged import TAGS, sentences, tagged_run
from helpers.training import Heard
from qkit import pipeline
from qkit.core.device import detect
from qkit.core.errors import RecipeError, StageFailed
from qkit.recipe.load import from_dict
from qkit.recipe.schema import Loss
from qkit.run.directory import Run
from qkit.tasks._encoder.tagging.transitions import gathered, losses
from qkit.train import losses as train_losses
from qkit.train.trainers import labelled

QUIET = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
WITH_HOLES = [(("ban-ben", "\u00a0", "plum", "for"), ("O", "O", "B-tree", "I-tree")), *sentences(95)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model(tmp_path_factory.mktemp("bert"), "bert", **QUIET)


def prepared(root: Path, model: Path, progress: Any = None, **sections: Any) -> Run:
    sections = {"method": "full", **sections}
    run = tagged_run(root, model, progress, WITH_HOLES[::-1], **sections)  # the one with holes is trained on
    pipeline.execute(run, "data")
    return run


def first_batch(trainer: Any) -> Mapping[str, torch.Tensor]:
    rows = [{**trainer.train_dataset[n], "row": n} for n in next(iter(trainer.batches()))]
    batch = trainer.collate(rows)
    return {name: batch[name] for name in ("input_ids", "attention_mask", "token_type_ids", "labels")}


def same_model(trainer: Any) -> Any:
    same = transformers.AutoModelForTokenClassification.from_config(trainer.model.config)
    same.load_state_dict({k: v for k, v in trainer.model.state_dict().items() if not k.startswith("crf.")})
    return same.train()


def compare(trainer: Any, same: Any, loss: torch.Tensor) -> None:
    loss.backward()
    ours = first_step(trainer)
    assert ours.loss == pytest.approx(loss.item(), abs=1e-5)
    gradients = {name: p.grad for name, p in same.named_parameters() if p.grad is not None}
    assert max(float(gradient.abs().max()) for gradient in gradients.values()) > 1e-2
    for name, gradient in gradients.items():
        assert torch.allclose(ours.gradients[name], gradient, rtol=0, atol=1e-5), name


@pytest.mark.slow
def test_a_step_is_that_of_plain_transformers(model: Path, tmp_path: Path) -> None:
    """Whose own loss is the mean over the tokens that have a label."""
    trainer: Any = labelled.build_trainer(prepared(tmp_path, model, train={"max_steps": 1}), model, detect(), tmp_path)
    same = same_model(trainer)
    compare(trainer, same, same(**first_batch(trainer)).loss)


@pytest.mark.slow
def test_a_step_of_a_crf_is_that_of_its_definition(model: Path, tmp_path: Path) -> None:
    """With transitions of 0 the likelihood is that of each word alone; their gradient is what is counted less what is expected."""
    run = prepared(tmp_path, model, loss={"name": "crf"}, train={"max_steps": 1})
    trainer: Any = labelled.build_trainer(run, model, detect(), tmp_path)
    assert float(trainer.model.crf.pairs.detach().abs().max()) == 0
    batch, same = first_batch(trainer), same_model(trainer)
    outputs = same(**batch)
    compare(trainer, same, outputs.loss)
    step = first_step(labelled.build_trainer(run, model, detect(), tmp_path))
    words = int((batch["labels"] != -100).sum())
    wanted = torch.zeros(len(TAGS), len(TAGS))
    for logits, labels in zip(outputs.logits.detach(), batch["labels"], strict=True):
        tags, probabilities = labels[labels != -100], logits[labels != -100].softmax(-1)
        for place in range(len(tags) - 1):
            wanted -= torch.outer(probabilities[place], probabilities[place + 1]) * -1
            wanted[tags[place], tags[place + 1]] -= 1
    assert torch.allclose(step.gradients["crf.pairs"], wanted / words, rtol=0, atol=1e-5)


def test_the_loss_of_a_crf_is_that_of_all_sequences() -> None:
    from types import SimpleNamespace

    from qkit.tasks._encoder.tagging.crf import chain_crf
    from qkit.tasks._encoder.tagging.transitions import SentenceLoss

    torch.manual_seed(0)
    crf: Any = chain_crf(3)
    for parameter in crf.parameters():
        torch.nn.init.normal_(parameter)
    logits = torch.randn(2, 6, 3)
    labels = torch.tensor([[-100, 2, -100, 0, 1, -100], [-100, -100, 1, -100, -100, -100]])

    def score(row: int, places: list[int], tags: tuple[int, ...]) -> torch.Tensor:
        of_words = sum(logits[row, place, tag] for place, tag in zip(places, tags, strict=True))
        of_pairs = sum(crf.pairs[one, other] for one, other in itertools.pairwise(tags))
        return of_words + of_pairs + crf.start[tags[0]] + crf.end[tags[-1]]

    found = losses(logits, labels, SentenceLoss(SimpleNamespace(crf=crf)))
    for row, places in enumerate(([1, 3, 4], [2])):
        every = torch.stack([score(row, places, tags) for tags in itertools.product(range(3), repeat=len(places))])
        own = score(row, places, tuple(labels[row, places].tolist()))
        assert found[row].item() == pytest.approx((every.logsumexp(0) - own).item(), abs=1e-5)


def test_tagged_positions_are_gathered() -> None:
    labels = torch.tensor([[-100, 4, -100, 5, -100], [6, 7, -100, -100, 8]])
    logits = torch.arange(10).reshape(2, 5, 1).float()
    emissions, tags, lengths = gathered(logits, labels)
    assert lengths.tolist() == [2, 3] and emissions.shape == (2, 3, 1)
    assert emissions[0, :2, 0].tolist() == [1, 3] and emissions[1, :, 0].tolist() == [5, 6, 9]
    assert tags[0, :2].tolist() == [4, 5] and tags[1].tolist() == [6, 7, 8]


def test_losses_of_words_are_summed_by_row() -> None:
    labels = torch.tensor([[-100, 1, -100], [0, 2, 1]])
    found = losses(torch.zeros(2, 3, 3), labels, lambda logits, labels: labels.float() + 10)
    assert found.tolist() == [11.0, 33.0]


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["cross_entropy", "crf", "focal"])
def test_accumulation_changes_nothing(model: Path, tmp_path: Path, loss: str) -> None:
    """Batches of all rows at once, in micro-batches, and of single rows accumulated: the same gradient, of sentences of all lengths."""
    steps = []
    for number, (rows, accumulated, micro) in enumerate(((8, 1, 1), (8, 1, 4), (1, 8, 1))):
        sections = {
            "loss": {"name": loss},
            "micro_batches": micro,
            "data": {"batch_rows": rows, "batch_tokens": 2048},
            "train": {"max_steps": 1, "gradient_accumulation_steps": accumulated},
        }
        root = tmp_path / str(number)
        run = tagged_run(root, model, given=WITH_HOLES[:32], method="full", **sections)
        pipeline.execute(run, "data")
        steps.append(first_step(labelled.build_trainer(run, model, detect(), root)))
    assert [sum(size * count for size, count in step.sizes.items()) for step in steps] == [8, 8, 8]
    for other in steps[1:]:
        assert other.loss == pytest.approx(steps[0].loss, abs=1e-5)
        for name, gradient in steps[0].gradients.items():
            assert torch.allclose(other.gradients[name], gradient, rtol=0, atol=1e-5), name


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["cross_entropy", "crf"])
def test_words_are_counted_everywhere_alike(model: Path, tmp_path: Path, loss: str, monkeypatch: Any) -> None:
    train = {"max_steps": -1, "num_train_epochs": 2, "gradient_accumulation_steps": 4}
    run = prepared(tmp_path / "a", model, loss={"name": loss}, train=train)
    pipeline.execute(run, "train")
    sums = json.loads((run.folder("train") / "sums.json").read_text(encoding="utf-8"))
    words = sum(len(words) for words, _ in WITH_HOLES[::-1][24:]) - 1
    assert sums["ledger_labelled_tokens"] == words
    assert {sums[name] for name in ("drawn_labelled_tokens", "in_batches", "divided_by")} == {2 * words}
    collate = labelled.CountedLabels.collate

    def spoilt(self: Any, rows: Any) -> Any:
        batch = collate(self, rows)
        batch["labels"] = batch["labels"].masked_fill(batch["labels"] == 0, 1)
        return batch

    monkeypatch.setattr(labelled.CountedLabels, "collate", spoilt)
    other = prepared(tmp_path / "b", model, train=train)
    with pytest.raises(StageFailed, match="label ids disagree"):
        pipeline.execute(other, "train")


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "full", "head"])
def test_a_crf_goes_on_to_the_same_bytes(model: Path, tmp_path: Path, method: str) -> None:
    """Stopped after step 7, and resumed from the checkpoint of step 6."""
    sections = {"method": method, "loss": {"name": "crf"}, "train": {"max_steps": 12, "save_steps": 3}}
    straight, cut = (prepared(tmp_path / name, model, **sections) for name in ("straight", "cut"))
    pipeline.execute(straight, "train")
    with pytest.raises(KeyboardInterrupt):
        pipeline.execute(Run.create(cut.root, cut.recipe, Heard(stop_at=7)), "train")
    heard = Heard()
    pipeline.execute(Run.create(cut.root, cut.recipe, heard), "train")
    assert "train: resuming from checkpoint-6" in heard.lines
    weights = "adapter/adapter_model.safetensors" if method == "lora" else "model/model.safetensors"
    assert (cut.folder("train") / weights).read_bytes() == (straight.folder("train") / weights).read_bytes()
    from safetensors.torch import load_file

    stored = load_file(straight.folder("train") / weights)
    assert [float(value.abs().max()) > 0 for name, value in stored.items() if ".pairs" in name] == [True]


def test_class_weights_of_tags_that_training_lacks(tmp_path: Path) -> None:
    counts = {"O": 6, "B-x": 2, "I-x": 0}
    (tmp_path / "labels.json").write_text(json.dumps({"names": [*counts], "rows": {"train": counts}}), encoding="utf-8")
    weights = train_losses.class_weights(Loss(class_weights="balanced"), tmp_path)
    assert weights is not None and torch.isfinite(weights).all()
    assert (weights * torch.tensor([6.0, 2.0, 0.0])).sum().item() == pytest.approx(8)
    assert weights[1].item() == pytest.approx(3 * weights[0].item())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"loss": {"name": "crf", "label_smoothing": 0.1}}, "loss.label_smoothing=0.1 applies to"),
        ({"loss": {"name": "crf", "class_weights": "balanced"}}, "loss.class_weights=balanced applies to"),
        ({"loss": {"name": "bce"}}, "the losses of task=tag are cross_entropy, focal, crf"),
        (
            {"method": "peft", "peft": {"peft_type": "PROMPT_TUNING"}},
            "peft.peft_type=PROMPT_TUNING puts tokens before a text",
        ),
        ({"head": {"pooling": "mean"}}, "task=tag needs one for each token"),
        ({"loss": {"name": "crf"}, "task": "classify"}, "the losses of task=classify are cross_entropy, focal"),
    ],
)
def test_losses_that_do_not_fit(change: dict[str, Any], said: str) -> None:
    raw = {"task": "tag", "model": {"source": "owner/x"}, "data": {"train": [{"source": "a.conll"}]}, **change}
    with pytest.raises(RecipeError, match=said):
        from_dict(raw, (), "the test")
