"""`qkit serve` of a run with labels, in a process of its own: answers, limits, the contract, draining, and what it refuses."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from helpers.command import qkit, qkit_here
from helpers.labels_served import exported_run
from helpers.served import KEY, Served, figure, holding, serving, wait_for_drain
from helpers.tiny_labelled import LABELS, text
from qkit.core.errors import MissingArtifact, ModelError, NotDeployable, ParityFailed
from qkit.measure import label_contract
from qkit.model.provenance import purpose_of
from qkit.plan.sheet import Options, recipe_for
from qkit.run.directory import Run
from qkit.serve import fits, lifecycle
from qkit.serve import serving as serve_serving
from qkit.serve.request import ServeOptions

pytestmark = pytest.mark.slow
pytest.importorskip("onnxruntime")

HEADERS = {"Authorization": f"Bearer {KEY}"}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return exported_run(tmp_path_factory.mktemp("labels"))


@pytest.fixture(scope="module")
def served(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    sets = ("--set", "serve.max_body_bytes=20000", "--set", "serve.max_requests=12")
    with serving(tmp_path_factory.mktemp("served"), run.root, "--name", "fruits", *sets) as running:
        yield running


def ask(served: Served, path: str = "/classify", **body: Any) -> Any:
    answer = httpx.post(f"{served.url}{path}", json=body, headers=HEADERS, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer.json()


def expected(run: Run, texts: list[str], artifact: str = "onnx-fp32") -> Any:
    """Probabilities [texts, labels] of the artifact, by ONNX Runtime alone."""
    import numpy as np
    import onnxruntime
    from transformers import AutoTokenizer

    folder = run.folder("export") / artifact
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"))
    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    rows = []
    for each in texts:
        batch = tokenizer([each], return_tensors="np", truncation=True, max_length=32)
        feed = {node.name: batch[node.name].astype(np.int64) for node in session.get_inputs()}
        logits = session.run(["logits"], feed)[0][0].astype(np.float64)
        rows.append(np.exp(logits) / np.exp(logits).sum())
    return rows


def test_it_says_what_the_artifact_says(run: Run, served: Served) -> None:
    texts = [text(number) for number in range(40)] + [" ".join(["ban"] * 100)]
    wanted = expected(run, texts)
    answer = ask(served, input=texts, model="fruits")
    for item, row in zip(answer["data"], wanted, strict=True):
        assert item["probs"] == pytest.approx(list(row), abs=1e-5)
        assert item["label"] == LABELS[row.argmax()]
    assert len({item["label"] for item in answer["data"]}) == 3
    with ThreadPoolExecutor(12) as pool:
        alone = list(pool.map(lambda each: ask(served, input=each)["data"][0], texts))
    for item, row in zip(alone, wanted, strict=True):
        assert item["probs"] == pytest.approx(list(row), abs=1e-5)


def test_it_says_how_to_ask_it(served: Served) -> None:
    env = {**os.environ, "VLLM_API_KEY": KEY}
    python = subprocess.run([sys.executable, "-c", served.told["python"]], env=env, capture_output=True, text=True)
    assert python.returncode == 0, python.stderr
    assert "'num_classes': 3" in python.stdout
    if shutil.which("curl"):
        curl = subprocess.run(served.told["curl"], shell=True, env=env, capture_output=True, text=True)
        assert json.loads(curl.stdout)["data"][0]["label"] in LABELS


@pytest.mark.parametrize(
    ("headers", "content", "status"),
    [
        (HEADERS, json.dumps({"input": "x" * 20_001}).encode(), 413),
        ({**HEADERS, "Transfer-Encoding": "chunked"}, iter([b"{}"]), 411),
        ({"Authorization": "Bearer wrong"}, b"{}", 401),
        ({}, b"{}", 401),
        (HEADERS, b'{"input": ', 400),
        (HEADERS, json.dumps({"input": "a", "model": "other"}).encode(), 404),
    ],
)
def test_limits_and_errors(served: Served, headers: dict[str, str], content: Any, status: int) -> None:
    answer = httpx.post(f"{served.url}/classify", headers=headers, content=content)
    assert answer.status_code == status and answer.json()["error"]["code"] == status


def test_too_many_requests(served: Served) -> None:
    with holding(served, 12, "/classify"):
        deadline = time.monotonic() + 10
        while (answer := httpx.post(f"{served.url}/classify", headers=HEADERS, json={"input": "a"})).status_code != 429:
            assert time.monotonic() < deadline
        assert answer.headers["retry-after"] == "1"
    deadline = time.monotonic() + 10
    while httpx.post(f"{served.url}/classify", headers=HEADERS, json={"input": "ban"}).status_code != 200:
        assert time.monotonic() < deadline


def test_metrics_and_models(served: Served, run: Run) -> None:
    ask(served, input=["ban", "bon"])
    assert figure(served, "qkit_texts_total") >= 2 and figure(served, 'qkit_requests_total{status="200"}') > 0
    entries = httpx.get(f"{served.url}/v1/models", headers=HEADERS).json()["data"]
    assert [entry["id"] for entry in entries] == ["fruits"]
    assert entries[0]["max_model_len"] == 32 and Path(entries[0]["root"]).parent == run.folder("export").resolve()


# --- the contract -----------------------------------------------------------------------------------------------------


def test_the_server_keeps_the_contract(run: Run, served: Served) -> None:
    contract = label_contract.check_server(run, served.url, headers=HEADERS)
    assert {check.name: check.status for check in contract.checks} == dict.fromkeys(
        ("tokens", "labels", "answers"), "ok"
    )
    assert "24 held-out texts" in contract.checks[0].detail and "within 0.001" in contract.checks[2].detail
    contract.enforce()


def test_verify_checks_a_server(run: Run, tmp_path: Path) -> None:
    with serving(tmp_path, run.root, "--artifact", "onnx-int8", env={"VLLM_API_KEY": ""}) as running:
        done = qkit_here("verify", run.root, "--server", running.url)
    assert done.returncode == 0 and "answers  ok: 24 held-out texts" in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize("broken", ["labels", "tokens", "length"])
def test_a_server_that_differs_is_not_ready(run: Run, tmp_path: Path, broken: str) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run.root, copy, symlinks=True)
    other, serve = Run.open(copy), {"port": 0}
    folder = other.folder("export") / "onnx-fp32"
    if broken == "labels":
        names = folder / "labels.json"
        names.write_text(json.dumps({"names": ["tree", "fruit", "wood"]}))
        config = json.loads((folder / "config.json").read_text())
        config["id2label"] = {"0": "tree", "1": "fruit", "2": "wood"}
        (folder / "config.json").write_text(json.dumps(config))
    elif broken == "tokens":
        tokenizer = json.loads((folder / "tokenizer.json").read_text())
        ids = tokenizer["model"]["vocab"]
        ids["apple"], ids["pear"] = ids["pear"], ids["apple"]
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    recipe = other.recipe.model_copy(update={"serve": other.recipe.serve.model_copy(update=serve)})
    made = serve_serving.of_run(Run(copy, recipe), ServeOptions(artifact="onnx-fp32", force=True))
    assert made.purpose is not None
    if broken == "length":
        made = replace(made, purpose=replace(made.purpose, max_length=5))
    said = {"labels": "label 0 is", "tokens": "from token 1 on", "length": "from token 4 on"}[broken]
    ready: list[Any] = []
    with pytest.raises(ParityFailed, match=said) as caught:
        lifecycle.serve(made, ready.append, lambda _: None)
    assert not ready and caught.value.gate == "contract"


def test_answers_of_other_weights_are_noticed(run: Run, tmp_path: Path) -> None:
    """The file is replaced while its server runs."""
    folder = tmp_path / "artifact"
    shutil.copytree(run.folder("export") / "onnx-fp32", folder)
    with serving(tmp_path, folder, env={"VLLM_API_KEY": ""}) as running:
        for file in folder.glob("model.onnx*"):
            file.unlink()
        shutil.copy(run.folder("export") / "onnx-int8" / "model.onnx", folder)
        contract = label_contract.check_server(run, running.url)
    (broken,) = contract.broken
    assert broken.name == "answers" and "has the probability" in broken.detail and "as artifact has it" in broken.detail


# --- what is served ---------------------------------------------------------------------------------------------------


def test_what_is_picked_and_planned(run: Run) -> None:
    made = serve_serving.of_run(run, ServeOptions())
    assert made.runtime == "onnxruntime" and Path(made.model).name == "onnx-fp32"
    assert "passed" in made.chosen and made.purpose is not None and made.purpose.max_length == 32
    plan = fits.planned(made)
    assert plan is not None and plan.fits
    sizes = {item.name: item.bytes for item in plan.items}
    assert sizes["weights"] == sum(file.stat().st_size for file in Path(made.model).glob("model.onnx*"))


def test_a_folder_says_what_it_is_for(run: Run, tmp_path: Path) -> None:
    folder = run.folder("export") / "onnx-int8"
    purpose = purpose_of(folder)
    assert purpose is not None and (purpose.task, purpose.max_length, purpose.format) == ("classify", 32, "onnx-int8")
    assert purpose_of(run.folder("merge")) is not None
    copy = tmp_path / "mine"
    shutil.copytree(folder, copy)
    with serving(tmp_path, copy) as running:
        assert running.model == "mine" and ask(running, input=text(0))["data"][0]["label"] in LABELS


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        (ServeOptions(artifact="onnx-int4"), MissingArtifact, "onnx-int4"),
        (ServeOptions(adapters=("a=b",)), NotDeployable, "does not serve adapters"),
    ],
)
def test_what_cannot_be_served(run: Run, options: ServeOptions, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        serve_serving.of_run(run, options)
    with pytest.raises(ModelError, match=r"model\.onnx is missing: serve the run"):
        serve_serving.of_model(str(run.folder("merge")), recipe_for(Options("x"), ()), ServeOptions())


def test_vllm_serves_the_merged_model(run: Run) -> None:
    made = serve_serving.of_run(run, ServeOptions("vllm", rest=("--max-num-seqs", "4")))
    assert (
        made.model == str(run.folder("merge")) and made.section.max_model_len == 32 and "merged (passed" in made.chosen
    )
    words = " ".join(lifecycle.argv(made, 1))
    assert " --runner pooling --dtype float32 --max-num-seqs 4" in words and "--max-model-len 32" in words
    assert fits.planned(made) is None
    with pytest.raises(NotDeployable, match="task=classify does not serve adapters"):
        serve_serving.of_run(run, ServeOptions("vllm", adapters=("a=b",)))


def test_vllm_keeps_the_contract(tmp_path: Path) -> None:
    """On a CPU, vLLM's attention needs heads of 32 or more."""
    pytest.importorskip("vllm")
    run = exported_run(tmp_path, model_sizes={"hidden_size": 64})
    with serving(tmp_path, run.root, "--runtime", "vllm", "--set", "serve.enforce_eager=true") as running:
        contract = label_contract.check_server(run, running.url, headers=HEADERS)
        answer = ask(running, model=running.model, input=[text(number) for number in range(9)])
    assert {check.name: check.status for check in contract.checks} == dict.fromkeys(
        ("tokens", "labels", "answers"), "ok"
    )
    for item, row in zip(answer["data"], expected(run, [text(number) for number in range(9)]), strict=True):
        assert item["probs"] == pytest.approx(list(row), abs=1e-3)


