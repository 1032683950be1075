"""Benches models with labels: a request is one text of the test split, from text to answer, tokenizing included.

A runtime in this process takes as many texts at once as there are clients, and all wait for the last; a server gets each from a client of its
own. In a record an answer counts as one output token, so rates of output tokens are texts per second (`unit` says so), and the time to the
first token is that to the answer.
"""

from __future__ import annotations

import http.client
import json
import os
import random
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from qkit.bench.load import HELD_OUT, Load, Subject
from qkit.bench.record import Repeat, Request
from qkit.core.device import detect
from qkit.core.errors import DataError, MissingArtifact, ServerError, short
from qkit.measure import held_out as measure_held_out
from qkit.measure.artifacts import artifacts, best_export, open_artifact
from qkit.model.provenance import Purpose
from qkit.plugins.exporter import exporter
from qkit.plugins.runtime import Encodes
from qkit.plugins.task import Prepared, Service, Task, open_task
from qkit.recipe.registry import MERGED, is_unmerged
from qkit.recipe.schema import LABEL_SERVER, Recipe
from qkit.run.directory import Run
from qkit.server.labels import program
from qkit.server.process import Server

TEXTS = "texts"  # the unit of a record
RUNTIME = "onnxruntime"  # of the server
OPEN_LOOP_CLIENTS = 64
REQUEST_SECONDS = 120.0
ERROR_CHARACTERS = 300


def default_runtimes(recipe: Recipe) -> list[str]:
    """What `qkit bench RUN` measures where the recipe names nothing: the merged model, every export, and the server."""
    exports = [name for name in recipe.export.formats if exporter(name).RUNTIME == RUNTIME]
    merged = [] if is_unmerged(recipe) else ["transformers"]
    return [*merged, *exports, *([LABEL_SERVER] if exports else [])]


@contextmanager
def opened(run: Run, name: str) -> Iterator[Subject]:
    """Open an artifact of bench.runtimes, or start the server.

    Raises:
        DataError: there are no held-out rows to take texts from.
        MissingArtifact: the run does not have the artifact.
    """
    task = open_task(run.recipe.task)
    records = measure_held_out.held_out_of(run).records
    if not records:
        raise DataError("data.test has no rows, so there are no texts to bench with; add a source to data.test")
    requests = [task.request(record, {}) for record in records]
    with _served(run, task, requests) if name == LABEL_SERVER else _direct(run, task, name, requests) as subject:
        yield subject


@contextmanager
def _direct(run: Run, task: Task, name: str, requests: Sequence[Mapping[str, Any]]) -> Iterator[Subject]:
    made = {artifact.name: artifact for artifact in artifacts(run)}
    artifact = made.get(MERGED if name == "transformers" else name)
    if artifact is None:
        raise MissingArtifact(f"{run.root}: bench.runtimes has {short(name)}, and the run has no such artifact")
    begin = time.perf_counter()
    service = _service(run, task, artifact.path)
    with open_artifact(run, artifact, "bench") as runtime:
        source = DirectTexts(service, runtime, requests)
        startup = time.perf_counter() - begin
        yield Subject(artifact.name, artifact, source, os.getpid(), startup, None, runtime.memory_bytes, detect().meter)


@contextmanager
def _served(run: Run, task: Task, requests: Sequence[Mapping[str, Any]]) -> Iterator[Subject]:
    artifact = best_export(run, RUNTIME)
    if artifact is None:
        raise MissingArtifact(f"{run.root}: no export passed its gate, so there is nothing to serve")
    recipe = run.recipe
    section = recipe.serve.model_copy(update={"port": 0, "host": "127.0.0.1"})
    log = run.log("bench").with_name("bench-server.log")
    log.unlink(missing_ok=True)
    purpose = Purpose(recipe.task, recipe.data.max_length)
    server = program.start(artifact.path, run.root.name, purpose, section, log)
    try:
        server.wait()
        lengths = _lengths(_service(run, task, artifact.path), requests)
        source = ServedTexts(server, task.ENDPOINT, requests, lengths, recipe.seed)
        yield Subject(
            LABEL_SERVER, artifact, source, server.child.pid, server.startup_seconds, server.argv, server.meter.sample,
            "rss_tree",
        )  # fmt: skip
    finally:
        server.stop()


def _service(run: Run, task: Task, folder: Path) -> Service:
    service = task.service(folder, run.recipe.data.max_length)
    assert service is not None, run.recipe.task
    return service


