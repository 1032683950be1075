"""ONNX: the exported folder, and what ONNX Runtime says with it, against transformers with the same weights."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qkit.device import detect
from qkit.errors import MissingArtifact, MissingExtra, NotDeployable
from qkit.export import onnx as exporter
from qkit.export._job import Job
from qkit.recipe import Recipe
from qkit.runtime import Row, Runtime, open_runtime
from qkit.runtimes import onnxruntime as runtime

pytest.importorskip("onnxruntime_genai")

PROMPTS = [
    [5, 6, 7],
    [i * 37 % 250 + 5 for i in range(30)],
    [9, 200, 31, 77, 12, 8, 90],
    [3],
    list(range(60, 80)),
    [17, 4],
]
ROWS = [Row([5, 6, 7, 8, 9], 2), Row(list(range(20, 60)), 11), Row([1, 99], 1), Row([200, 100, 50, 25, 12, 6], 3)]
NEVER: frozenset[int] = frozenset()


@pytest.fixture(scope="session")
def model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with larger weights and a head of its own.

    As it is, it repeats its last token for ever, whatever came before: positions and caches could be wrong unseen.
    """
    import torch
    from transformers import AutoConfig, AutoTokenizer, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("models") / "lively"
    config = AutoConfig.from_pretrained(tiny_model, tie_word_embeddings=False, initializer_range=0.2)
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
    return folder


def _job(merged: Path, log: Path) -> Job:
    """All that this exporter reads of a job."""
    recipe = Recipe.model_validate({"task": "chat", "model": {"source": "none"}, "data": {}})
    return Job(merged, merged, merged, merged, recipe, log)