def test_the_command_can_be_printed(run: Run) -> None:
    done = qkit("serve", run.root, "--print", "shell")
    assert done.returncode == 0 and "qkit.server.labels.app" in done.stdout and "--max-length 32" in done.stdout
    for form in ("compose", "kubernetes"):
        done = qkit("serve", run.root, "--print", form)
        assert done.returncode == 2 and "--print shell" in done.stderr


# --- its end ----------------------------------------------------------------------------------------------------------


def test_on_sigterm_current_requests_are_answered_and_new_ones_refused(run: Run, tmp_path: Path) -> None:
    with serving(tmp_path, run.root) as running, ThreadPoolExecutor(4) as pool:
        texts = [text(number) for number in range(1000)] * 4
        with holding(running, 1, "/classify"):
            answers = [pool.submit(ask, running, input=texts) for _ in range(4)]
            deadline = time.monotonic() + 10
            while figure(running, "qkit_rows_running") == 0:
                assert time.monotonic() < deadline
            running.process.send_signal(signal.SIGTERM)
            assert wait_for_drain(running)["in_flight"] > 0
            refused = httpx.post(f"{running.url}/classify", headers=HEADERS, json={"input": "a"})
            assert refused.status_code == 503 and "shutting down" in refused.json()["error"]["message"]
        assert [len(answer.result()["data"]) for answer in answers] == [4000] * 4
        assert running.process.wait(timeout=30) == 0


