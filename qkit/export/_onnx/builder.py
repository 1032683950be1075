"""Runs the programs that make ONNX graphs, onnxruntime-genai's model builder first of all, and explains their failures.

Each is a process of its own, so that all that it allocates and patches is gone when it ends.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from qkit.core.errors import DoesNotFit, MissingExtra, NotDeployable
from qkit.core.process import run_to_end
from qkit.plugins.exporter import Job

BUILDER = "onnxruntime-genai's builder"
NEEDS = ("onnx", "onnx_ir", "onnxruntime", "onnxruntime_genai")
LEAVE_OUT = "Leave the onnx formats out of export.formats"
# For the CPU, the builder gives fp16 an attention without a shared cache; the graph that it makes for CUDA runs on both.
PROVIDERS = {"fp16": "cuda"}
OPTIONS = {"fp16": ("fuse_qk_norm_gqa=false",)}
# The last line of a traceback when the builder, or our own tracing program, does not support an architecture.
REFUSAL = re.compile(r"^(?:NotImplementedError|qkit\.core\.errors\.NotDeployable): (.*)", re.MULTILINE)
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# A full disk in a program's log: the system's message, or numpy's, which counts the items that it could write.
DISK_FULL_TEXT = re.compile(rf"{'|'.join(map(os.strerror, DISK_FULL))}|OSError: \d+ requested and \d+ written")
TAIL_LINES = 15


def need_builder() -> None:
    """Check that the builder can be run.

    Raises:
        MissingExtra: one of its packages is not installed.
    """
    if missing := [name for name in NEEDS if find_spec(name) is None]:
        raise MissingExtra(f"ONNX export requires {', '.join(missing)}: pip install 'qkit[onnx]'", package=missing[0])


def unknown_architecture(config: Mapping[str, Any]) -> str | None:
    """Return the architecture of a config.json if the builder is installed and does not support it, else None."""
    architecture = next(iter(config.get("architectures") or ()), None)
    supported = architectures()
    return architecture if supported and architecture not in supported else None


def architectures() -> frozenset[str]:
    """Return the architectures that the installed builder supports; empty if it is not installed.

    The builder offers no list: it compares `config.architectures[0]` with each name in a chain of `if`s. The names are read from its source
    by a regular expression, without an import, which would load torch. A version that spells the comparison differently gives an empty set,
    and then the builder itself refuses an architecture when it runs. tests/export/test_onnx.py checks the pinned version.
    """
    spec = find_spec("onnxruntime_genai")
    for folder in (spec and spec.submodule_search_locations) or ():
        source = Path(folder) / "models" / "builder.py"
        if source.is_file():
            return frozenset(re.findall(r'architectures\[0\] == "(\w+)"', source.read_text(encoding="utf-8")))
    return frozenset()


def build(job: Job, precision: str, options: Sequence[str], out: Path) -> None:
    """Run the builder on the merged model. `options`: its extra options, each as NAME=VALUE.

    Raises:
        NotDeployable: the builder does not support the architecture.
        DoesNotFit: the disk is full.
        RuntimeError: the builder failed otherwise; the message is the end of its log.
    """
    arguments = ["-m", str(job.merged), "-o", str(out), "-c", str(out.with_name("cache")), "-p", precision]
    arguments += ["-e", PROVIDERS.get(precision, "cpu")]
    if options := (*options, *OPTIONS.get(precision, ())):
        arguments += ["--extra_options", *options]
    run_program(["-m", "onnxruntime_genai.models.builder", *arguments], job.log, out, BUILDER)


def run_program(arguments: Sequence[str], log: Path, out: Path, title: str) -> None:
    """Run Python with these arguments to its end. `title`: the name of the program in messages; `out`: the folder that it writes.

    Raises:
        NotDeployable: the program does not support the architecture.
        DoesNotFit: the disk is full.
        RuntimeError: the program failed otherwise; the message is the end of its log.
    """
    status, text = run_to_end([sys.executable, *arguments], log, {"HF_HUB_OFFLINE": "1"})
    if not status:
        return
    tail = text.splitlines()[-TAIL_LINES:]
    if refusals := REFUSAL.findall(text):
        raise NotDeployable(f"{title}: {refusals[-1]} {LEAVE_OUT}")
    if any(map(DISK_FULL_TEXT.search, tail)):
        raise disk_full(out.parent)
    raise RuntimeError(f"{title} ended with status {status}:\n" + "\n".join(tail))


@contextmanager
def reporting_full_disk(folder: Path) -> Iterator[None]:
    """Turn the system's error for a full disk into one that tells the user what to do.

    Raises:
        DoesNotFit: the disk of `folder` became full inside the block.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        raise disk_full(folder) from error


def disk_full(folder: Path) -> DoesNotFit:
    """Return the error for a full disk."""
    free_bytes = shutil.disk_usage(folder).free
    return DoesNotFit(
        f"{folder}: the disk became full while an ONNX file was written. The partial files are removed, and {free_bytes / 2**20:,.0f} MiB are "
        "free. An export takes up to 4 bytes per weight for the file, and as much again while it is built",
        free_bytes=free_bytes,
    )