@pytest.fixture(scope="session")
def exported(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The model in each variant."""
    root = tmp_path_factory.mktemp("onnx")
    for variant in exporter.VARIANTS:
        exporter.export(_job(model, root / "export.log"), root / variant, variant)
    return {variant: root / variant for variant in exporter.VARIANTS}


@pytest.fixture(scope="session", params=list(exporter.VARIANTS))
def opened(request: pytest.FixtureRequest, exported: dict[str, Path]) -> Iterator[Runtime]:
    with open_runtime("onnxruntime", exported[request.param], detect()) as opened:
        yield opened


@pytest.fixture(scope="session")
def fp32(exported: dict[str, Path]) -> Iterator[Runtime]:
    with open_runtime("onnxruntime", exported["fp32"], detect()) as opened:
        yield opened


@pytest.fixture(scope="session")
def reference(model: Path) -> Any:
    """The same weights in transformers, in fp32."""
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()


def log_probabilities(reference: Any, row: Row) -> Any:
    import torch

    with torch.inference_mode():
        logits = reference(input_ids=torch.tensor([list(row.input_ids)])).logits[0]
    return logits[row.start - 1 : -1].log_softmax(-1).numpy()


@pytest.mark.parametrize("variant", list(exporter.VARIANTS))
def test_the_folder_is_complete(exported: dict[str, Path], model: Path, variant: str) -> None:
    names = {file.name for file in exported[variant].iterdir()}
    assert {"model.onnx", "genai_config.json"} <= names
    assert {file.name for file in model.iterdir() if file.suffix != ".safetensors"} <= names
    template = "chat_template.jinja"
    assert (exported[variant] / template).read_text() == (model / template).read_text()
    assert not list(exported[variant].parent.glob(".*"))


def test_the_tokenizer_is_the_same(exported: dict[str, Path], model: Path) -> None:
    from transformers import AutoTokenizer

    talk = [{"role": "user", "content": "Grüße <|im_end|>"}]
    ids = [
        AutoTokenizer.from_pretrained(folder).apply_chat_template(talk, add_generation_prompt=True, return_dict=False)
        for folder in (model, exported["fp32"], exported["int4"])
    ]
    assert ids[0] == ids[1] == ids[2]


@pytest.mark.parametrize("variant", ["", "int3"])
def test_an_unknown_variant_names_the_known_ones(tmp_path: Path, variant: str) -> None:
    with pytest.raises(NotDeployable, match="onnx-fp32, onnx-int4"):
        exporter.export(_job(tmp_path, tmp_path / "log"), tmp_path / "out", variant)


def test_a_missing_builder_names_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporter, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"pip install 'qkit\[onnx\]'"):
        exporter.export(_job(tmp_path, tmp_path / "log"), tmp_path / "out", "fp32")


def test_an_architecture_the_builder_does_not_know(tmp_path: Path) -> None:
    log = "Extra options: {}\nTraceback (most recent call last):\nNotImplementedError: The M model is not supported.\n"
    with pytest.raises(NotDeployable, match="The M model is not supported"):
        exporter._raise_for(1, log)


def test_a_failed_build_shows_the_end_of_its_log(tmp_path: Path) -> None:
    log = tmp_path / "export.log"
    log.write_text("of an earlier format\n")
    with pytest.raises(RuntimeError, match="status 1") as caught:
        exporter.export(_job(tmp_path / "nothing", log), tmp_path / "out", "fp32")
    assert "earlier format" not in str(caught.value)
    assert str(caught.value).splitlines()[-1] == log.read_text().splitlines()[-1]


def test_scores_are_those_of_transformers(fp32: Runtime, reference: Any) -> None:
    for row, scores in zip(ROWS, fp32.score(ROWS), strict=True):
        expected = log_probabilities(reference, row)
        assert scores.full is not None
        np.testing.assert_allclose(scores.full, expected, atol=2e-4)
        np.testing.assert_array_equal(scores.top1, expected.argmax(-1))
        np.testing.assert_array_equal(scores.targets, scores.full[np.arange(len(expected)), row.input_ids[row.start :]])
        assert scores.full.dtype == scores.targets.dtype == np.float32


def test_int4_is_near_but_not_the_same(exported: dict[str, Path], reference: Any) -> None:
    with open_runtime("onnxruntime", exported["int4"], detect()) as int4:
        difference = [
            np.abs(scores.full - log_probabilities(reference, row)).mean()
            for row, scores in zip(ROWS, int4.score(ROWS), strict=True)
        ]
    assert 1e-3 < max(difference) < 0.6


def test_scores_do_not_depend_on_the_batch(fp32: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    together = list(fp32.score(ROWS))
    monkeypatch.setattr(runtime, "BATCH_TOKENS", 1)
    for batched, alone in zip(together, fp32.score(ROWS), strict=True):
        np.testing.assert_allclose(batched.full, alone.full, atol=1e-5)


def test_a_row_without_completion_has_no_scores(opened: Runtime) -> None:
    (scores,) = opened.score([Row([5, 6], 2)])
    assert scores.full is not None
    assert (len(scores.targets), len(scores.top1), len(scores.full)) == (0, 0, 0)


def test_greedy_decoding_is_that_of_transformers(fp32: Runtime, reference: Any) -> None:
    import torch

    for prompt, completion in zip(PROMPTS, fp32.generate(PROMPTS, 12, NEVER), strict=True):
        ids = list(prompt)
        assert len(set(completion)) > 3
        with torch.inference_mode():
            for token in completion:
                assert token == reference(input_ids=torch.tensor([ids])).logits[0, -1].argmax()
                ids.append(token)
        assert len(completion) == 12


@pytest.mark.parametrize("budget", [1, 64, 256])
def test_a_batch_says_what_each_prompt_says_alone(
    opened: Runtime, budget: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = opened.generate(PROMPTS, 16, NEVER, batch_size=1)
    monkeypatch.setattr(runtime, "BATCH_TOKENS", budget)
    assert opened.generate(PROMPTS, 16, NEVER) == alone


def test_rows_end_at_their_stop_token_and_the_others_go_on(opened: Runtime) -> None:
    free = opened.generate(PROMPTS, 16, NEVER)
    stop = frozenset({free[0][0], free[1][5], free[4][9]})
    expected = [text[: next((i + 1 for i, t in enumerate(text) if t in stop), len(text))] for text in free]
    assert len({len(text) for text in expected}) > 1
    assert opened.generate(PROMPTS, 16, stop) == expected


def test_decoding_stops_when_all_rows_have_ended(opened: Runtime) -> None:
    first = {token for step in opened.steps(PROMPTS, 1, NEVER) for token in step.values()}
    steps = list(opened.steps(PROMPTS, 1000, frozenset(first)))
    assert sorted(index for step in steps for index in step) == list(range(len(PROMPTS)))
    assert list(opened.steps([], 5, NEVER)) == []


def test_memory_is_that_of_the_process(opened: Runtime) -> None:
    assert 2**25 < opened.memory_bytes() < 2**36


def test_a_folder_of_another_kind(tiny_model: Path) -> None:
    with pytest.raises(MissingArtifact, match=r"model\.onnx"):
        runtime.open(tiny_model, detect())


def test_a_graph_of_another_kind(tmp_path: Path, exported: dict[str, Path]) -> None:
    import onnx

    model = onnx.load(exported["fp32"] / "model.onnx", load_external_data=False)
    next(node for node in model.graph.node if "logits" in node.output).op_type = "Identity"
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(NotDeployable, match="matrix product"):
        runtime._with_picked(tmp_path / "model.onnx")
