"""`qkit bench` of models with labels: every format and the server, the record's schema, and what its figures mean."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from helpers.command import qkit
from helpers.labels_served import exported_run
from helpers.schemas import BENCH_SCHEMA, closed
from helpers.tiny_labelled import build_model, labelled_run, settings
from qkit.bench import labelled
from qkit.bench.load import Load
from qkit.core.errors import MissingArtifact, RecipeError, ServerError
from qkit.plugins.runtime import TextRow
from qkit.plugins.task import Prepared
from qkit.recipe.load import from_dict
from qkit.run.directory import Run

TEXTS = [{"text": f"{n}"} for n in range(10)]


# --- loads ------------------------------------------------------------------------------------------------------------


class Service:
    """Rows as long as the number that the text is."""

    def prepare(self, requests: Any) -> Any:
        return [Prepared([TextRow([1] * int(one["text"]), [])]) for one in requests]

    def answer(self, prepared: Prepared, logits: Any) -> Any:
        assert len(prepared.rows) == len(logits) == 1
        return {}


class Slow:
    def __init__(self) -> None:
        self.batches: list[list[int]] = []

    def logits(self, rows: Any) -> Iterator[Any]:
        self.batches.append([len(row.input_ids) for row in rows])
        time.sleep(0.01)
        return iter([np.zeros(2)] * len(rows))


def test_a_runtime_in_this_process_takes_as_many_texts_as_there_are_clients() -> None:
    runtime: Any = Slow()
    service: Any = Service()
    source = labelled.DirectTexts(service, runtime, TEXTS)
    repeat = source.measure(Load(6, 1, concurrency=4), 1)
    assert runtime.batches == [[6, 7, 8, 9], [0, 1]] and not source.queues
    assert [request.prompt_tokens for request in repeat.requests] == [6, 7, 8, 9, 0, 1]
    assert {request.tokens for request in repeat.requests} == {1}
    assert len({request.e2e for request in repeat.requests[:4]}) == 1 and repeat.requests[0].e2e >= 0.01
    assert repeat.seconds >= repeat.requests[0].e2e + repeat.requests[5].e2e


@pytest.fixture
def endpoint() -> Iterator[Any]:
    """A server that notes the texts, and how many requests it has at once. It refuses the text 3."""
    noted = SimpleNamespace(texts=[], now=0, most=0, lock=threading.Lock(), refuse={"3"}, url="")

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            with noted.lock:
                noted.now += 1
                noted.most = max(noted.most, noted.now)
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            noted.texts.append(body["text"])
            time.sleep(0.01)
            with noted.lock:
                noted.now -= 1
            answer = b"{}" if body["text"] not in noted.refuse else b"too bad"
            self.send_response(200 if answer == b"{}" else 400)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_: Any) -> None:
            return None

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    noted.url = f"http://127.0.0.1:{server.server_port}"
    yield noted
    server.shutdown()
    thread.join()
    server.server_close()


def served(endpoint: Any) -> labelled.ServedTexts:
    server: Any = SimpleNamespace(name="m", url=endpoint.url, headers={})
    return labelled.ServedTexts(server, "/classify", TEXTS, range(10), seed=1)


def test_clients_of_a_server(endpoint: Any) -> None:
    repeat = served(endpoint).measure(Load(9, 1, concurrency=3), 1)
    assert sorted(endpoint.texts) == sorted(str(n % 10) for n in range(9, 18)) and endpoint.most == 3
    assert len(repeat.requests) == 8 and repeat.errors == ("400: too bad",)
    assert sorted(request.prompt_tokens for request in repeat.requests) == [0, 1, 2, 4, 5, 6, 7, 9]
    assert all(request.e2e >= 0.01 for request in repeat.requests) and repeat.tool_cpu_seconds


def test_an_open_loop_counts_the_wait_from_the_arrival(endpoint: Any) -> None:
    source = served(endpoint)
    load = Load(20, 1, request_rate=200.0)
    arrivals = source._arrivals(load, 3)
    repeat = source.measure(load, 3)
    assert (
        arrivals == sorted(arrivals)
        and repeat.seconds >= arrivals[-1]
        and len(repeat.requests) + len(repeat.errors) == 20
    )
    assert source._arrivals(load, 3) == arrivals != source._arrivals(load, 4)
    assert source._arrivals(Load(20, 1, concurrency=1), 3) == []


def test_a_server_that_refuses_everything(endpoint: Any) -> None:
    endpoint.refuse = {str(n) for n in range(10)}
    with pytest.raises(ServerError, match="failed every request: 400: too bad"):
        served(endpoint).measure(Load(4, 1, concurrency=2), 0)


# --- what is benched --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "formats", "runtimes"),
    [
        ("lora", ["onnx-fp32", "onnx-int8"], ["transformers", "onnx-fp32", "onnx-int8", "server"]),
        ("lora", [], ["transformers"]),
        ("houlsby", ["onnx-fp32"], ["onnx-fp32", "server"]),
    ],
)
def test_what_is_benched_by_default(tmp_path: Path, method: str, formats: list[str], runtimes: list[str]) -> None:
    raw = settings(tmp_path, tmp_path / "rows.jsonl", method=method, export={"formats": formats})
    recipe = from_dict(raw, (), "the test")
    assert labelled.default_runtimes(recipe) == runtimes and recipe.bench.runtimes == ()
    assert recipe.bench.concurrency == (1, 8, 32)
    assert from_dict(raw, (f"bench.runtimes=[{','.join(runtimes)}]",), "the test").bench.runtimes == tuple(runtimes)


def test_a_chat_run_has_no_such_server(tmp_path: Path) -> None:
    raw = {
        "task": "chat",
        "model": {"source": "a/b"},
        "data": {"train": [{"source": "a/c"}]},
        "bench": {"runtimes": ["server"]},
    }
    with pytest.raises(RecipeError, match=r"bench\.runtimes contains 'server', but export\.formats does not"):
        from_dict(raw, (), "the test")


def test_an_artifact_that_is_not_there(tmp_path: Path) -> None:
    run = labelled_run(tmp_path, build_model(tmp_path / "model", "bert"))
    with pytest.raises(MissingArtifact), labelled.opened(run, "onnx-fp32"):
        pass


@pytest.mark.slow
def test_every_format_and_the_server(tmp_path: Path) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    run = exported_run(tmp_path)
    done = qkit(
        "bench", run.root, "--set", "bench.rounds=3", "--set", "bench.concurrency=[1,8]", "--set", "bench.repeats=2"
    )
    assert done.returncode == 0, done.stderr
    records = {file.stem: json.loads(file.read_text()) for file in run.folder("bench").glob("*.json")}
    assert set(records) == {f"{name}-c{n}" for name in ("merged", "onnx-fp32", "onnx-int8", "server") for n in (1, 8)}
    for name, record in records.items():
        jsonschema.Draft202012Validator(closed(BENCH_SCHEMA)).validate(record)
        assert (record["unit"], record["failed_requests"], record["doubts"]) == ("texts", 0, []), name
        assert record["output_tokens_per_second"] == record["requests_per_second"] > 0
        assert record["prompts"] == 2 * 3 * record["concurrency"] and record["ttft_seconds"] == record["e2e_seconds"]
        assert 5 <= record["prompt_tokens"] <= 11 and record["peak_bytes"] > 0
    server = records["server-c8"]
    assert (
        server["load"]["kind"] == "closed" and server["load"]["tool"] == "qkit" and server["runtime"] == "onnxruntime"
    )
    assert server["argv"][2] == "qkit.server.labels.app" and server["meter"] == "rss_tree"
    assert records["merged-c1"]["load"]["kind"] == "direct" and records["merged-c1"]["quality"]["metric"] == "accuracy"
    lines = [line.split() for line in done.stderr.splitlines() + done.stdout.splitlines()]
    assert ["runtime", "artifact", "at", "once", "p50", "ms", "p99", "ms", "texts/s", "GiB", "start", "s"] in lines
    assert Run.open(run.root).recipe.bench.runtimes == ("transformers", "onnx-fp32", "onnx-int8", "server")
    assert qkit("report", run.root).returncode == 0
    page = (run.folder("report") / "index.html").read_text()
    assert "Texts<br>per second" in page and "Time to the answer, ms" in page and "TPOT" not in page
    card = (run.folder("export") / "onnx-int8" / "README.md").read_text()
    assert "| Texts per second |" in card and "TPOT" not in card
