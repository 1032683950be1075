"""Starts the server of a model with labels as a program of its own."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from qkit.core.errors import MissingExtra
from qkit.model.provenance import Purpose
from qkit.recipe.schema import Serve
from qkit.server import process

NEEDS = ("onnxruntime", "onnx", "fastapi", "uvicorn", "prometheus_client", "transformers")


def argv(
    folder: Path | str, name: str, purpose: Purpose, section: Serve, port: int, rest: Sequence[str] = ()
) -> list[str]:
    """The command line. `rest`: further options, such as --threads 2."""
    options = [
        ("model", str(folder)),
        ("served-model-name", name),
        ("host", section.host),
        ("port", str(port)),
        ("task", purpose.task),
        ("max-length", str(purpose.max_length)),
    ]
    return [sys.executable, "-m", "qkit.server.labels.app", *process.command(options), *rest]


def start(
    folder: Path | str,
    name: str,
    purpose: Purpose,
    section: Serve,
    log: Path,
    key: str = "",
    rest: Sequence[str] = (),
) -> process.Server:
    """Start it. It is not ready yet when this returns.

    Raises:
        MissingExtra: a package is missing.
        ServerError: the port is in use.
    """
    if missing := [package for package in NEEDS if find_spec(package) is None]:
        raise MissingExtra(f"serving labels needs {', '.join(missing)}: pip install 'qkit[onnx]'", package=missing[0])
    port = process.free_port(section)
    command = tuple(argv(folder, name, purpose, section, port, rest))
    program = process.Program("the server of labels", command, {process.KEY: key}, generates=False)
    return process.Server(program, name, section, port, log)
