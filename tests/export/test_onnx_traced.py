"""ONNX of architectures that onnxruntime-genai's builder does not know: traced graphs, against transformers with the same weights."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from helpers.exporting import ROWS, job_of, recipe_of
from helpers.tiny import build_tokenizer, chat_rows, tiny_settings
from qkit import pipeline
from qkit.core.device import detect
from qkit.core.errors import MissingArtifact, NotDeployable
from qkit.core.files import read_json
from qkit.export._onnx import trace
from qkit.export.formats import onnx as exporter
from qkit.plan import deployable
from qkit.plugins.runtime import Runtime, TokenRow, open_runtime
from qkit.recipe.load import load
from qkit.report import model_card
from qkit.run.directory import Run
from qkit.runtimes._onnx_traced import TracedRuntime
from qkit.serve import request as serve_request
from qkit.serve import serving

pytestmark = pytest.mark.slow

pytest.importorskip("onnxruntime_genai")

PROMPTS = [[5, 6, 7], [i * 37 % 250 + 5 for i in range(30)], [9, 200, 31, 77, 12, 8, 90], [3]]
BATCH = [
    *ROWS,
    TokenRow([5, 6, 7, 8, 9], 2),
    TokenRow([1, 99], 1),
    TokenRow([200, 100, 50, 25, 12, 6], 3),
    TokenRow([5, 6], 2),
]
NEVER: frozenset[int] = frozenset()
SMALL = {"vocab_size": 259, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "initializer_range": 0.2}
WIDE = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 2},  # Conv1D, learnt positions
    "bloom": {"hidden_size": 64, "n_layer": 2, "n_head": 2},  # no position_ids: the mask says how far tokens are apart
    "cohere2": {  # a layer with a window, which short texts leave; logits are scaled
        **WIDE, "num_key_value_heads": 1, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]
    },
    # The embedding of the token that pads is zero, and the norm's epsilon, 1e-8, is all that stands between it and no number.
    "helium": {**WIDE, "num_key_value_heads": 1, "head_dim": 32},
}  # fmt: skip


def build(folder: Path, family: str, **config: Any) -> Path:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    made = AutoConfig.for_model(family, tie_word_embeddings=False, **{**SMALL, **config})
    AutoModelForCausalLM.from_config(made).to(torch.bfloat16).save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=list(FAMILIES))
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("traced") / request.param, request.param, **FAMILIES[request.param])


@pytest.fixture(scope="module")
def exported(model: Path) -> Path:
    message = model.parent / "message"
    job = replace(job_of(model, model.parent), notify=lambda line: message.write_text(line) and None)
    exporter.export(job, model.parent / "onnx-fp32", "fp32")
    return model.parent / "onnx-fp32"


@pytest.fixture(scope="module")
def opened(exported: Path) -> Iterator[Runtime]:
    with open_runtime("onnxruntime", exported, detect()) as opened:
        yield opened


@pytest.fixture(scope="module")
def reference(model: Path) -> Iterator[Runtime]:
    with open_runtime("transformers", model, detect(), dtype="float32") as opened:
        yield opened


def furthest(reference: Runtime, other: Runtime) -> float:
    """The largest difference of a log-probability; no number where there is one that is none."""
    pairs = zip(reference.score(BATCH), other.score(BATCH), strict=True)
    return float(np.max([np.abs(a.full - b.full).max(initial=0) for a, b in pairs]))


def test_the_folder_is_whole(exported: Path, model: Path) -> None:
    names = {file.name for file in exported.iterdir()}
    assert {file.name for file in model.iterdir() if file.suffix != ".safetensors"} <= names
    assert {"model.onnx", "model.onnx.data", "qkit.json"} <= names and "genai_config.json" not in names
    assert not list(exported.parent.glob(".*"))
    assert "onnxruntime-genai's builder does not support" in (exported.parent / "message").read_text()
    assert "Translate the graph into ONNX" in (exported.parent / "export.log").read_text()


def test_scores_are_those_of_the_merged_model(opened: Runtime, reference: Runtime) -> None:
    """Rows of many lengths, in one batch and in several."""
    assert isinstance(opened, TracedRuntime)
    assert furthest(reference, opened) < 1e-4
    for wanted, found in zip(reference.score(BATCH), opened.score(BATCH), strict=True):
        np.testing.assert_array_equal(wanted.top1, found.top1)
        np.testing.assert_allclose(wanted.targets, found.targets, atol=1e-4)


def test_scores_see_a_cache_that_is_wrong(opened: Any, reference: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    run = type(opened)._run

    def forgetful(self: Any, *given: Any) -> Any:
        logits, cache = run(self, *given)
        return logits, {name: array * 0 for name, array in cache.items()}

    monkeypatch.setattr(type(opened), "_run", forgetful)
    assert furthest(reference, opened) > 1e-3


def test_greedy_answers_are_those_of_transformers(opened: Runtime, reference: Runtime) -> None:
    answers = opened.generate(PROMPTS, 12, NEVER)
    assert answers == reference.generate(PROMPTS, 12, NEVER) == opened.generate(PROMPTS, 12, NEVER, batch_size=1)
    stop = frozenset({answers[0][0], answers[1][5]})
    ended = [text[: next((i + 1 for i, t in enumerate(text) if t in stop), 12)] for text in answers]
    assert opened.generate(PROMPTS, 12, stop) == ended
    assert list(opened.steps([], 5, NEVER)) == []


def test_it_is_not_served(exported: Path, model: Path) -> None:
    with pytest.raises(NotDeployable, match="opens only graphs of its own builder"):
        serving.of_model(str(exported), recipe_of(model), serve_request.ServeOptions("onnxruntime"))


def test_without_its_note_it_is_not_taken_for_the_builders(exported: Path, tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes((exported / "model.onnx").read_bytes())
    with pytest.raises(MissingArtifact) as caught:
        open_runtime("onnxruntime", tmp_path, detect())
    assert caught.value.path == tmp_path / "genai_config.json"


# --- what cannot be had -----------------------------------------------------------------------------------------------


def unsupported(variant: str, *architectures: str) -> str | None:
    return exporter.unsupported(variant, recipe_of(Path("none")), {"architectures": list(architectures)})


@pytest.mark.parametrize("variant", ["fp16", "int8", "int4", "int4-rtn-b64"])
def test_other_variants_name_the_one_there_is(variant: str) -> None:
    assert unsupported("fp32", "GPT2LMHeadModel") is None and unsupported(variant, "LlamaForCausalLM") is None
    assert "does not support GPT2LMHeadModel; it supports " in str(unsupported(variant, "GPT2LMHeadModel"))
    assert "can make onnx-fp32" in str(unsupported(variant, "GPT2LMHeadModel"))


@pytest.mark.parametrize(
    ("architecture", "why"),
    [
        ("MambaForCausalLM", trace.STATEFUL),  # it takes no past_key_values
        ("RecurrentGemmaForCausalLM", trace.STATEFUL),
        ("MForCausalLM", "transformers has no such class"),
    ],
)
def test_what_no_graph_is_made_of_is_known_before_training(architecture: str, why: str) -> None:
    for variant in ("fp32", "int4"):
        reason = str(unsupported(variant, architecture))
        assert f"transformers' exporter cannot export it either: {why}" in reason and "can make" not in reason


def test_a_plan_names_what_is_left(tmp_path: Path) -> None:
    model = build(tmp_path / "gpt2", "gpt2", **FAMILIES["gpt2"])
    how = recipe_of(model, export={"formats": ["onnx-fp32", "onnx-int4"]}, bench={"runtimes": ["transformers"]})
    assert [refusal.format for refusal in deployable.refusals(how)] == ["onnx-int4"]
    with pytest.raises(NotDeployable, match=r"the other formats: --set export.formats=\[onnx-fp32\]"):
        deployable.check(how)


def test_a_model_that_cannot_be_traced_is_refused_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(tmp_path / "mamba", "mamba", hidden_size=64, state_size=8, num_hidden_layers=1)
    monkeypatch.setattr(exporter, "refusal", lambda architecture: None)
    with pytest.raises(
        NotDeployable, match=r"exporter: MambaForCausalLM cannot be traced: its cache holds .* Leave the onnx"
    ):
        exporter.export(job_of(model, tmp_path), tmp_path / "out", "fp32")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["export.log", "mamba", "rows.parquet"]


# --- a whole run ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def verified(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run of a GPT-NeoX up to the stage `bench`."""
    folder = tmp_path_factory.mktemp("run")
    model = build(folder / "model", "gpt_neox", **WIDE)
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in chat_rows(24)), encoding="utf-8")
    settings = tiny_settings(model, rows)
    settings["export"] = {"formats": ["onnx-fp32"]}
    settings["bench"]["runtimes"] = ["onnx-fp32"]
    (folder / "tiny.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    run = Run.create(folder / "run", load(folder / "tiny.yaml"))
    for stage in ("data", "train", "evaluate", "merge", "export", "verify", "bench"):
        pipeline.execute(run, stage)
    return run


def test_a_run_passes_the_gate_of_equality(verified: Run) -> None:
    entry = read_json(verified.need("verify", "parity.json"))["parity"]["onnx-fp32"]
    assert entry["status"] == "passed" and entry["gate"]["max_difference"] == 1e-3
    assert entry["made_from"]["top1"] == 1.0 and entry["made_from"]["max_difference"] < 1e-4
    note = read_json(verified.need("export", "onnx-fp32") / "qkit.json")
    assert note["format"] == "onnx-fp32" and note["graph"].startswith("traced") and note["merged"]
    assert list(verified.folder("bench").glob("onnx-fp32-*.json"))
    with pytest.raises(NotDeployable, match="opens only graphs of its own builder"):
        serving.of_run(verified, serve_request.ServeOptions("onnxruntime"))


def test_its_card_says_how_it_is_used(verified: Run, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    text = model_card.render(verified, "onnx-fp32")
    code = text.split("```python\n")[1].partition("```")[0]
    monkeypatch.chdir(verified.need("export", "onnx-fp32"))
    exec(code, {})
    assert "<|im_start|>assistant\n" in capsys.readouterr().out
    assert "onnxruntime_genai.Model" not in text