def _lengths(service: Service, requests: Sequence[Mapping[str, Any]]) -> list[int]:
    """Tokens of each text, as the server cuts it."""
    return [one.tokens if isinstance(one, Prepared) else 0 for one in service.prepare(requests)]


def _part(requests: Sequence[Any], load: Load, number: int) -> list[Any]:
    """The texts of a repeat. Repeats use different ones until all are used; then they start over."""
    return [requests[(number * load.requests + i) % len(requests)] for i in range(load.requests)]


class DirectTexts:
    """A runtime in this process; `concurrency` texts at once, one batch after the other. There is no queue."""

    name = "direct"
    command: list[str] | None = None
    queues = False
    description = HELD_OUT

    def __init__(self, service: Service, runtime: Encodes, requests: Sequence[Mapping[str, Any]]):
        self.service, self.runtime, self.requests = service, runtime, requests

    def measure(self, load: Load, number: int) -> Repeat:
        """Answer the texts of a repeat."""
        size, texts = load.concurrency or 1, _part(self.requests, load, number)
        done: list[Request] = []
        begin = time.perf_counter()
        for first in range(0, len(texts), size):
            start = time.perf_counter()
            prepared = [one for one in self.service.prepare(texts[first : first + size]) if isinstance(one, Prepared)]
            logits = iter(self.runtime.logits([row for one in prepared for row in one.rows]))
            for one in prepared:
                self.service.answer(one, [next(logits) for _ in one.rows])
            seconds = time.perf_counter() - start
            done += [Request(seconds, (), one.tokens, 1) for one in prepared]
        return Repeat(time.perf_counter() - begin, tuple(done))


class ServedTexts:
    """Clients of a server, each in a thread with a connection of its own, and one text in each request."""

    name = "qkit"
    command: list[str] | None = None
    queues = True
    description = HELD_OUT

    def __init__(
        self, server: Server, endpoint: str, requests: Sequence[Mapping[str, Any]], lengths: Sequence[int], seed: int
    ):
        """`lengths`: tokens of each text; they are counted with the server's tokenizer."""
        bodies = [json.dumps({"model": server.name, **request}).encode() for request in requests]
        self.sent = list(zip(bodies, lengths, strict=True))
        self.address, self.endpoint = urlsplit(server.url).netloc, endpoint
        self.headers = {"Content-Type": "application/json", **server.headers}
        self.seed = seed

    def measure(self, load: Load, number: int) -> Repeat:
        """Send the texts of a repeat.

        Raises:
            ServerError: the server refused every request.
        """
        texts, arrivals = _part(self.sent, load, number), self._arrivals(load, number)
        turn, done, errors, cpu = count(), list[Request](), list[str](), list[float]()
        begin = time.perf_counter()

        def client() -> None:
            before = time.thread_time()
            connection = http.client.HTTPConnection(self.address, timeout=REQUEST_SECONDS)
            while (place := next(turn)) < len(texts):
                start = begin + arrivals[place] if arrivals else time.perf_counter()
                time.sleep(max(0.0, start - time.perf_counter()))
                body, tokens = texts[place]
                error = self._send(connection, body)
                seconds = time.perf_counter() - start  # in an open loop since the arrival, also if no client was free
                errors.append(error) if error else done.append(Request(seconds, (), tokens, 1))
            connection.close()
            cpu.append(time.thread_time() - before)

        threads = [threading.Thread(target=client) for _ in range(load.concurrency or OPEN_LOOP_CLIENTS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if not done:
            raise ServerError(f"{self.address} failed every request: {errors[0]}", reason=errors[0])
        return Repeat(time.perf_counter() - begin, tuple(done), tuple(errors), sum(cpu))

    def _arrivals(self, load: Load, number: int) -> list[float]:
        """Seconds of a Poisson process; none in a closed loop."""
        if load.request_rate is None:
            return []
        rng, now, times = random.Random(self.seed + number), 0.0, []
        for _ in range(load.requests):
            now += rng.expovariate(load.request_rate)
            times.append(now)
        return times

    def _send(self, connection: http.client.HTTPConnection, body: bytes) -> str:
        """Send a request and read the answer; returns what went wrong."""
        try:
            connection.request("POST", self.endpoint, body, self.headers)
            answer = connection.getresponse()
            text = answer.read()
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            return f"{type(error).__name__}: {error}"
        return "" if answer.status == 200 else f"{answer.status}: {text.decode(errors='replace')[:ERROR_CHARACTERS]}"
