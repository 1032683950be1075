"""`qkit serve` in a process of its own, as a deployer starts it, for the tests of what it serves."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.parse
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest

KEY = "a-key-of-the-tests"
TURNS: Any = [{"role": "user", "content": "say a"}]
IDLE_SECONDS = 6  # uvicorn and vLLM close a connection after 5, unless they are told otherwise
BUSY_SECONDS = 10  # what takes well below one on a machine of one's own


@dataclass
class Served:
    """A `qkit serve` that is ready, and what it said of itself."""

    process: subprocess.Popen[bytes]
    told: dict[str, Any]
    stderr: Path

    @property
    def url(self) -> str:
        return str(self.told["url"])

    @property
    def model(self) -> str:
        return str(self.told["model"])

    def client(self, key: str = KEY) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=60)

    def below(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def wait_for(self, text: str, seconds: float) -> float:
        """Seconds until stderr has `text`."""
        begin = time.monotonic()
        while text not in self.stderr.read_text():
            assert time.monotonic() - begin < seconds, self.stderr.read_text()
            time.sleep(0.02)
        return time.monotonic() - begin


@contextmanager
def serving(folder: Path, *arguments: object, env: dict[str, str] | None = None) -> Iterator[Served]:
    """Start it, wait until it is ready; kill what is left of it at the end."""
    out, err = folder / "stdout", folder / "stderr"
    words = [str(argument) for argument in arguments]
    place = words.index("--") if "--" in words else len(words)
    own = ["--json", "--set", "serve.port=0"]
    command = [sys.executable, "-m", "qkit", "serve", *words[:place], *own, *words[place:]]
    with out.open("wb") as stdout, err.open("wb") as stderr:
        process = subprocess.Popen(
            command,
            stdout=stdout,
            stderr=stderr,
            env={**os.environ, "VLLM_API_KEY": KEY, "QKIT_CACHE": str(folder / "cache"), **(env or {})},
        )
    try:
        while not out.read_text().endswith("}\n"):
            assert process.poll() is None, err.read_text()
            time.sleep(0.05)
        yield Served(process, json.loads(out.read_text()), err)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
        process.wait()


def wait_for_drain(served: Served) -> dict[str, Any]:
    """What /health says as soon as it says that the server drains."""
    deadline = time.monotonic() + 10
    while (answer := httpx.get(f"{served.url}/health")).status_code == 200:
        assert time.monotonic() < deadline
    told: dict[str, Any] = answer.json()
    return told


def asking(model: str) -> Callable[..., Any]:
    """How a test asks the model of this name: greedy and short, unless it says otherwise."""

    def chat(client: openai.OpenAI, **asked: Any) -> Any:
        return client.chat.completions.create(
            **{"model": model, "messages": TURNS, "max_tokens": 8, "temperature": 0, **asked}
        )

    return chat


def check_streams_alike(chat: Callable[..., Any], client: openai.OpenAI) -> None:
    """A stream says what the whole answer says, with the same usage."""
    chunks = list(chat(client, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    whole = chat(client)
    assert text == whole.choices[0].message.content and chunks[-1].usage == whole.usage


def at_once(count: int, ask: Callable[[], Any]) -> list[Any]:
    """What `ask` gives, asked so many times at once: one after the other the first would be over before the last has been asked."""
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(lambda _: ask(), range(count)))


@contextmanager
def holding(served: Served, count: int, path: str = "/v1/completions") -> Iterator[None]:
    """So many requests that are let in and come to no end: the server waits for the rest of their bodies."""
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\nContent-Type: application/json\r\n"
    address = urllib.parse.urlsplit(served.url)
    with ExitStack() as stack:
        for _ in range(count):
            one = stack.enter_context(socket.create_connection((address.hostname, address.port)))
            one.sendall(f"{head}Content-Length: 100\r\n\r\n".encode())
        yield


def check_keeps_connections(served: Served) -> None:
    """A connection that has waited for longer than its client or a proxy would keep it is there still, not closed in a request's face."""
    limits = httpx.Limits(keepalive_expiry=60)
    ports = set()
    with httpx.Client(base_url=served.url, limits=limits, timeout=30) as client:
        for waits in (IDLE_SECONDS, 0):
            ports.add(client.get("/health").extensions["network_stream"].get_extra_info("client_addr"))
            time.sleep(waits)
    assert len(ports) == 1


def check_drains(served: Served, chat: Callable[..., Any], tokens: int, seconds: float, count: int = 6) -> None:
    """On SIGTERM what streams goes on to its end, new requests are refused, and the command ends well.

    One request is held open, so that the server drains for as long as the test looks, however fast it writes its answers.
    """
    asked: Any = {"stream": True, "max_tokens": tokens, "extra_body": {"ignore_eos": True}}
    with served.client() as client:
        with holding(served, 1):
            streams = at_once(count, lambda: chat(client, **asked))
            served.process.send_signal(signal.SIGTERM)
            assert wait_for_drain(served)["in_flight"] > 0
            with pytest.raises(openai.InternalServerError, match="shutting down"):
                chat(client)
        assert [list(stream)[-1].choices[0].finish_reason for stream in streams] == ["length"] * count
        assert served.process.wait(timeout=seconds) == 0


def wait_for_nobody(served: Served, gauge: str) -> None:
    """Until the server says that no request is running."""
    deadline = time.monotonic() + 10
    while figure(served, gauge) > 0:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def figure(served: Served, name: str) -> float:
    """A figure of /metrics, with these labels or over all."""
    lines = [line.rpartition(" ") for line in httpx.get(f"{served.url}/metrics").text.splitlines()]
    return sum(float(value) for series, _, value in lines if name in (series, series.partition("{")[0]))
