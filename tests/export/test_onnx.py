"""ONNX: the exported folder, and what ONNX Runtime says with it, against transformers with the same weights."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers.exporting import job_for
from helpers.paths import TESTS
from qkit.core.device import detect
from qkit.core.errors import DoesNotFit, MissingArtifact, MissingExtra, NotDeployable
from qkit.export._onnx import builder, genai_config, requantize
from qkit.export.formats import onnx as exporter
from qkit.plugins.exporter import Job
from qkit.plugins.runtime import Runtime, TokenRow, open_runtime
from qkit.recipe.schema import Recipe
from qkit.runtimes import _onnx_graph, onnxruntime

pytestmark = pytest.mark.slow

pytest.importorskip("onnxruntime_genai")

PROMPTS = [
    [5, 6, 7],
    [i * 37 % 250 + 5 for i in range(30)],
    [9, 200, 31, 77, 12, 8, 90],
    [3],
    list(range(60, 80)),
    [17, 4],
]
ROWS = [
    TokenRow([5, 6, 7, 8, 9], 2),
    TokenRow(list(range(20, 60)), 11),
    TokenRow([1, 99], 1),
    TokenRow([200, 100, 50, 25, 12, 6], 3),
]
NEVER: frozenset[int] = frozenset()


@pytest.fixture(scope="session")
def model(onnx_model: Path) -> Path:
    return onnx_model


def _lively(tiny_model: Path, folder: Path, **changes: Any) -> None:
    import torch
    from transformers import AutoConfig, AutoTokenizer, LlamaForCausalLM

    config = AutoConfig.from_pretrained(tiny_model, **{"initializer_range": 0.2, **changes})
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)


def unsupported(config: dict[str, Any]) -> str | None:
    return exporter.unsupported(
        "fp32", Recipe.model_validate({"task": "chat", "model": {"source": "none"}, "data": {}}), config
    )


@pytest.fixture(scope="session")
def job(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Job:
    return job_for(model, tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="session")
def exported(onnx_exports: dict[str, Path]) -> dict[str, Path]:
    """The model in each variant."""
    return onnx_exports


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


def log_probabilities(reference: Any, row: TokenRow) -> Any:
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


@pytest.mark.parametrize("variant", list(exporter.VARIANTS))
def test_it_stops_where_the_generation_config_says(exported: dict[str, Path], variant: str) -> None:
    config = json.loads((exported[variant] / "genai_config.json").read_text())
    assert config["model"]["eos_token_id"] == [2, 7]
    assert json.loads((exported[variant] / "generation_config.json").read_text())["eos_token_id"] == [2, 7]


def test_a_low_bit_file_holds_what_its_bits_take(exported: dict[str, Path]) -> None:
    sizes = {name: (folder / "model.onnx.data").stat().st_size for name, folder in exported.items()}
    assert sizes["int4"] < sizes["int8"] < sizes["fp16"] < sizes["fp32"]


@pytest.mark.parametrize("variant", ["", "int3", "int4-best", "int4-b48", "int4-rtn-32", "fp32-b32"])
def test_an_unknown_variant_names_the_known_ones(job: Job, tmp_path: Path, variant: str) -> None:
    with pytest.raises(NotDeployable) as caught:
        exporter.export(job, tmp_path / "out", variant)
    assert caught.value.export_format == ("onnx-" + variant).rstrip("-")
    assert all(f"onnx-{known}" in str(caught.value) for known in exporter.VARIANTS)
    assert all(str(part) in str(caught.value) for part in (*exporter.ALGORITHMS, *exporter.BLOCKS))


@pytest.mark.parametrize(
    ("variant", "algorithm", "block"),
    [("int4", "gptq", 32), ("int4-b64", "gptq", 64), ("int4-rtn", "rtn", 32), ("int4-k_quant-b16", "k_quant", 16)],
)
def test_algorithm_and_block_size_by_hand(variant: str, algorithm: str, block: int) -> None:
    assert exporter.build_of(variant) == exporter.Build("int4", algorithm, block)
    assert variant in exporter.QUANTIZED
    assert not exporter.QUANTIZED & {"fp32", "fp16"}


def test_another_block_size_opens(job: Job, tmp_path: Path) -> None:
    """One block to a row of 64 inputs: an odd number, whose zero points do not fill their last byte."""
    exporter.export(job, tmp_path / "out", "int4-b64")
    (block,) = {matrix.block for matrix in matrices(tmp_path / "out")}
    assert block == 64
    with open_runtime("onnxruntime", tmp_path / "out", detect()) as opened:
        assert len(list(opened.score(ROWS))) == len(ROWS)


def matrices(folder: Path) -> list[Any]:
    from qkit.export._onnx.matmul_nbits import Graph

    other = folder.with_name("other")
    other.mkdir(exist_ok=True)
    with Graph(folder, other) as graph:
        return graph.matrices


def test_a_missing_builder_names_its_extra(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builder, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"pip install 'qkit\[onnx\]'"):
        exporter.export(job, tmp_path / "out", "fp32")
    assert unsupported({"architectures": ["MForCausalLM"]}) is None  # there is none to ask


def test_which_architectures_can_be_exported_is_known_before_training() -> None:
    assert {"LlamaForCausalLM", "Qwen3ForCausalLM", "MistralForCausalLM"} <= builder.architectures()
    assert unsupported({"architectures": ["LlamaForCausalLM"]}) is None
    assert unsupported({}) is None
    assert "does not support MForCausalLM; it supports " in str(unsupported({"architectures": ["MForCausalLM"]}))


def test_an_architecture_the_builder_does_not_know(job: Job, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["MForCausalLM"]}))
    with pytest.raises(NotDeployable, match="MForCausalLM"):
        exporter.export(replace(job, merged=tmp_path), tmp_path / "out", "int4")
    program = ["-c", "raise NotImplementedError('The M model is not supported.')"]
    with pytest.raises(NotDeployable, match="The M model is not supported"):
        builder.run_program(program, tmp_path / "log", tmp_path / "out", builder.BUILDER)


def test_a_failed_build_shows_the_end_of_its_log(job: Job, tmp_path: Path) -> None:
    (tmp_path / "export.log").write_text("of an earlier format\n")
    (tmp_path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    broken = replace(job, merged=tmp_path, log=tmp_path / "export.log")
    with pytest.raises(RuntimeError, match="status 1") as caught:
        exporter.export(broken, tmp_path / "out", "fp32")
    assert "earlier format" not in str(caught.value)
    assert str(caught.value).splitlines()[-1] == broken.log.read_text().splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_scores_are_those_of_transformers(fp32: Runtime, reference: Any) -> None:
    for row, scores in zip(ROWS, fp32.score(ROWS), strict=True):
        expected = log_probabilities(reference, row)
        assert scores.full is not None
        np.testing.assert_allclose(scores.full, expected, atol=2e-4)
        np.testing.assert_array_equal(scores.top1, expected.argmax(-1))
        np.testing.assert_array_equal(scores.targets, scores.full[np.arange(len(expected)), row.input_ids[row.start :]])
        assert scores.full.dtype == scores.targets.dtype == np.float32


@pytest.mark.parametrize(("variant", "most"), [("fp16", 0.01), ("int8", 0.1), ("int4", 0.6)])
def test_fewer_bits_are_near_but_not_the_same(
    exported: dict[str, Path], reference: Any, variant: str, most: float
) -> None:
    with open_runtime("onnxruntime", exported[variant], detect()) as opened:
        difference = [
            np.abs(scores.full - log_probabilities(reference, row)).mean()
            for row, scores in zip(ROWS, opened.score(ROWS), strict=True)
        ]
    assert 1e-5 < max(difference) < most


def test_scores_do_not_depend_on_the_batch(fp32: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    together = list(fp32.score(ROWS))
    monkeypatch.setattr(_onnx_graph, "BATCH_TOKENS", 1)
    for batched, alone in zip(together, fp32.score(ROWS), strict=True):
        np.testing.assert_allclose(batched.full, alone.full, atol=1e-5)


def test_a_row_without_completion_has_no_scores(opened: Runtime) -> None:
    (scores,) = opened.score([TokenRow([5, 6], 2)])
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
    monkeypatch.setattr(_onnx_graph, "BATCH_TOKENS", budget)
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
    with pytest.raises(MissingArtifact) as caught:
        onnxruntime.open(tiny_model, detect())
    assert caught.value.path == tiny_model / "model.onnx"


def test_a_graph_of_another_kind(tmp_path: Path, exported: dict[str, Path]) -> None:
    import onnx

    model = onnx.load(exported["fp32"] / "model.onnx", load_external_data=False)
    next(node for node in model.graph.node if "logits" in node.output).op_type = "Identity"
    onnx.save(model, tmp_path / "model.onnx")
    shutil.copy(exported["fp32"] / "genai_config.json", tmp_path)
    with pytest.raises(NotDeployable, match="matrix product"):
        onnxruntime.open(tmp_path, detect())


def test_onnxruntime_genai_says_the_same_token_by_token(exported: dict[str, Path], fp32: Runtime) -> None:
    import onnxruntime_genai

    generated = onnxruntime_genai.Model(str(exported["fp32"]))
    for prompt in (prompt for prompt in PROMPTS if len(prompt) > 1):
        parameters = onnxruntime_genai.GeneratorParams(generated)
        parameters.set_search_options(do_sample=False, max_length=len(prompt) + 12, min_length=len(prompt) + 12)
        generator = onnxruntime_genai.Generator(generated, parameters)
        generator.append_tokens(np.array([prompt], np.int32))
        tokens = []
        while not generator.is_done():
            generator.generate_next_token()
            tokens.append(int(generator.get_next_tokens()[0]))
        assert tokens == fp32.generate([prompt], len(tokens), NEVER)[0]
        assert len(tokens) == 12


def test_a_tied_head_is_in_the_file_once(tiny_model: Path, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    _lively(tiny_model, tmp_path / "tied", tie_word_embeddings=True, initializer_range=0.06)
    exporter.export(job_for(tmp_path / "tied", tmp_path / "run"), tmp_path / "int8", "int8")
    with open_runtime("onnxruntime", tmp_path / "int8", detect()) as opened:
        scores = list(opened.score(ROWS))
    reference = AutoModelForCausalLM.from_pretrained(tmp_path / "tied", dtype=torch.float32).eval()
    for row, found in zip(ROWS, scores, strict=True):
        assert np.abs(found.full - log_probabilities(reference, row)).mean() < 0.05
    assert (tmp_path / "int8" / "model.onnx.data").stat().st_size < 2.2 * sum(
        matrix.inputs * matrix.outputs for matrix in matrices(tmp_path / "int8")
    )


def test_matrices_that_the_builder_cuts_up_are_rounded_by_the_builder(tiny_model: Path, tmp_path: Path) -> None:
    """Phi-3 has query, key and value in one matrix, and gate and up in one."""
    import torch
    from transformers import AutoTokenizer, Phi3Config, Phi3ForCausalLM

    config = Phi3Config(
        vocab_size=259, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=128, original_max_position_embeddings=128, initializer_range=0.2,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    Phi3ForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "phi")
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path / "phi")
    job = job_for(tmp_path / "phi", tmp_path / "run")
    exporter.export(job, tmp_path / "int4", "int4")
    assert "rounded by the builder's k_quant_mixed instead" in job.log.read_text()
    with open_runtime("onnxruntime", tmp_path / "int4", detect()) as opened:
        assert len(list(opened.score(ROWS))) == len(ROWS)


def test_a_matrix_with_other_values_is_not_replaced(job: Job, exported: dict[str, Path], tmp_path: Path) -> None:
    import torch

    from qkit.export._onnx.matmul_nbits import Graph

    with Graph(exported["int4"], tmp_path) as graph:
        matrix = graph.matrices[0]
        weight = torch.from_numpy(graph.weight(matrix))
        assert requantize.checked(graph, matrix, weight) is weight
        with pytest.raises(requantize.Unmatched, match=matrix.name):
            requantize.checked(graph, matrix, weight.flip(0))


@pytest.mark.parametrize("name", ["/model/layers.0/moe/experts", "/model/layers.0/attn/rotary", "/vision/proj"])
def test_nodes_of_unknown_names(name: str) -> None:
    with pytest.raises(requantize.Unmatched, match=name):
        requantize.source(name)


def test_without_training_rows_there_is_nothing_to_round_by(
    job: Job, exported: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(requantize.Unmatched, match="no training rows"):
        requantize.requantize(replace(job, rows=tmp_path / "none"), exported["int4"], tmp_path, 4)


def test_calibration_rows_are_spread_over_the_whole(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(requantize.calibration_rows(job.rows)) == 40
    monkeypatch.setattr(requantize, "CALIBRATION_TOKENS", 300)
    chosen = requantize.calibration_rows(job.rows)
    assert 150 < sum(map(len, chosen)) < 600
    assert chosen[0] == requantize.calibration_rows(job.rows)[0]


# --- never half an artifact -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("who", ["the builder", "our own writing"])
def test_a_full_disk_leaves_nothing(job: Job, exported: dict[str, Path], tmp_path: Path, who: str) -> None:
    """A limit on the size of files stands for a full disk; the builder's own file, of 4 bits, is the smaller one."""
    limit = 50_000 if who == "the builder" else (exported["int8"] / "model.onnx.data").stat().st_size - 1000
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(DoesNotFit) as caught:
            exporter.export(replace(job, log=tmp_path / "log"), tmp_path / "out", "int8")
        assert caught.value.free_bytes is not None
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [file.name for file in tmp_path.iterdir()] == ["log"]
    assert ("Traceback" in (tmp_path / "log").read_text()) == (who == "the builder")


