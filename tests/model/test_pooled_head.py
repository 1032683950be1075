"""Heads that pool: their numbers by hand, through all stages, and opened by plain transformers without qkit."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from helpers.tiny_labelled import build_model, labelled_run, settings, text, write_rows
from qkit import pipeline
from qkit.core.device import detect
from qkit.core.errors import ModelError, RecipeError
from qkit.model import load
from qkit.model.pooled_head import PooledHead, pooled
from qkit.recipe.load import from_dict
from qkit.run.directory import Run

STATES = torch.tensor([[[1.0, -2.0], [3.0, -4.0], [9.0, 9.0]], [[1.0, 1.0], [2.0, 2.0], [6.0, 0.0]]])
MASK = torch.tensor([[1, 1, 0], [1, 1, 1]])


@pytest.mark.parametrize(
    ("pooling", "wanted"),
    [
        ("cls", [[1.0, -2.0], [1.0, 1.0]]),
        ("last", [[3.0, -4.0], [6.0, 0.0]]),
        ("mean", [[2.0, -3.0], [3.0, 1.0]]),
        ("max", [[3.0, -2.0], [6.0, 2.0]]),
    ],
)
def test_padding_is_not_pooled(pooling: str, wanted: Any) -> None:
    assert pooled(STATES, MASK, pooling).tolist() == wanted


def test_layers_of_a_head() -> None:
    head = PooledHead(4, 3, 2, "tanh", 0.0)
    state = torch.randn(5, 4)
    first, second = (
        torch.nn.functional.linear(x, layer.weight, layer.bias) for x, layer in [(state, head.layers[0])] * 2
    )
    assert torch.equal(first, second)
    hidden = torch.tanh(head.layers[1](torch.tanh(first)))
    assert torch.allclose(head(state), head.out(hidden))
    assert sum(p.numel() for p in head.parameters()) == 2 * (4 * 4 + 4) + 4 * 3 + 3


# --- through all stages -----------------------------------------------------------------------------------------------


def finished(root: Path, kind: str, **sections: Any) -> Run:
    sizes = {} if kind == "distilbert" else {"initializer_range": 0.1}
    model = build_model(root / "model", kind, **sizes)
    train = {"max_steps": 60, "learning_rate": 3e-3, "save_steps": 60}
    run = labelled_run(root, model, train=train, export={"formats": ["onnx-fp32"]}, **sections)
    for stage in ("data", "train", "evaluate", "merge", "export", "verify"):
        if stage != "merge" or run.recipe.method != "houlsby":
            pipeline.execute(run, stage)
    return run


PLAIN = """
import json, sys
import torch, transformers
assert "qkit" not in sys.modules
folder, texts = sys.argv[1], json.loads(sys.argv[2])
label = transformers.pipeline("text-classification", model=folder, trust_remote_code=True, device="cpu")
print(json.dumps(label(texts)))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "method", "pooling", "in_4bit"),
    [
        ("bert", "full", "mean", False),
        ("llama", "lora", "last", False),
        ("distilbert", "houlsby", "cls", False),
        ("modernbert", "head", "max", False),
        ("bert", "lora", "mean", True),
    ],
)
def test_a_run_with_a_head_that_pools(tmp_path: Path, kind: str, method: str, pooling: str, in_4bit: bool) -> None:
    head = {"pooling": pooling, "layers": 1, "activation": "tanh", "dropout": 0.1}
    run = finished(tmp_path, kind, method=method, head=head, quantization={"load_in_4bit": in_4bit})
    parity = json.loads((run.folder("verify") / "parity.json").read_text(encoding="utf-8"))["parity"]
    assert parity["onnx-fp32"]["status"] == "passed", parity
    lines = (run.folder("evaluate") / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    trained = [line for line in map(json.loads, lines) if line["artifact"] == run.recipe.trained_as]
    assert len({line["confidence"] for line in trained}) > 5
    if method == "houlsby":
        return
    config = json.loads((run.folder("merge") / "config.json").read_text(encoding="utf-8"))
    assert config["pooled_head"] == head
    command = [sys.executable, "-c", PLAIN, str(run.folder("merge")), json.dumps([text(i) for i in range(24)])]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for answer, line in zip(json.loads(done.stdout.splitlines()[-1]), trained, strict=True):
        assert answer["label"] == line["prediction"] and answer["score"] == pytest.approx(line["confidence"], abs=1e-4)


@pytest.mark.slow
def test_the_body_keeps_its_weights_and_the_head_depends_on_the_seed(tmp_path: Path) -> None:
    folder = build_model(tmp_path / "model", "bert")
    heads = []
    for seed in (1, 1, 2):
        raw = settings(folder, write_rows(tmp_path / "rows.jsonl", []), head={"pooling": "mean"}, seed=seed)
        model: Any = load.load_base(folder, from_dict(raw, (), "the test"), detect(), ["a", "b", "c"])
        stored = load_file(folder / "model.safetensors")
        own = model.body.state_dict()
        assert {name for name in stored if name not in own} == {"pooler.dense.weight", "pooler.dense.bias"}
        assert all(torch.equal(own[name], stored[name]) for name in own if name in stored)
        heads.append(model.head.out.weight.clone())
        assert model.config.id2label == {0: "a", 1: "b", 2: "c"}
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])


