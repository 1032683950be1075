"""The server of models with labels without its process: what requests mean, how rows are batched, and what is refused."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers.tiny_labelled import LABELS, build_tokenizer

pytest.importorskip("fastapi")
pytest.importorskip("prometheus_client")
from fastapi.testclient import TestClient

from qkit.plugins.runtime import Encodes, TextRow
from qkit.plugins.task import open_task
from qkit.server.labels import app as label_app
from qkit.server.labels.engine import Engine, EngineError, usable_cores

LENGTH = 8


class Lengths(Encodes):
    """A model whose label is the length of the row; it notes its batches, and waits where it is told to."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.gate = threading.Event()
        self.gate.set()
        self.begun = threading.Event()

    def logits(self, rows: Sequence[TextRow]) -> Iterator[Any]:
        self.begun.set()
        assert self.gate.wait(30)
        self.batches.append([len(row.input_ids) for row in rows])
        for row in rows:
            if row.input_ids[0] == 99:
                raise RuntimeError("out of memory")
            yield np.array([len(row.input_ids), row.input_ids[0], 0], np.float32)

    def memory_bytes(self) -> int:
        return 0


def row(length: int, first: int = 1) -> TextRow:
    return TextRow([first] * length, [])


async def _settled(engine: Engine, waiting: int) -> None:
    while engine.waiting != waiting:
        await asyncio.sleep(0.001)


def test_every_request_gets_the_logits_of_its_rows() -> None:
    engine = Engine(Lengths(), workers=3)

    async def ask(number: int) -> list[Any]:
        return await engine.logits([row(1 + (number * 7 + place) % 5, number) for place in range(number % 9)])

    async def all_of_them() -> list[list[Any]]:
        return list(await asyncio.gather(*(ask(number) for number in range(40))))

    results = asyncio.run(all_of_them())
    engine.close()
    for number, result in enumerate(results):
        assert [(a, b) for a, b, _ in result] == [(1 + (number * 7 + p) % 5, number) for p in range(number % 9)]
    assert (engine.waiting, engine.running, engine.by_length) == (0, 0, {})


def test_what_waits_is_batched_by_length_within_the_budget() -> None:
    model = Lengths()
    model.gate.clear()
    engine = Engine(model, workers=1, batch_tokens=12)

    async def ask() -> None:
        first = asyncio.ensure_future(engine.logits([row(2)]))
        await asyncio.to_thread(model.begun.wait, 30)
        rest = [
            asyncio.ensure_future(engine.logits([row(n) for n in lengths])) for lengths in ([5, 3, 5], [5, 3], [20])
        ]
        await _settled(engine, 6)
        model.gate.set()
        await asyncio.gather(first, *rest)

    asyncio.run(ask())
    engine.close()
    assert model.batches[0] == [2] and sorted(model.batches[1:]) == [[3, 3], [5], [5, 5], [20]]
    assert model.batches[1] == [5, 5] and model.batches[-1] == [5]
    assert sorted(engine.sizes()) == [1, 1, 1, 2, 2] and engine.sizes() == []


def test_a_short_request_does_not_wait_for_the_end_of_a_long_one() -> None:
    model = Lengths()
    model.gate.clear()
    engine = Engine(model, workers=1, batch_tokens=4)

    async def ask() -> None:
        asked = [asyncio.ensure_future(engine.logits([row(4) for _ in range(50)]))]
        await asyncio.to_thread(model.begun.wait, 30)
        asked.append(asyncio.ensure_future(engine.logits([row(3)])))
        await _settled(engine, 50)
        model.gate.set()
        await asyncio.gather(*asked)

    asyncio.run(ask())
    engine.close()
    assert model.batches.index([3]) <= 2 and len(model.batches) == 51


def test_what_is_cancelled_is_not_computed() -> None:
    model = Lengths()
    model.gate.clear()
    engine = Engine(model, workers=1)

    async def ask() -> None:
        first = asyncio.ensure_future(engine.logits([row(2)]))
        await asyncio.to_thread(model.begun.wait, 30)
        gone = asyncio.ensure_future(engine.logits([row(n) for n in (3, 4, 5)]))
        await _settled(engine, 3)
        gone.cancel()
        last = asyncio.ensure_future(engine.logits([row(6)]))
        await _settled(engine, 4)
        model.gate.set()
        await asyncio.gather(first, last)

    asyncio.run(ask())
    engine.close()
    assert model.batches == [[2], [6]] and engine.waiting == 0


