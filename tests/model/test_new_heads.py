"""New heads on a base model: which modules are new, what a checkpoint must have, and the padding that a head on a decoder depends on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

from helpers.tiny_labelled import build_model, build_tokenizer, labelled_run, text
from qkit import pipeline
from qkit.core.device import detect
from qkit.core.errors import ModelError
from qkit.core.memory_meter import PeakMeter
from qkit.model import load
from qkit.model import tokenizer as model_tokenizer
from qkit.model.adapters import new_heads
from qkit.plugins.runtime import TextRow
from qkit.plugins.task import open_task
from qkit.recipe.load import from_dict
from qkit.recipe.schema import Model, Recipe
from qkit.runtimes._encoder import TorchEncoder

NAMES = ("fruit", "tree", "wood")
KINDS = {
    "bert": ("AutoModel", ["classifier"]),
    "bert without pooler": ("AutoModelForMaskedLM", ["classifier", "bert.pooler"]),
    "distilbert": ("AutoModel", ["pre_classifier", "classifier"]),
    "roberta": ("AutoModelForMaskedLM", ["classifier"]),
    "electra": ("AutoModel", ["classifier"]),
    "modernbert": ("AutoModel", ["head", "classifier"]),
    "llama": ("AutoModelForCausalLM", ["score"]),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    built: dict[str, Path] = {}

    def of(name: str) -> Path:
        if name not in built:
            folder = tmp_path_factory.mktemp("models") / name.replace(" ", "-")
            built[name] = build_model(folder, name.partition(" ")[0], KINDS[name][0])
        return built[name]

    return of


def recipe_of(folder: Path, **sections: Any) -> Recipe:
    raw = {"task": "classify", "model": {"source": str(folder)}, "data": {"train": [{"source": "rows.jsonl"}]}}
    return from_dict({**raw, **sections}, (), "the test")


def loaded(folder: Path, **sections: Any) -> Any:
    return load.load_base(folder, recipe_of(folder, **sections), detect(), NAMES)


@pytest.mark.parametrize("name", KINDS)
def test_new_modules(model: Callable[..., Path], name: str) -> None:
    """And they are all that transformers misses in the checkpoint, unless it has them from another head."""
    folder, new = model(name), KINDS[name][1]
    own, report = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3, output_loading_info=True)
    assert new_heads.of(own, folder) == new_heads.names_of(folder, open_task("classify").HEAD) == new
    assert report["missing_keys"] and all(
        key.startswith(tuple(f"{part}." for part in new)) for key in report["missing_keys"]
    )
    assert new_heads.names_of(folder, open_task("chat").HEAD) == []


def test_a_pooler_is_new_only_where_the_checkpoint_has_none(model: Callable[..., Path]) -> None:
    with_pooler = load_file(model("bert") / "model.safetensors")["pooler.dense.weight"]
    assert torch.equal(loaded(model("bert")).bert.pooler.dense.weight, with_pooler)
    first, same, other = (loaded(model("bert without pooler"), seed=seed).state_dict() for seed in (1, 1, 2))
    for key in ("bert.pooler.dense.weight", "classifier.weight"):
        assert torch.equal(first[key], same[key]) and not torch.equal(first[key], other[key])


def changed(folder: Path, out: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    out.mkdir()
    for file in folder.iterdir():
        (out / file.name).write_bytes(file.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    return out


@pytest.mark.parametrize("lost", ["weight", "bias"])
def test_a_checkpoint_that_lacks_weights_of_the_body(model: Callable[..., Path], tmp_path: Path, lost: str) -> None:
    key = f"encoder.layer.1.output.dense.{lost}"
    folder = changed(model("bert"), tmp_path / "broken", lambda tensors: tensors.pop(key))
    with pytest.raises(ModelError, match=f"lack bert.{key} and 0 more, which would be initialized at random"):
        loaded(folder)


def test_half_a_pooler_is_no_new_one(model: Callable[..., Path], tmp_path: Path) -> None:
    folder = changed(model("bert"), tmp_path / "broken", lambda tensors: tensors.pop("pooler.dense.bias"))
    with pytest.raises(ModelError, match=r"lack bert\.pooler\.dense\.bias"):
        loaded(folder)


def test_a_head_for_other_labels(tmp_path: Path) -> None:
    folder = build_model(tmp_path / "five", "bert", "AutoModelForSequenceClassification", num_labels=5)
    with pytest.raises(
        ModelError, match=r"do not have the shapes that config\.json and 3 labels need; .* trained from"
    ):
        loaded(folder)


def test_labels_are_in_the_config(model: Callable[..., Path]) -> None:
    config = loaded(model("bert")).config
    assert (config.num_labels, config.id2label) == (3, dict(enumerate(NAMES)))
    assert config.label2id == {name: number for number, name in enumerate(NAMES)}


@pytest.mark.parametrize(("bf16", "method"), [(False, "lora"), (True, "lora"), (True, "head"), (True, "full")])
def test_the_dtype_of_a_16_bit_checkpoint(tmp_path: Path, bf16: bool, method: str) -> None:
    folder = build_model(tmp_path / "half", "bert", dtype="bfloat16")
    dtypes = {p.dtype for p in loaded(folder, method=method, train={"bf16": bf16}).parameters()}
    assert dtypes == {torch.bfloat16 if (bf16, method) == (True, "lora") else torch.float32}


# --- a head on a decoder ----------------------------------------------------------------------------------------------


def decoder(folder: Path, **special: str | None) -> Path:
    """With as many rows in its embedding as the tokenizer has words."""
    build_model(folder, "llama", "AutoModelForCausalLM", vocab_size=47)
    build_tokenizer(pairs=False, **special).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("special", "pad"),
    [
        ({}, 0),
        ({"pad_token": "</s>"}, 3),  # the end of texts is no padding: the unknown token is
        ({"pad_token": None, "unk_token": None}, 1),
        ({"pad_token": "[PAD]"}, 3),  # a token without a row in the embedding
    ],
)
def test_padding_is_not_the_end_of_a_text(tmp_path: Path, special: dict[str, str | None], pad: int) -> None:
    folder = decoder(tmp_path / "llama", **special)
    assert model_tokenizer.padding_of(Model(source=str(folder))) == pad


def test_no_token_to_pad_with(tmp_path: Path) -> None:
    folder = decoder(tmp_path / "llama", pad_token=None, unk_token=None, bos_token=None)
    run = labelled_run(tmp_path, folder)
    with pytest.raises(ModelError) as raised:
        pipeline.execute(run, "data")
    assert "has no token to pad with that does not end texts" in str(raised.value)
    assert "model.add_tokens=[<pad>] and model.pad_token=<pad>" in str(raised.value)


def test_batches_of_texts_give_the_logits_of_single_ones(tmp_path: Path) -> None:
    """The head reads the last token that is no padding, which </s> at the end of each text must not be taken for."""
    folder = decoder(tmp_path / "llama")
    base = loaded(folder, seed=3).eval()
    assert base.config.pad_token_id == 0 and base.config.eos_token_id == 2
    tokenizer = build_tokenizer(pairs=False)
    rows = [TextRow(tokenizer(text(i))["input_ids"], [], (0,)) for i in range(12)]
    assert len({len(row.input_ids) for row in rows}) > 4
    together = list(TorchEncoder(base, PeakMeter(detect())).logits(rows))
    alone = [base(input_ids=torch.tensor([row.input_ids])).logits[0].detach().numpy() for row in rows]
    assert np.ptp(np.stack(alone), axis=0).min() > 0.1
    np.testing.assert_allclose(np.stack(together), np.stack(alone), atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("remedied", [False, True], ids=["padding of the tokenizer", "an added token"])
def test_the_padding_of_training_is_in_every_config(tmp_path: Path, method: str, remedied: bool) -> None:
    special: dict[str, str | None] = {"pad_token": None, "unk_token": None, "bos_token": None} if remedied else {}
    folder = decoder(tmp_path / "llama", **special)
    remedy = {"add_tokens": ["[PAD]"], "pad_token": "[PAD]"} if remedied else {}
    run = labelled_run(tmp_path, folder, method=method, model=remedy)
    for stage in ("data", "train", "evaluate", "merge", "export", "verify"):
        pipeline.execute(run, stage)
    pad = json.loads((run.folder("data") / "tokens.json").read_text())["pad"]
    config = json.loads((run.folder("merge") / "config.json").read_text())
    assert (config["pad_token_id"], config["eos_token_id"]) == (pad, 2) and pad == (47 if remedied else 0)
    parity = json.loads((run.folder("verify") / "parity.json").read_text())["parity"]["merged"]
    assert parity["status"] == "passed", parity["failed"]
    assert {check["status"] for check in parity["contract"]} == {"ok"}