# --- dropout and refusals ---------------------------------------------------------------------------------------------


TASKS = {
    "classify": {"bert": "dropout", "distilbert": "dropout", "roberta": "classifier.dropout"},
    "tag": {"bert": "dropout", "distilbert": "dropout", "modernbert": "drop", "llama": "dropout"},
}


def loaded(tmp_path: Path, kind: str, task: str, head: dict[str, Any]) -> Any:
    folder = build_model(tmp_path / "model", kind)
    raw = {**settings(folder, write_rows(tmp_path / "rows.jsonl", []), head=head), "task": task}
    return load.load_base(folder, from_dict(raw, (), "the test"), detect(), ["a", "b"])


@pytest.mark.slow
@pytest.mark.parametrize(("task", "kind"), [(task, kind) for task, kinds in TASKS.items() for kind in kinds])
def test_dropout_of_the_head_of_the_architecture(tmp_path: Path, task: str, kind: str) -> None:
    model = loaded(tmp_path, kind, task, {"dropout": 0.37})
    dropped = {name: module.p for name, module in model.named_modules() if isinstance(module, torch.nn.Dropout)}
    assert [name for name, rate in dropped.items() if rate == 0.37] == [TASKS[task][kind]]


@pytest.mark.slow
@pytest.mark.parametrize(("task", "kind"), [("classify", "llama"), ("answer", "bert")])
def test_a_head_without_dropout(tmp_path: Path, task: str, kind: str) -> None:
    with pytest.raises(ModelError, match=r"head.dropout=0.37: the head of a \w+ has no dropout; remove it"):
        loaded(tmp_path, kind, task, {"dropout": 0.37})


@pytest.mark.slow
def test_a_base_with_a_head_that_pools_otherwise(tmp_path: Path) -> None:
    run = finished(tmp_path / "first", "bert", method="full", head={"pooling": "mean"})
    rows = write_rows(tmp_path / "rows.jsonl", [])
    other = from_dict(settings(run.folder("merge"), rows, head={"pooling": "cls"}), (), "the test")
    with pytest.raises(ModelError, match=r"has a head of its own with .*pooling mean; .* head says pooling cls"):
        load.load_base(run.folder("merge"), other, detect(), ["fruit", "tree", "wood"])
    same = from_dict(settings(run.folder("merge"), rows, head={"pooling": "mean", "dropout": 0.2}), (), "the test")
    model: Any = load.load_base(run.folder("merge"), same, detect(), ["fruit", "tree", "wood"])
    assert model.pooling == "mean" and model.head.dropout.p == 0.2


@pytest.mark.parametrize(
    ("head", "said"),
    [
        ({"layers": 2}, "head.layers=2 belongs to qkit's own head"),
        ({"activation": "relu"}, "set head.pooling, or remove it"),
    ],
)
def test_settings_of_a_head_that_is_not_there(tmp_path: Path, head: Any, said: str) -> None:
    raw = settings(tmp_path, write_rows(tmp_path / "rows.jsonl", []), head=head)
    with pytest.raises(RecipeError, match=said):
        from_dict(raw, (), "the test")
