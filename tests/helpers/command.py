"""The command, and other programs, as processes of their own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest


def qkit(
    *arguments: object, env: Mapping[str, str] | None = None, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """`qkit` with these arguments; `env` is added to the environment."""
    command = [sys.executable, "-m", "qkit", *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=cwd, env={**os.environ, **(env or {})}
    )


def tool(name: str) -> str:
    """A program from a Python package next to this interpreter, or from the system."""
    installed = Path(sys.executable).with_name(name)
    program = str(installed) if installed.exists() else shutil.which(name)
    if program is None:
        pytest.skip(f"{name} is not installed")
    return program
