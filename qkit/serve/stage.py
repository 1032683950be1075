"""The serve stage of a run: a server for the stages that follow."""

from __future__ import annotations

import os
from pathlib import Path

from qkit.core.device import detect
from qkit.core.files import write_json
from qkit.run.directory import Peak, Run
from qkit.runtimes import vllm
from qkit.serve.lifecycle import ready


def run(run: Run, out: Path) -> Peak:
    """Serve for the other stages of `qkit run` until it closes this process's standard input. Returns the server's peak memory."""
    section = run.recipe.serve.model_copy(update={"port": 0, "host": "127.0.0.1"})
    log = run.log("serve").with_name("vllm.log")
    log.unlink(missing_ok=True)
    with ready(vllm.start(run.need("export", "vllm"), run.root.name, section, detect(), log)) as running:
        write_json(out / "server.json", running.describe())  # verify and bench find the server by this file
        while os.read(0, 4096):
            continue
        peak_bytes = running.meter.sample()
    return Peak(peak_bytes, "rss_tree")