def test_a_batch_that_fails_is_an_error_of_its_requests_only() -> None:
    engine = Engine(Lengths(), workers=1)

    async def ask() -> None:
        with pytest.raises(EngineError, match="RuntimeError: out of memory"):
            await engine.logits([row(3, 99), row(4)])
        assert len(await engine.logits([row(3)])) == 1

    asyncio.run(ask())
    engine.close()
    assert engine.running == 0


def test_cores_of_a_container(tmp_path: Path) -> None:
    mine = usable_cores(tmp_path / "absent")
    quota = tmp_path / "cpu.max"
    for text, cores in (("max 100000\n", mine), ("50000 100000\n", 1), ("150000 100000\n", min(mine, 2))):
        quota.write_text(text)
        assert usable_cores(quota) == cores


# --- requests ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    folder = tmp_path_factory.mktemp("artifact")
    build_tokenizer().save_pretrained(folder)
    (folder / "labels.json").write_text(json.dumps({"names": LABELS}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(label_app, "open_runtime", lambda *_, **__: Lengths())
        server = label_app.LabelServer(folder, "m", "classify", LENGTH, "onnxruntime", 2)
    server.warm_up()
    yield TestClient(label_app.build(server))
    server.close()


def ask(client: TestClient, body: Any, path: str = "/classify") -> Any:
    answer = client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


PAIR = {"text": "apple", "pair": "pear"}


@pytest.mark.parametrize(
    ("body", "rows"),
    [
        ({"input": "apple pear"}, [[1, 4, 5, 2]]),
        ({"input": ["apple", "pear"]}, [[1, 4, 2], [1, 5, 2]]),
        ({"input": [1, 4, 2]}, [[1, 4, 2]]),
        ({"input": [[1, 4, 2], [1, 5, 2]]}, [[1, 4, 2], [1, 5, 2]]),
        ({"input": PAIR}, [[1, 4, 2, 5, 2]]),
        ({"input": ["pear", PAIR, {"text": "plum", "pair": None}]}, [[1, 5, 2], [1, 4, 2, 5, 2], [1, 6, 2]]),
        ({"text": "apple"}, [[1, 4, 2]]),
        ({**PAIR, "input": None}, [[1, 4, 2, 5, 2]]),
        ({"input": "apple " * 20}, [[1, *[4] * 6, 2]]),
        ({"input": "apple " * 20, "truncate_prompt_tokens": 4}, [[1, 4, 4, 2]]),
        ({"input": "apple", "add_special_tokens": False}, [[4]]),
        ({"prompt": "apple"}, [[1, 4, 2]]),
    ],
)  # fmt: skip
def test_inputs(client: TestClient, body: Any, rows: list[list[int]]) -> None:
    tokens = ask(client, body, "/tokenize")
    assert tokens == {"count": len(rows[0]), "max_model_len": LENGTH, "tokens": rows[0], "rows": rows}
    if "prompt" not in body:
        answer = ask(client, {"model": "m", **body})
        assert [item["index"] for item in answer["data"]] == list(range(len(rows)))
        assert answer["usage"]["prompt_tokens"] == answer["usage"]["total_tokens"] == sum(map(len, rows))
        sizes = [[len(one), one[0], 0] for one in rows]
        found = ask(client, {**body, "use_activation": False})["data"]
        assert [item["probs"] for item in found] == sizes


def test_the_answer_has_the_form_of_vllm(client: TestClient) -> None:
    answer = ask(client, {"input": "apple"})
    assert answer.keys() == {"id", "object", "created", "model", "data", "usage"}
    assert answer["object"] == "list" and answer["id"].startswith("classify-") and answer["model"] == "m"
    (item,) = answer["data"]
    assert item.keys() == {"index", "label", "probs", "num_classes", "score"}
    assert (item["label"], item["num_classes"]) == ("fruit", 3) and sum(item["probs"]) == pytest.approx(1)
    (named,) = ask(client, {"input": "apple", "top_k": 2})["data"]
    assert list(named["probabilities"]) == ["fruit", "tree"] and "probs" not in named


@pytest.mark.parametrize(
    "extra",
    [
        {"user": "me", "request_id": "1", "cache_salt": "s", "priority": 0, "padding": "do_not_pad"},
        {
            "truncation_side": "right",
            "truncate_prompt_tokens": -1,
            "mm_processor_kwargs": None,
            "add_special_tokens": True,
        },
        {"activation": True, "top_k": None, "encoding_format": "float"},
    ],
)
def test_what_changes_nothing_is_let_through(client: TestClient, extra: dict[str, Any]) -> None:
    assert ask(client, {"input": "apple", **extra})["data"] == ask(client, {"input": "apple"})["data"]


@pytest.mark.parametrize(
    ("body", "status", "param", "said"),
    [
        ({"input": "apple", "model": "other"}, 404, "model", "`other` does not exist; this server has `m`"),
        ({}, 400, "input", "either `input`, or its fields (`text`, `pair`)"),
        ({"input": "apple", "text": "pear"}, 400, "input", "either"),
        ({"input": []}, 400, "input", "empty list"),
        ({"input": ["apple", " "]}, 400, "input", "`input[1]`: text is empty"),
        ({"input": [["apple", "pear"]]}, 400, "input", "`input[0]` must be a text"),
        ({"input": {"txt": "apple"}}, 400, "input", "an object with the keys text, pair"),
        ({"input": {"pair": "apple"}}, 400, "input", "`input[0]`: has no text"),
        ({"input": 3}, 400, "input", "must be a text"),
        ({"input": [10**7]}, 400, "input", "not all in the vocabulary"),
        ({"input": "apple", "top_k": 0}, 400, "input", "top_k must be"),
        ({"input": "apple", "priority": 3}, 400, "priority", "`priority` is not supported"),
        ({"input": "apple", "truncation_side": "left"}, 400, "truncation_side", "not supported"),
        ({"messages": [{"role": "user", "content": "a"}]}, 400, "messages", "not conversations"),
        ([1], 400, None, "must be a JSON object"),
    ],
)
def test_what_is_refused_is_named(client: TestClient, body: Any, status: int, param: str | None, said: str) -> None:
    for path in ("/classify", "/tokenize"):
        answer = client.post(path, json=body)
        error = answer.json()["error"]
        assert (answer.status_code, error["code"], error["param"]) == (status, status, param) and said in error[
            "message"
        ]


@pytest.mark.parametrize("content", [b"{", b'{"input": NaN}', b"\xff", b'{"input": "a", "input": "b"}', b"[" * 100_000])
def test_bodies_that_are_not_json(client: TestClient, content: bytes) -> None:
    answer = client.post("/classify", content=content)
    assert answer.status_code == 400 and "the body is not JSON" in answer.json()["error"]["message"]


def test_a_failing_batch_is_an_internal_error(client: TestClient) -> None:
    build = build_tokenizer()
    assert len(build) < 99  # the id that makes the model fail is none of the tokenizer's
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Lengths, "logits", lambda *_: 1 / 0)
        answer = client.post("/classify", json={"input": "apple"})
    assert answer.status_code == 500 and "ZeroDivisionError" in answer.json()["error"]["message"]
    assert client.get("/health").status_code == 200


def test_status(client: TestClient) -> None:
    ask(client, {"input": ["apple", "pear"]})
    (entry,) = client.get("/v1/models").json()["data"]
    assert (entry["id"], entry["max_model_len"]) == ("m", LENGTH)
    figures = dict(line.rsplit(" ", 1) for line in client.get("/metrics").text.splitlines() if not line.startswith("#"))
    assert float(figures["qkit_texts_total"]) >= 2 and float(figures['qkit_requests_total{status="400"}']) > 0
    assert float(figures["qkit_rows_waiting"]) == float(figures["qkit_rows_running"]) == 0
    assert float(figures["qkit_batch_rows_count"]) > 0 and float(figures["qkit_request_seconds_count"]) > 0


def test_the_task_names_its_endpoint() -> None:
    assert open_task("classify").ENDPOINT == "/classify" and not open_task("chat").ENDPOINT
