"""The stage `serve`: start vLLM's server on the exported model, say where it is, stop it cleanly.

serve/server.json   url, argv, start-up seconds. What it answers is checked by `verify`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qkit import gates
from qkit.device import detect
from qkit.run import Peak, Run, write_json
from qkit.runtimes.vllm import Server


def run(run: Run, out: Path) -> Peak:
    """Serve for the other stages of `qkit run` until it closes our standard input. Returns the server's peak memory."""
    with server(run, port=0) as running:
        write_json(out / "server.json", running.describe())  # from now on verify and bench find it
        while os.read(0, 4096):
            continue
        peak_bytes = running.meter.sample()
    return Peak(peak_bytes, "rss_tree")


def serve(run: Run, ready: Callable[[Server], None], wait: Callable[[Server], None]) -> None:
    """Serve for a person: call `ready` when it answers, then `wait`, then stop it."""
    gates.check_served(run, "vllm")
    with server(run, port=run.recipe.serve.port) as running:
        ready(running)
        wait(running)


@contextmanager
def server(run: Run, port: int) -> Iterator[Server]:
    """A healthy server on the run's vllm export; none of its processes is left afterwards.

    Raises:
        MissingArtifact, MissingExtra, ServerError: each says what to do.
    """
    model = run.need("export", "vllm")
    section = run.recipe.serve.model_copy(update={"port": port})
    running = Server(model, run.root.name, section, detect(), run.log("serve").with_name("vllm.log"))
    try:
        running.wait()
        yield running
    finally:
        running.stop()


def curl(running: Server) -> str:
    """A line to paste into a shell."""
    body = f'{{"model": "{running.name}", "messages": [{{"role": "user", "content": "Hello"}}], "max_tokens": 64}}'
    return f"curl {running.url}/v1/chat/completions -H 'Content-Type: application/json' -d '{body}'"


def describe(running: Server) -> dict[str, Any]:
    """The same, for `--json`."""
    return {**running.describe(), "curl": curl(running)}
