"""The server of a model with labels: `python -m qkit.server.labels.app --model FOLDER --task classify --max-length 256`.

    POST /classify (the endpoint of the task)   the answers to one text or many; a client of vLLM's /classify can send what it sends there
    POST /tokenize                              the token ids of such a request
    GET  /health, /metrics, /v1/models

Texts are cut at the length of training. engine.py says how rows are batched.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from qkit.core.device import detect
from qkit.core.strict_json import decode
from qkit.plugins.example import RowError
from qkit.plugins.runtime import open_runtime
from qkit.plugins.task import Prepared, open_task
from qkit.server import http_app
from qkit.server.labels.engine import Engine, EngineError, usable_cores
from qkit.server.labels.requests import INPUT, requests_of
from qkit.server.refusal import Refused

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128)
WATCH_SECONDS = 1.0  # between looks whether a client that waits is still there


class LabelServer:
    """The model with its service, engine and metrics."""

    def __init__(self, folder: Path, name: str, task: str, max_length: int, runtime: str, threads: int):
        self.folder, self.name = folder, name
        self.task_name = task
        self.task, device = open_task(task), replace(detect(), cores=threads)
        service = self.task.service(folder, max_length)
        assert service is not None, task
        self.service = service
        self.runtime = open_runtime(runtime, folder, device, head=self.task.HEAD)
        self.engine = Engine(self.runtime, threads)
        # One thread: a tokenizer holds the settings of its last call, and must not get two at once
        self.tokenizing = ThreadPoolExecutor(1, thread_name_prefix="tokenizer")
        self.metrics = Metrics(self.engine)

    async def prepared(self, body: Any) -> list[Prepared]:
        """The requests in a body, as rows.

        Raises:
            Refused: one of them cannot be answered; the message names it.
        """
        requests = requests_of(body, self.service, self.name)
        loop = asyncio.get_running_loop()
        results = await loop.run_in_executor(self.tokenizing, self.service.prepare, requests)
        for number, result in enumerate(results):
            if isinstance(result, RowError):
                raise Refused(f"`{INPUT}[{number}]`: {result}", INPUT)
        return [result for result in results if isinstance(result, Prepared)]

    async def answers(self, prepared: Sequence[Prepared], connection: Request) -> list[dict[str, Any]]:
        """The answer to each request. The computation ends when the client disconnects."""
        rows = [row for one in prepared for row in one.rows]
        logits = iter(await _while_connected(self.engine.logits(rows), connection))
        return [self.service.answer(one, [next(logits) for _ in one.rows]) for one in prepared]

    def warm_up(self) -> None:
        """Compute the task's example, so that the first request does not wait for what the runtime does once."""
        for one in self.service.prepare([self.task.EXAMPLE]):
            if isinstance(one, Prepared):
                list(self.runtime.logits(one.rows))

    def close(self) -> None:
        """End the threads, and free the weights."""
        self.engine.close()
        self.tokenizing.shutdown()
        self.runtime.close()


async def _while_connected(logits: Any, connection: Request) -> list[NDArray[np.float32]]:
    computing = asyncio.ensure_future(logits)
    try:
        while not (await asyncio.wait([computing], timeout=WATCH_SECONDS))[0]:
            if await connection.is_disconnected():
                raise Refused("the client has disconnected", status=499)
        results: list[NDArray[np.float32]] = computing.result()
        return results
    except EngineError as error:
        raise Refused(str(error), status=500) from error
    finally:
        computing.cancel()


class Metrics:
    """The metrics at /metrics, in Prometheus' text format."""

    def __init__(self, engine: Engine):
        self.engine = engine
        self.registry = CollectorRegistry()
        common: dict[str, Any] = {"registry": self.registry, "namespace": "qkit"}
        self.requests = http_app.request_counter(self.registry)
        self.texts = Counter("texts", "Texts answered", **common)
        self.prompt_tokens = Counter("prompt_tokens", "Tokens read", **common)
        self.seconds = Histogram("request_seconds", "From the request to its answer", buckets=SECONDS, **common)
        self.batches = Histogram("batch_rows", "Rows of a batch", buckets=ROWS, **common)
        Gauge("rows_running", "In the runtime", **common).set_function(lambda: engine.running)
        Gauge("rows_waiting", "Before the runtime", **common).set_function(lambda: engine.waiting)

    def answered(self, prepared: Sequence[Prepared], seconds: float) -> None:
        """Count a request that was answered."""
        self.requests.labels(200).inc()
        self.texts.inc(len(prepared))
        self.prompt_tokens.inc(sum(one.tokens for one in prepared))
        self.seconds.observe(seconds)
        for rows in self.engine.sizes():
            self.batches.observe(rows)


def build(server: LabelServer) -> FastAPI:
    """The application, without the admission control that `main` wraps around it."""
    app, metrics = http_app.new_app(), server.metrics
    http_app.add_status_routes(app, metrics.registry, lambda: True, lambda: _model_entry(server))

    @app.post(server.task.ENDPOINT)
    async def answer(request: Request) -> Response:
        begin = time.perf_counter()
        prepared = await server.prepared(await _body(request))
        answers = await server.answers(prepared, request)
        metrics.answered(prepared, time.perf_counter() - begin)
        return JSONResponse(_document(server, prepared, answers))

    @app.post("/tokenize")
    async def tokenize(request: Request) -> dict[str, Any]:
        """The token ids of a request's rows; `tokens` are those of the first."""
        body = await _body(request)
        if isinstance(body, dict) and "prompt" in body:  # as vLLM's /tokenize names it
            body = {INPUT: body["prompt"], **{name: value for name, value in body.items() if name != "prompt"}}
        rows = [row.input_ids for one in await server.prepared(body) for row in one.rows]
        return {"count": len(rows[0]), "max_model_len": server.service.max_length, "tokens": rows[0], "rows": rows}

    http_app.handle_errors(app, metrics.requests)
    return app


async def _body(request: Request) -> Any:
    try:
        return decode((await request.body()).decode())
    except (ValueError, RecursionError) as error:
        raise Refused(f"the body is not JSON: {error}") from None


def _model_entry(server: LabelServer) -> dict[str, Any]:
    entry = {"id": server.name, "root": str(server.folder), "max_model_len": server.service.max_length}
    return {**entry, "task": server.task_name}


def _document(server: LabelServer, prepared: Sequence[Prepared], answers: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The answers in the form of vLLM's."""
    tokens = sum(one.tokens for one in prepared)
    usage = {"prompt_tokens": tokens, "total_tokens": tokens, "completion_tokens": 0, "prompt_tokens_details": None}
    return {
        "id": f"{server.task.ENDPOINT.strip('/')}-{uuid.uuid4().hex}",
        "object": "list",
        "created": int(time.time()),
        "model": server.name,
        "data": [{"index": number, **answer} for number, answer in enumerate(answers)],
        "usage": usage,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the server. The options have the names that vLLM gives them, where it has them."""
    parser = http_app.parser("qkit.server.labels.app", __doc__)
    parser.add_argument("--task", required=True)
    parser.add_argument("--max-length", type=int, required=True)
    parser.add_argument("--runtime", default="onnxruntime")
    parser.add_argument("--threads", type=int, default=usable_cores())
    options = parser.parse_args(arguments)
    server = LabelServer(
        options.model, options.served_model_name, options.task, options.max_length, options.runtime, options.threads
    )
    server.warm_up()
    http_app.run(build(server), options.host, options.port, [server.close])


if __name__ == "__main__":
    main()
