"""The ONNX formats of a run with labels, by method: gated, complete, and opened by ONNX Runtime alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers.tiny_labelled import LABELS, build_model, labelled_run, text
from qkit import pipeline
from qkit.core.errors import NotDeployable, RecipeError
from qkit.measure.gates import check
from qkit.plan import deployable
from qkit.recipe.load import from_dict
from qkit.run.directory import Run
from qkit.run.stages import stages_of

FORMATS = ["onnx-fp32", "onnx-int8"]
RATES = {"full": 3e-3, "lora": 1e-2, "houlsby": 1e-2, "pfeiffer": 1e-2, "parallel": 1e-2}


@pytest.fixture(scope="module", params=RATES)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run through all stages but bench and report."""
    root = tmp_path_factory.mktemp(request.param)
    model = build_model(root / "model", "bert", initializer_range=0.1)
    train = {"max_steps": 40, "learning_rate": RATES[request.param], "save_steps": 40}
    made = labelled_run(root, model, method=request.param, train=train, export={"formats": FORMATS})
    for stage in stages_of(made.recipe):
        if stage.name not in ("bench", "report"):
            pipeline.execute(made, stage.name)
    return made


def _parity(run: Run) -> dict[str, Any]:
    parity: dict[str, Any] = json.loads((run.folder("verify") / "parity.json").read_text())["parity"]
    return parity


@pytest.mark.slow
def test_both_formats_pass_their_gates(run: Run) -> None:
    check(run)
    parity = _parity(run)
    assert parity["onnx-fp32"]["kl_mean"] < 1e-6 and parity["onnx-fp32"]["top1"] == 1.0
    assert parity["onnx-fp32"]["kl_mean"] < parity["onnx-int8"]["kl_mean"] < 0.1
    assert {entry["status"] for name, entry in parity.items() if name in FORMATS} == {"passed"}
    assert all(check["status"] == "ok" for name in FORMATS for check in parity[name]["contract"])


@pytest.mark.slow
def test_bottleneck_adapters_are_not_merged_and_the_others_are(run: Run) -> None:
    merges = run.recipe.method in ("full", "lora")
    assert ("merged" in _parity(run)) is merges and run.folder("merge").is_dir() is merges
    if not merges:
        with pytest.raises(RecipeError, match="no weight can take up a bottleneck adapter"):
            pipeline.execute(run, "merge")


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMATS)
def test_onnx_runtime_alone_gives_the_labels_that_were_measured(run: Run, name: str) -> None:
    import onnxruntime
    from transformers import AutoTokenizer

    folder = run.folder("export") / name
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"))
    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    batch = tokenizer([text(number) for number in range(24)], padding=True, return_tensors="np")
    logits = session.run(["logits"], {node.name: batch[node.name].astype(np.int64) for node in session.get_inputs()})[0]
    names = json.loads((folder / "labels.json").read_text())["names"]
    lines = map(json.loads, (run.folder("evaluate") / "predictions.jsonl").read_text().splitlines())
    said = [line["prediction"] for line in lines if line["artifact"] == run.recipe.trained_as]
    agree = [names[best] == label for best, label in zip(logits.argmax(-1), said, strict=True)]
    assert all(agree) if name == "onnx-fp32" else sum(agree) >= 22
    assert len(set(said)) > 1 and {*said} <= {*LABELS}


@pytest.mark.slow
def test_the_card_shows_how_to_use_the_folder(run: Run) -> None:
    card = (run.folder("export") / "onnx-int8" / "README.md").read_text(encoding="utf-8")
    assert "onnxruntime.InferenceSession" in card and "conversation" not in card and "chat" not in card


@pytest.mark.parametrize("name", ["onnx-int4", "vllm", "gguf-q8_0", "bnb-nf4", "safetensors"])
def test_formats_of_text_generation_are_refused(tmp_path: Path, name: str) -> None:
    recipe = from_dict(
        {
            "task": "classify",
            "model": {"source": str(build_model(tmp_path / "model", "bert"))},
            "data": {"train": [{"source": "rows.csv"}]},
            "export": {"formats": [name]},
        },
        (),
        "the test",
    )
    with pytest.raises(
        NotDeployable, match="models for task=classify have no such format; they have onnx-fp32, onnx-int8"
    ):
        deployable.check(recipe)
