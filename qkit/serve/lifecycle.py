"""A server from start to end: restarted when it dies, drained when it is stopped."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from typing import TYPE_CHECKING

from qkit.core.errors import MissingExtra, ServerError
from qkit.core.files import make_folder
from qkit.measure import label_contract
from qkit.runtimes import vllm
from qkit.serve.fits import ONNX_SEQS
from qkit.server import process
from qkit.server.labels import program as labels_program
from qkit.server.process import Server

if TYPE_CHECKING:
    from qkit.serve.request import Serving


ONNX_NEEDS = ("onnxruntime_genai", "fastapi", "uvicorn", "prometheus_client", "transformers")
BACK_OFF_SECONDS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0)  # before the first, second ... restart
STEADY_SECONDS = 600.0  # after a server has run this long, the waits start again with the shortest
WATCH_SECONDS = 0.2


@contextmanager
def ready(running: Server) -> Iterator[Server]:
    """Wait until the server answers; afterwards, none of its processes is left."""
    try:
        running.wait()
        yield running
    finally:
        running.stop()


# --- starting and ending ------------------------------------------------------------------------------------------------


def start(serving: Serving) -> Server:
    """Start the server. It is not ready yet when this returns.

    Raises:
        MissingExtra: a package of the runtime is missing.
        ServerError: the port is in use.
    """
    section = serving.section
    if serving.runtime == "vllm":
        return vllm.start(serving.model, serving.name, section, serving.device, serving.log, serving.extras)
    extras = serving.extras
    if serving.purpose is not None and serving.runtime != "vllm":
        return labels_program.start(
            serving.model, serving.name, serving.purpose, section, serving.log, extras.key, extras.rest
        )
    if missing := [name for name in ONNX_NEEDS if find_spec(name) is None]:
        raise MissingExtra(f"--runtime onnxruntime needs {', '.join(missing)}: pip install 'qkit[onnx]'")
    port = process.free_port(section)
    program = process.Program("the ONNX server", tuple(onnx_argv(serving, port)), {process.KEY: extras.key})
    return Server(program, serving.name, section, port, serving.log)


def onnx_argv(serving: Serving, port: int) -> list[str]:
    """The command line of qkit's own server, whose options have vLLM's names."""
    section = serving.section
    options = [
        ("model", serving.model),
        ("served-model-name", serving.name),
        ("host", section.host),
        ("port", str(port)),
        ("max-model-len", str(section.max_model_len)),
        ("max-num-seqs", str(section.max_num_seqs or ONNX_SEQS)),
    ]
    return [sys.executable, "-m", "qkit.server.onnx_app", *process.command(options), *serving.extras.rest]


def argv(serving: Serving, port: int) -> list[str]:
    """The command line that `start` runs."""
    purpose = serving.purpose
    if purpose is not None and serving.runtime != "vllm":
        return labels_program.argv(serving.model, serving.name, purpose, serving.section, port, serving.extras.rest)
    if serving.runtime != "vllm":
        return onnx_argv(serving, port)
    return vllm.argv(serving.model, serving.name, serving.section, port, serving.device, serving.extras)


class Backoff:
    """The waits before restarts: longer after each failure, and short again after the server has run steadily."""

    def __init__(self) -> None:
        self.failures = 0

    def next_pause(self, uptime: float) -> float:
        """Seconds to wait after a server that was ready for `uptime` seconds."""
        self.failures = 1 if uptime > STEADY_SECONDS else self.failures + 1
        return BACK_OFF_SECONDS[min(self.failures, len(BACK_OFF_SECONDS)) - 1]


def serve(
    serving: Serving,
    ready: Callable[[Server], None],
    wait: Callable[[Server], None],
    restart: Callable[[str, float], None] | None = None,
) -> None:
    """Run a server until `wait` returns or raises, then drain and stop it. `ready` is called when it answers.

    `restart` is called when a server that was ready has ended by itself, with the reason and the seconds until the next start. Without it,
    the server is not restarted. A server that has never been ready is not restarted either: it would fail again.

    Raises:
        ServerError: the server ended by itself, or could not be started.
        ParityFailed: it handles conversations differently from training.
    """
    process.need_key(serving.section.host, serving.extras.key)
    fixed, backoff, was_ready = _with_port(serving), Backoff(), False
    make_folder(fixed.logs)
    fixed.log.unlink(missing_ok=True)
    while True:
        ready_at: float | None = None
        try:
            with _drained(start(fixed)) as running:
                keep_contract(fixed, running)
                ready_at, was_ready = time.monotonic(), True
                ready(running)
                wait(running)
                return
        except ServerError as error:
            if restart is None or not was_ready:
                raise
            pause = backoff.next_pause(0.0 if ready_at is None else time.monotonic() - ready_at)
            restart(str(error), pause)
            time.sleep(pause)


def keep_contract(serving: Serving, running: Server) -> None:
    """Check on held-out rows that a run's server makes the tokens of training, stops at the same ones or gives the same labels, and so on.

    Raises:
        ParityFailed: it differs.
    """
    if serving.run is None or not serving.contract:
        return
    label_contract.check_server(serving.run, running.url, running.name, running.headers).enforce()


def _with_port(serving: Serving) -> Serving:
    """With a fixed port, so that a restarted server keeps its address."""
    section = serving.section.model_copy(update={"port": process.free_port(serving.section)})
    return replace(serving, recipe=serving.recipe.model_copy(update={"serve": section}))


@contextmanager
def _drained(running: Server) -> Iterator[Server]:
    """A server that is ready. On exit it refuses new requests, gets time to finish the current ones, and is stopped."""
    with ready(running):
        try:
            yield running
        finally:
            running.drain()


def watch(running: Server) -> None:
    """Watch the server; never returns.

    Raises:
        ServerError: the server, or a process of its engine, has ended; within a second.
    """
    while not running.ended():
        time.sleep(WATCH_SECONDS)
    raise ServerError(f"{running.program.title} ended by itself: {running.ending()}")
