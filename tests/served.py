"""`qkit serve` in a process of its own, as a deployer starts it, for the tests of what it serves."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil

KEY = "a-key-of-the-tests"


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
