"""A program that serves a model over HTTP: started below a guard, waited for, watched, drained and ended.

What vLLM 0.32 does on SIGTERM by itself is not enough. Without --shutdown-timeout it cuts every answer off with an error. With it, /health
stays 200 for as long as it waits, new requests get status 500, and answers under way get no token more, nor an end. So requests are
counted at the door (`qkit.admission`), and SIGTERM is sent when none is left.
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


ENGINE_TITLE = "VLLM::"  # how vLLM's processes that hold the model call themselves
HEALTH_SECONDS = 2.0  # timeout of a request to /health while the server starts
WARM_UP_TOKENS = 64
WARM_UP_SECONDS = 300.0
LAST_WORDS_SECONDS = 0.6  # for the log to tell a cause, once the end is seen


@dataclass(frozen=True)
class Program:
    """What is started. `title`: its name in messages. `env` may hold the API key, so it is in no description of this."""

    title: str
    argv: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict, repr=False)


def limits(section: Serve, drain_file: Path | str, key: str = "") -> dict[str, str]:
    """The environment that `qkit.admission` reads."""
    told = {
        admission.DRAIN_FILE: str(drain_file),
        admission.MAX_BODY_BYTES: str(section.max_body_bytes),
        admission.MAX_REQUESTS: str(section.max_requests),
        admission.DRAIN_SECONDS: str(section.drain_seconds),
    }
    return {**told, **({admission.API_KEY: key} if key else {})}


def free_port(section: Serve) -> int:
    """The port to listen on: a free one for 0.

    Raises:
        ServerError: the port is in use, or the address is not this machine's.
    """
    with socket.socket(socket.AF_INET6 if ":" in section.host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((section.host, section.port))
        except OSError as error:
            raise ServerError(
                f"{section.host}:{section.port} cannot be listened on: {error.strerror}; "
                "end the program that has it, or choose another port: --set serve.port=0 takes a free one"
            ) from None
        return int(probe.getsockname()[1])


def url_of(host: str, port: int) -> str:
    """Where a client on this machine reaches a server that listens on `host`."""
    near = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    return f"http://{near}:{port}"


class Server:
    """A server that we started. `wait` for it, then use `url`; `stop` leaves no process."""

    def __init__(self, program: Program, name: str, section: Serve, port: int, log: Path):
        self.program = program
        self.name = name
        self.section = section
        self.url = url_of(section.host, port)
        self.argv = list(program.argv)
        self.begin = time.perf_counter()
        self.startup_seconds = 0.0
        self.own: list[psutil.Process] = []
        self.engine: list[psutil.Process] = []
        self.read_from = (
            log.stat().st_size if log.exists() else 0
        )  # bytes of the log: what is before tells of another start
        self.folder = tempfile.TemporaryDirectory(prefix="qkit-serve-")
        self.drain_file = Path(self.folder.name) / "drain"
        told = limits(section, self.drain_file)
        self.child = Child(self.argv, log, {**told, **program.env})
        self.meter = TreeMeter(self.child.pid)

    def wait(self) -> None:
        """Until it answers, and has answered a first request.

        Raises:
            ServerError: it ended, or was not healthy in time; the end of its log is in the message.
        """
        with Client(self.url, timeout=HEALTH_SECONDS) as client:
            while not client.is_healthy():
                self._still_starting()
                time.sleep(0.1)
        self._warm_up()
        self.startup_seconds = time.perf_counter() - self.begin
        self.own, self.engine = _processes(self.child.pid)
        self.read_from = self.child.log.stat().st_size

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
        """One request with a prompt of some length.

        vLLM 0.32 on a CPU with AMX dies of an illegal instruction when its first prompt has a few tokens only and --enforce-eager
        spared it a warm-up of its own: its attention uses AMX before a matrix product has asked the system for it.
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
        """What a request must carry."""
        return bearer(self.program.env.get(admission.API_KEY))

    def ended(self) -> bool:
        """Whether the program is gone, or a process that holds the model; sooner than the guard has tidied up. Costs some 0.1 ms."""
        return not self.child.running() or not all(map(_lives, self.own)) or self._engine_is_gone()

    def _engine_is_gone(self) -> bool:
        return not all(map(_lives, self.engine))

    def ending(self, otherwise: object = "") -> str:
        """Why it ended, from what its log says since it was ready; its last words may come a little after its end."""
        deadline = time.monotonic() + LAST_WORDS_SECONDS
        while not (known := known_causes(log := self._log())) and time.monotonic() < deadline:
            time.sleep(0.05)
        silent = KILLED if self._engine_is_gone() and not error_lines(log) else ""
        return f"{known or otherwise or silent or explain(log)}\nlog: {self.child.log}"

    def _log(self) -> str:
        """What it has said since it was started or, once it was ready, since then."""
        with self.child.log.open("rb") as file:
            file.seek(self.read_from)
            return file.read().decode(errors="replace")

    def drain(self) -> int:
        """Refuse new requests, /health first, and wait for those in work. Returns how many the limit left unanswered."""
        return admission.drain(self.url, self.drain_file, self.section.drain_seconds, self.ended)

    def stop(self) -> None:
        self.meter.stop()
        self.child.stop()
        self.folder.cleanup()

    def describe(self) -> dict[str, Any]:
        """What another process needs in order to use this server."""
        return {
            "url": self.url,
            "model": self.name,
            "pid": self.child.pid,
            "argv": self.argv,
            "startup_seconds": self.startup_seconds,
        }


def _processes(pid: int) -> tuple[list[psutil.Process], list[psutil.Process]]:
    """The server's own process, which the guard `pid` has started; and those below it that hold the model, where they are others."""
    import psutil

    guard = psutil.Process(pid)
    below = guard.children(recursive=True)
    return guard.children(), [process for process in below if " ".join(process.cmdline()[:1]).startswith(ENGINE_TITLE)]


def _lives(process: psutil.Process) -> bool:
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
    """The key that requests must carry: from a file, else from VLLM_API_KEY; empty for none.

    Raises:
        ServerError: the file cannot be read, or holds no key that fits into a header.
    """
    try:
        key = file.read_text(encoding="utf-8").strip() if file else environment.get(admission.API_KEY, "")
    except (OSError, UnicodeDecodeError) as error:
        raise ServerError(f"{file}: the API key cannot be read: {error}") from None
    if (file and not key) or not key.isascii() or any(sign.isspace() for sign in key):
        raise ServerError(f"{file or admission.API_KEY}: a key is one word of ASCII; `openssl rand -hex 32` makes one")
    return key


KEY = admission.API_KEY
LOOPBACK = ("127.0.0.1", "::1", "localhost")


def need_key(host: str, key: str) -> None:
    """On an address that others reach, a key is required.

    Raises:
        ServerError: there is none.
    """
    if host not in LOOPBACK and not key:
        raise ServerError(
            f"serve.host={host} can be reached by others, so an API key is required: give --api-key-file FILE or set VLLM_API_KEY "
            "(`openssl rand -hex 32` makes one); on 127.0.0.1 none is needed"
        )


def command(options: Sequence[tuple[str, str]]) -> list[str]:
    """Options as a command line has them."""
    return [part for key, value in options for part in (f"--{key}", value)]
