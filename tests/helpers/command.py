"""The command, as a process of its own or in this one, and other programs."""

from __future__ import annotations

import gc
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn
from unittest import mock

import pytest


def qkit(
    *arguments: object, env: Mapping[str, str] | None = None, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """`qkit` with these arguments; `env` is added to the environment."""
    command = [sys.executable, "-m", "qkit", *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=cwd, env={**os.environ, **(env or {})}
    )


def qkit_here(*arguments: object, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """The same in this process, from `main` on: what it prints, logs and exits with, without the seconds of its imports."""
    from qkit.cli.app import main

    words = ["qkit", *map(str, arguments)]
    with _streams() as written, mock.patch.object(sys, "argv", words), mock.patch.dict(os.environ, env or {}):
        code = _exit_code(main)
    assert isinstance(code, int)
    return subprocess.CompletedProcess(words, code, *(text.decode() for text in written))


def _exit_code(main: Callable[[], NoReturn]) -> object:
    """As where a process ends: it leaves files open, and `plan` turns garbage collection off."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        try:
            main()
        except SystemExit as end:
            code = end.code
        finally:
            gc.enable()
            gc.collect()
    return code


@contextmanager
def _streams() -> Iterator[list[bytes]]:
    """Standard output and error, as descriptors and as Python's files, into files; the list has what came when the block ends."""
    written: list[bytes] = []
    before, saved = (sys.stdout, sys.stderr), (os.dup(1), os.dup(2))
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        for number, file in ((1, out), (2, err)):
            before[number - 1].flush()
            os.dup2(file.fileno(), number)
        mine: list[Any] = [os.fdopen(os.dup(number), "w", buffering=1, encoding="utf-8") for number in (1, 2)]
        sys.stdout, sys.stderr = mine
        try:
            yield written
        finally:
            sys.stdout, sys.stderr = before
            for number, descriptor in ((1, saved[0]), (2, saved[1])):
                mine[number - 1].close()
                os.dup2(descriptor, number)
                os.close(descriptor)
            for file in (out, err):
                file.seek(0)
                written.append(file.read())


def tool(name: str) -> str:
    """A program from a Python package next to this interpreter, or from the system."""
    installed = Path(sys.executable).with_name(name)
    program = str(installed) if installed.exists() else shutil.which(name)
    if program is None:
        pytest.skip(f"{name} is not installed")
    return program