def test_a_kill_half_way_leaves_no_artifact(model: Path, tmp_path: Path) -> None:
    """Killed as soon as the builder has written something that looks like an artifact."""
    job_for(model, tmp_path / "run")
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); from pathlib import Path\n"
        "from helpers.exporting import job_for; from qkit.plugins.exporter import exporter\n"
        "exporter('onnx').export(job_for(Path(sys.argv[2]), Path(sys.argv[3])), Path(sys.argv[4]), 'int4')"
    )
    places = [str(TESTS), str(model), str(tmp_path / "run"), str(tmp_path / "out")]
    child = subprocess.Popen([sys.executable, "-c", code, *places], stderr=subprocess.DEVNULL)
    until = time.monotonic() + 120
    while not list(tmp_path.rglob("model.onnx*")) and child.poll() is None and time.monotonic() < until:
        time.sleep(0.01)
    os.kill(child.pid, signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    assert list(tmp_path.rglob("model.onnx*"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("config", "wanted"),
    [
        ({"eos_token_id": [2, 300], "pad_token_id": 300}, {"eos_token_id": [2], "pad_token_id": 2}),
        ({"eos_token_id": 2, "pad_token_id": 0}, {"eos_token_id": 2}),
        ({"eos_token_id": 2, "pad_token_id": 259}, {"eos_token_id": 2, "pad_token_id": 2}),
    ],
)
def test_no_id_beyond_the_embedding_is_named(config: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert genai_config.ids_with_embedding({"vocab_size": 259, **config}) == wanted


def test_the_server_refuses_a_token_that_the_model_has_no_row_for() -> None:
    """A text may spell a token that the tokenizer has and the embedding has not."""
    from qkit.server.onnx_app import Service
    from qkit.server.onnx_requests import Refused

    service = Service.__new__(Service)
    service.max_model_len, service.vocab_size = 10, 259
    assert service.tokens_left([258], 1) == 9
    with pytest.raises(Refused, match="has the token id 259; the ids of this model are 0 to 258"):
        service.tokens_left([5, 259], 1)
