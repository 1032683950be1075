"""A program that serves a model over HTTP: started below a guard, waited for, watched, drained and stopped.

vLLM 0.32 does not shut down gracefully on SIGTERM. Without --shutdown-timeout it breaks off every answer with an error. With it, /health
stays 200 during the wait, new requests get status 500, and current answers get neither more tokens nor an end. So `qkit.server.admission`
counts the requests, and SIGTERM is sent when none is left.
"""

from __future__ import annotations

import os
import socket
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qkit.core.errors import ServerError
from qkit.core.memory_meter import tree_rss_bytes
from qkit.core.process import Child
from qkit.recipe.schema import Serve
from qkit.server import admission
from qkit.server.client import Client, bearer
from qkit.server.log_causes import KILLED, error_lines, explain, known_causes

if TYPE_CHECKING:
    import psutil


ENGINE_TITLE = "VLLM::"  # the titles of the vLLM processes that hold the model begin with this
HEALTH_SECONDS = 2.0  # timeout of a request to /health while the server starts
WARM_UP_TOKENS = 64
WARM_UP_SECONDS = 300.0
LOG_FLUSH_SECONDS = 0.6  # the cause may be logged shortly after the exit


@dataclass(frozen=True)
class Program:
    """What is started. `title`: its name in messages. `env` may contain the API key, so `repr` omits it.

    `generates`: it needs a first request for text; a server of labels computes one itself before it listens.
    """

    title: str
    argv: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict, repr=False)
    generates: bool = True


def limits(section: Serve, drain_file: Path | str, key: str = "") -> dict[str, str]:
    """The environment variables that `qkit.server.admission` reads."""
    variables = {
        admission.DRAIN_FILE: str(drain_file),
        admission.MAX_BODY_BYTES: str(section.max_body_bytes),
        admission.MAX_REQUESTS: str(section.max_requests),
        admission.DRAIN_SECONDS: str(section.drain_seconds),
    }
    return {**variables, **({admission.API_KEY: key} if key else {})}


