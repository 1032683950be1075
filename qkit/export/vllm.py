"""The folder that vLLM loads: the merged model's files, hard-linked, so that it costs no disk."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qkit.errors import NotDeployable
from qkit.export._job import Job
from qkit.recipe import Recipe

VARIANTS = {"": "the merged model in 16 bit"}
QUANTIZED: frozenset[str] = frozenset()
RUNTIME = "vllm"


def export(job: Job, out: Path, variant: str) -> None:
    """Make `out` from the merged model.

    Raises:
        NotDeployable: there is no such variant.
    """
    if variant not in VARIANTS:
        raise NotDeployable(f"export format vllm-{variant}: there is only `vllm`, the merged model in 16 bit")
    out.mkdir(parents=True)
    for file in job.merged.iterdir():
        if file.is_file():
            _link(file, out / file.name)


def unsupported(variant: str, recipe: Recipe, config: Mapping[str, Any]) -> str | None:
    """Nothing is known against a merged model."""
    return None


def _link(source: Path, target: Path) -> None:
    """A hard link for weights; a copy for the rest, which people edit, and where links do not work."""
    if source.suffix == ".safetensors":
        try:
            os.link(source, target)
            return
        except OSError:
            pass  # another file system, or one without links: a copy serves as well
    shutil.copyfile(source, target)