PROTOCOL = """
import json, sys
from vllm.entrypoints.pooling.classify.protocol import ClassificationCompletionRequest, ClassificationResponse
given = json.load(sys.stdin)
for body in given["requests"]:
    ClassificationCompletionRequest.model_validate(body)
answer = ClassificationResponse.model_validate(given["answer"])
print(json.dumps([answer.model_dump(), ClassificationCompletionRequest(**given["requests"][0]).model_dump()]))
"""


def test_requests_and_answers_are_those_of_vllm(served: Served) -> None:
    """vLLM's own classes read the answer, and the server takes every field that its request class writes."""
    pytest.importorskip("vllm")
    requests = [{"model": "fruits", "input": one} for one in (["ban", "bon"], "ban", [1, 5, 2], [[1, 5, 2], [1, 6, 2]])]
    answer = ask(served, **requests[0])
    given = json.dumps({"requests": requests, "answer": answer})
    done = subprocess.run([sys.executable, "-c", PROTOCOL], input=given, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    read, request = json.loads(done.stdout.splitlines()[-1])
    assert read["data"] == [
        {name: v for name, v in item.items() if name != "score"} | {"score": item["score"]} for item in answer["data"]
    ]
    assert ask(served, **request)["data"] == answer["data"]
    assert [len(ask(served, **one)["data"]) for one in requests] == [2, 1, 1, 2]
