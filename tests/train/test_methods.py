"""What of a model is trained by each method: parameters counted by hand, and frozen weights that stay as they were, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from helpers.tiny_labelled import build_model, labelled_rows, labelled_run
from qkit import pipeline
from qkit.core.device import detect
from qkit.core.errors import RecipeError
from qkit.model import load, source
from qkit.run.directory import Run
from qkit.train.trainers import labelled

HIDDEN, MLP, LABELS, RANK = 32, 64, 3, 4
CLASSIFIER = HIDDEN * LABELS + LABELS
SQUARE = HIDDEN * HIDDEN + HIDDEN
LORA_OF_A_LAYER = RANK * (4 * 2 * HIDDEN + 2 * (HIDDEN + MLP))  # query, key, value and output; up and down
LLAMA_LORA_OF_A_LAYER = RANK * (2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 64))  # one key-value head of two

# kind, class of the checkpoint -> new modules, their parameters, and those of LoRA
BASES: dict[str, tuple[str, str, list[str], int, int]] = {
    "bert": ("bert", "AutoModel", ["classifier"], CLASSIFIER, 2 * LORA_OF_A_LAYER + RANK * 2 * HIDDEN),
    "bert without pooler": (
        "bert",
        "AutoModelForMaskedLM",
        ["classifier", "bert.pooler"],
        CLASSIFIER + SQUARE,
        2 * LORA_OF_A_LAYER,
    ),
    "distilbert": (
        "distilbert",
        "AutoModel",
        ["pre_classifier", "classifier"],
        CLASSIFIER + SQUARE,
        2 * LORA_OF_A_LAYER,
    ),
    "roberta": ("roberta", "AutoModel", ["classifier"], CLASSIFIER + SQUARE, 2 * LORA_OF_A_LAYER),
    "llama": ("llama", "AutoModelForCausalLM", ["score"], 64 * LABELS, 2 * LLAMA_LORA_OF_A_LAYER),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {name: build_model(root / name, kind, head) for name, (kind, head, *_) in BASES.items()}


def trained(root: Path, model: Path, **sections: Any) -> Run:
    run = labelled_run(root, model, **sections)
    for stage in ("data", "train"):
        pipeline.execute(run, stage)
    return run


def trainable(model: Any) -> dict[str, int]:
    return {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "full", "head"])
@pytest.mark.parametrize("name", BASES)
def test_what_is_trained(models: dict[str, Path], tmp_path: Path, name: str, method: str) -> None:
    _, _, new, of_head, of_lora = BASES[name]
    run = labelled_run(tmp_path, models[name], method=method)
    pipeline.execute(run, "data")
    model = labelled.build_trainer(run, models[name], detect(), tmp_path).model
    counts = trainable(model)
    if method == "full":
        assert counts == {name: p.numel() for name, p in model.named_parameters()}
    elif method == "head":
        assert sum(counts.values()) == of_head
        assert all(any(parameter.startswith(f"{part}.") for part in new) for parameter in counts)
    else:
        heads = {parameter: count for parameter, count in counts.items() if "lora_" not in parameter}
        assert sum(heads.values()) == of_head and sum(counts.values()) == of_head + of_lora
        assert all(".modules_to_save." in parameter for parameter in heads)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", ["bert", "bert without pooler", "llama"])
def test_what_is_frozen_stays_bit_for_bit(tmp_path: Path, name: str, dtype: str) -> None:
    """And all of the head moves. A checkpoint in 16 bit is trained in fp32, and keeps its values."""
    kind, head, new, *_ = BASES[name]
    model = build_model(tmp_path / "model", kind, head, dtype=dtype)
    run = trained(tmp_path, model, method="head")
    before = load_file(model / "model.safetensors")
    after = load_file(run.folder("train") / "model" / "model.safetensors")
    prefix = "bert." if kind == "bert" else ""
    frozen = {key: value for key, value in after.items() if not key.startswith(tuple(f"{part}." for part in new))}
    stored = {key if key.startswith(prefix) else f"{prefix}{key}": value for key, value in before.items()}
    assert len(frozen) > 15
    for key, value in frozen.items():
        assert torch.equal(value, stored[key].float()), key
    first = load.load_base(model, run.recipe, detect(), ("a", "b", "c")).state_dict()
    for key in after.keys() - frozen.keys():
        assert value_moved(after[key], first[key]), key


def value_moved(after: torch.Tensor, before: torch.Tensor) -> bool:
    return bool((after != before).all())


@pytest.mark.slow
def test_full_moves_every_weight_that_has_a_gradient(models: dict[str, Path], tmp_path: Path) -> None:
    run = trained(tmp_path, models["bert"], method="full", train={"weight_decay": 0.0})
    before = load_file(models["bert"] / "model.safetensors")
    after = load_file(run.folder("train") / "model" / "model.safetensors")
    still = [
        key for key in before if key != "embeddings.position_ids" and torch.equal(before[key], after[f"bert.{key}"])
    ]
    assert not still


@pytest.mark.slow
def test_an_adapter_holds_the_new_head_and_the_base_is_the_one_on_disk(models: dict[str, Path], tmp_path: Path) -> None:
    run = trained(tmp_path, models["bert without pooler"])
    saved = load_file(run.trained() / "adapter_model.safetensors")
    heads = {key for key in saved if "lora_" not in key}
    prefix = "base_model.model."
    parts = ("classifier.weight", "classifier.bias", "bert.pooler.dense.weight", "bert.pooler.dense.bias")
    assert heads == {f"{prefix}{part}" for part in parts}
    reference = load.load_reference(models["bert without pooler"], run.recipe, detect(), run.trained())
    state = reference.state_dict()
    for key, value in load_file(models["bert without pooler"] / "model.safetensors").items():
        names = [
            f"{prefix}{key}",
            f"{prefix}{key}".replace(".weight", ".base_layer.weight").replace(".bias", ".base_layer.bias"),
        ]
        if key.startswith("bert."):
            assert any(torch.equal(state[name], value) for name in names if name in state), key


# --- 4 bit ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bert", "bert without pooler", "distilbert", "llama"])
def test_a_4_bit_base_under_a_head_in_full_precision(models: dict[str, Path], tmp_path: Path, name: str) -> None:
    pytest.importorskip("bitsandbytes")
    from bitsandbytes.nn import Linear4bit

    new = BASES[name][2]
    run = labelled_run(tmp_path, models[name], quantization={"load_in_4bit": True}, train={"max_steps": 6})
    for stage in ("data", "train", "evaluate", "merge", "export", "verify"):
        pipeline.execute(run, stage)
    base = load.load_base(models[name], run.recipe, detect(), ("a", "b", "c"))
    quantized = {key for key, module in base.named_modules() if isinstance(module, Linear4bit)}
    assert len(quantized) >= 12 and not [key for key in quantized if key.startswith(tuple(new))]
    note = json.loads((run.trained() / "qkit.json").read_text())
    assert {*note["quantized"]} == {f"{key}.weight" for key in quantized}
    assert "quantization_config" not in json.loads((run.folder("merge") / "config.json").read_text())
    parity = json.loads((run.folder("verify") / "parity.json").read_text())["parity"]["merged"]
    assert parity["status"] == "passed", parity["failed"]


@pytest.mark.parametrize("method", ["full", "head"])
def test_whole_models_are_not_saved_in_4_bit(models: dict[str, Path], tmp_path: Path, method: str) -> None:
    with pytest.raises(RecipeError, match=f"method={method} .* set quantization.load_in_4bit=false, or method=lora"):
        labelled_run(tmp_path, models["bert"], method=method, quantization={"load_in_4bit": True})


# --- added tokens -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_the_embedding_of_an_added_token_is_trained_with_an_adapter(tmp_path: Path, kind: str) -> None:
    """And no other row of it."""
    head = "AutoModelForMaskedLM" if kind == "bert" else "AutoModelForCausalLM"
    model = build_model(tmp_path / "model", kind, head, vocab_size=47)
    rows = [{**row, "text": f"[E1] {row['text']}"} for row in labelled_rows(96)]
    run = labelled_run(tmp_path, model, rows=rows, model={"add_tokens": ["[E1]"]})
    for stage in ("data", "train", "evaluate", "merge", "export", "verify"):
        pipeline.execute(run, stage)
    prepared = source.resolve(run.recipe.model)
    before, after = (load_file(folder / "model.safetensors") for folder in (prepared, run.folder("merge")))
    (name,) = [key for key in after if "word_embeddings" in key or "embed_tokens" in key]
    moved = (before[name] != after[name]).any(1)
    assert moved.tolist() == [False] * 47 + [True]
    parity = json.loads((run.folder("verify") / "parity.json").read_text())["parity"]["merged"]
    assert parity["status"] == "passed", parity["failed"]