def free_port(section: Serve) -> int:
    """The port to listen on; for port 0, a free one.

    Raises:
        ServerError: the port is in use, or the address does not belong to this machine.
    """
    with socket.socket(socket.AF_INET6 if ":" in section.host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((section.host, section.port))
        except OSError as error:
            raise ServerError(
                f"cannot listen on {section.host}:{section.port}: {error.strerror}; "
                "stop the program that uses the port, or choose another one: --set serve.port=0 takes a free one"
            ) from None
        return int(probe.getsockname()[1])


def url_of(host: str, port: int) -> str:
    """The URL at which a client on this machine reaches a server that listens on `host`."""
    local = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    return f"http://{local}:{port}"


class Server:
    """A server that qkit has started. `wait` until it is ready, then use `url`. `stop` leaves no process behind."""

    def __init__(self, program: Program, name: str, section: Serve, port: int, log: Path):
        self.program = program
        self.name = name
        self.section = section
        self.url = url_of(section.host, port)
        self.argv = list(program.argv)
        self.begin = time.perf_counter()
        self.startup_seconds = 0.0
        self.processes: list[psutil.Process] = []
        self.engine: list[psutil.Process] = []
        self.log_offset = log.stat().st_size if log.exists() else 0  # earlier bytes are about earlier starts
        self.folder = tempfile.TemporaryDirectory(prefix="qkit-serve-")
        self.drain_file = Path(self.folder.name) / "drain"
        self.child = Child(self.argv, log, {**limits(section, self.drain_file), **program.env})
        self.meter = TreeMeter(self.child.pid)

    def wait(self) -> None:
        """Wait until the server is healthy and has answered a first request.

        Raises:
            ServerError: it has ended, or was not healthy in time. The message has the cause from its log.
        """
        with Client(self.url, timeout=HEALTH_SECONDS) as client:
            while not client.is_healthy():
                self._still_starting()
                time.sleep(0.1)
        if self.program.generates:
            self._warm_up()
        self.startup_seconds = time.perf_counter() - self.begin
        self.processes, self.engine = _processes(self.child.pid)
        self.log_offset = self.child.log.stat().st_size

    def _still_starting(self) -> None:
        if not self.child.running():
            raise ServerError(
                f"{self.program.title} ended while starting: {explain(self._log())}\nlog: {self.child.log}"
            )
        if time.perf_counter() - self.begin > self.section.startup_seconds:
            self.stop()
            raise ServerError(
                f"{self.program.title} was not healthy after {self.section.startup_seconds} s (serve.startup_seconds)\nlog: {self.child.log}"
            )

    def _warm_up(self) -> None:
        """Send a request whose prompt is not too short.

        vLLM 0.32 on a CPU with AMX crashes with an illegal instruction if its first prompt has only a few tokens and --enforce-eager has
        skipped its own warm-up: its attention uses AMX before a matrix product has requested AMX from the system.
        """
        tokens = min(WARM_UP_TOKENS, self.section.max_model_len // 2)
        body = {"model": self.name, "prompt": [1] * tokens, "max_tokens": 1, "temperature": 0}
        try:
            with Client(self.url, self.headers, WARM_UP_SECONDS) as client:
                answer = client.send("POST", "/v1/completions", body)
        except ServerError as error:
            raise ServerError(
                f"{self.program.title} did not survive its first request: {self.ending(error.reason)}"
            ) from None
        if answer.status_code >= 500:
            raise ServerError(f"{self.program.title} failed at its first request: {self.ending(answer.text[:300])}")

    @property
    def headers(self) -> dict[str, str]:
        """The headers that a request needs."""
        return bearer(self.program.env.get(admission.API_KEY))

    def ended(self) -> bool:
        """Whether the program, or a process that holds the model, has ended; known before the guard has cleaned up. Takes about 0.1 ms."""
        return not self.child.running() or not all(map(_is_alive, self.processes)) or self._engine_is_gone()

    def _engine_is_gone(self) -> bool:
        return not all(map(_is_alive, self.engine))

    def ending(self, symptom: object = "") -> str:
        """Why the server ended: the cause in its log since it was ready, if it is a known one; otherwise `symptom`, or the last error."""
        deadline = time.monotonic() + LOG_FLUSH_SECONDS
        while not (known := known_causes(log := self._log())) and time.monotonic() < deadline:
            time.sleep(0.05)
        silent = KILLED if self._engine_is_gone() and not error_lines(log) else ""
        return f"{known or symptom or silent or explain(log)}\nlog: {self.child.log}"

    def _log(self) -> str:
        """The log since the server was ready; until then, since it was started."""
        with self.child.log.open("rb") as file:
            file.seek(self.log_offset)
            return file.read().decode(errors="replace")

    def drain(self) -> int:
        """Refuse new requests, and wait for the current ones. Returns how many were still running at the time limit."""
        return admission.drain(self.url, self.drain_file, self.section.drain_seconds, self.ended)

    def stop(self) -> None:
        self.meter.stop()
        self.child.stop()
        self.folder.cleanup()

    def describe(self) -> dict[str, Any]:
        """What another process needs to use this server."""
        return {
            "url": self.url,
            "model": self.name,
            "pid": self.child.pid,
            "argv": self.argv,
            "startup_seconds": self.startup_seconds,
        }


def _processes(pid: int) -> tuple[list[psutil.Process], list[psutil.Process]]:
    """The server's process, a child of the guard `pid`; and its descendants that hold the model, if there are any."""
    import psutil

    guard = psutil.Process(pid)
    below = guard.children(recursive=True)
    return guard.children(), [process for process in below if " ".join(process.cmdline()[:1]).startswith(ENGINE_TITLE)]


def _is_alive(process: psutil.Process) -> bool:
    import psutil

    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


class TreeMeter:
    """Peak resident bytes of a process and its descendants, sampled once a second."""

    def __init__(self, pid: int):
        self.pid = pid
        self.peak = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._ended.wait(1.0):
            self.sample()

    def sample(self) -> int:
        self.peak = max(self.peak, tree_rss_bytes(self.pid))
        return self.peak

    def stop(self) -> None:
        self._ended.set()
        self._thread.join()


def api_key(file: Path | None, environment: Mapping[str, str] = os.environ) -> str:
    """The key that requests need: from a file, otherwise from VLLM_API_KEY; empty if neither is set.

    Raises:
        ServerError: the file cannot be read, or its text cannot be sent in a header.
    """
    try:
        key = file.read_text(encoding="utf-8").strip() if file else environment.get(admission.API_KEY, "")
    except (OSError, UnicodeDecodeError) as error:
        raise ServerError(f"{file}: cannot read the API key: {error}") from None
    if (file and not key) or not key.isascii() or any(character.isspace() for character in key):
        raise ServerError(
            f"{file or admission.API_KEY}: the key must be one ASCII word without spaces; `openssl rand -hex 32` makes one"
        )
    return key


KEY = admission.API_KEY
LOOPBACK = ("127.0.0.1", "::1", "localhost")


def need_key(host: str, key: str) -> None:
    """Require a key if the server listens on an address that other machines can reach.

    Raises:
        ServerError: there is no key.
    """
    if host not in LOOPBACK and not key:
        raise ServerError(
            f"serve.host={host} is reachable from other machines, so an API key is required: use --api-key-file FILE or set VLLM_API_KEY "
            "(`openssl rand -hex 32` makes one); on 127.0.0.1 no key is needed"
        )


def command(options: Sequence[tuple[str, str]]) -> list[str]:
    """Options in the form of a command line."""
    return [part for key, value in options for part in (f"--{key}", value)]
