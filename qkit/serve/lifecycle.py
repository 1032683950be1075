"""A server from its start to its end: started again when it dies, drained when it is stopped."""

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
from qkit.measure import contract
from qkit.runtimes import vllm
from qkit.serve.fits import ONNX_SEQS
from qkit.server import process
from qkit.server.process import Server

if TYPE_CHECKING:
    from qkit.serve.request import Serving


ONNX_NEEDS = ("onnxruntime_genai", "fastapi", "uvicorn", "prometheus_client", "transformers")
BACK_OFF_SECONDS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0)  # before the first, second ... start after an end
STEADY_SECONDS = 600.0  # a server that has run so long begins with the shortest wait again
WATCH_SECONDS = 0.2


@contextmanager
def ready(running: Server) -> Iterator[Server]:
    """Wait for it; none of its processes is left afterwards."""
    try:
        running.wait()
        yield running
    finally:
        running.stop()


# --- starting and ending ------------------------------------------------------------------------------------------------


def start(serving: Serving) -> Server:
    """Start the server; it is not ready yet.

    Raises:
        MissingExtra, ServerError: each says what to do.
    """
    section = serving.how.serve
    if serving.runtime == "vllm":
        return vllm.Server(serving.model, serving.name, section, serving.device, serving.log, serving.extras)
    if missing := [name for name in ONNX_NEEDS if find_spec(name) is None]:
        raise MissingExtra(f"--runtime onnxruntime needs {', '.join(missing)}: pip install 'qkit[onnx]'")
    port = process.free_port(section)
    program = process.Program("the ONNX server", tuple(onnx_argv(serving, port)), {process.KEY: serving.extras.key})
    return Server(program, serving.name, section, port, serving.log)


def onnx_argv(serving: Serving, port: int) -> list[str]:
    """The command line of qkit's own server, in vLLM's words."""
    section = serving.how.serve
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
    """The command line that would be started."""
    if serving.runtime != "vllm":
        return onnx_argv(serving, port)
    return vllm.argv(serving.model, serving.name, serving.how.serve, port, serving.device, serving.extras)


def serve(
    serving: Serving,
    ready: Callable[[Server], None],
    wait: Callable[[Server], None],
    restart: Callable[[str, float], None] | None = None,
) -> None:
    """Serve for a person: call `ready` when it answers, then `wait`, which returns or raises when it is to end; then drain and end it.

    `restart`: told why a server that was ready ended by itself, and how many seconds are waited before the next start; None: none follows.

    Raises:
        ServerError: it ended by itself, or could not be started.
        ParityFailed: it does not do with conversations what training did.
    """
    process.need_key(serving.how.serve.host, serving.extras.key)
    fixed, ends = _with_port(serving), 0
    make_folder(fixed.logs)
    fixed.log.unlink(missing_ok=True)
    while True:
        begin = 0.0
        try:
            with _drained(start(fixed)) as running:
                keep_contract(fixed, running)
                begin = time.monotonic()
                ready(running)
                wait(running)
                return
        except ServerError as error:
            if restart is None or not (begin or ends):  # one that was never ready would not be ready the next time
                raise
            ends = 1 if begin and time.monotonic() - begin > STEADY_SECONDS else ends + 1
            pause = BACK_OFF_SECONDS[min(ends, len(BACK_OFF_SECONDS)) - 1]
            restart(str(error), pause)
            time.sleep(pause)


def keep_contract(serving: Serving, running: Server) -> None:
    """See that a run's server makes the trained prompt tokens, stops where training stopped, and so on; on a few held-out rows.

    Raises:
        ParityFailed: it does not.
    """
    if serving.run is None or not serving.contract:
        return
    found = contract.check(serving.run, running.url, running.name, headers=running.headers)
    found.enforce()


def _with_port(serving: Serving) -> Serving:
    """With the port settled, so that a server that is started again is where it was."""
    section = serving.how.serve.model_copy(update={"port": process.free_port(serving.how.serve)})
    return replace(serving, how=serving.how.model_copy(update={"serve": section}))


@contextmanager
def _drained(running: Server) -> Iterator[Server]:
    """Ready inside; on the way out new requests are refused, those in work get their time, and no process is left."""
    with ready(running):
        try:
            yield running
        finally:
            running.drain()


def watch(running: Server) -> None:
    """Return only by an exception.

    Raises:
        ServerError: the server, or a process of its engine, is gone; within a second of it.
    """
    while not running.ended():
        time.sleep(WATCH_SECONDS)
    raise ServerError(f"{running.program.title} ended by itself: {running.ending()}")
