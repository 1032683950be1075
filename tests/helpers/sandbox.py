"""The environment of the tests: it holds before any module is imported, for fixtures of every scope, and for all processes that tests start."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

KEPT = {"QKIT_UPDATE_GOLDEN"}
# What someone may have set for their own use of qkit, or of the libraries below it.
CLEARED = ("HF_TOKEN", "HF_ENDPOINT", "VLLM_API_KEY")
_made: list[Path] = []


def enter(*, worker: bool) -> None:
    """`worker`: one of several processes that share the cores, so each computes with one thread."""
    folder = Path(tempfile.mkdtemp(prefix="qkit-tests-"))
    _made.append(folder)
    for name in [*CLEARED, *(name for name in os.environ if name.startswith("QKIT_") and name not in KEPT)]:
        os.environ.pop(name, None)
    os.environ |= {"QKIT_CACHE": str(folder / "cache"), "QKIT_DEVICE": "cpu", "HF_HUB_OFFLINE": "1"}
    if worker:
        os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}


def leave() -> None:
    while _made:
        shutil.rmtree(_made.pop(), ignore_errors=True)
