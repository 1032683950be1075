"""ONNX files with a key-value cache, made by onnxruntime-genai's model builder from the merged model.

The builder is a program of its own: what it allocates and patches goes when it ends.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from qkit.child import death_wish
from qkit.errors import MissingExtra, NotDeployable
from qkit.export._job import Job
from qkit.recipe import Recipe

# The builder's arguments. Of its int4 settings that stay within about 1.3 times the smallest file, k_quant_mixed is the
# nearest to the model it is made from: the head, and the layers that suffer most, keep 8 bits.
ARGUMENTS: Mapping[str, Sequence[str]] = {
    "fp32": ("-p", "fp32"),
    "int4": ("-p", "int4", "--extra_options", "algo_config=k_quant_mixed"),
}
VARIANTS = {"fp32": "as exact as the merged model", "int4": "k-quants, the widest layers in 8 bit"}
QUANTIZED = frozenset({"int4"})
RUNTIME = "onnxruntime"
NEEDS = ("onnx", "onnx_ir", "onnxruntime", "onnxruntime_genai")
TEXTS = ("*.json", "*.jinja", "*.model", "*.txt")  # what a model folder holds beside its weights
REFUSAL = "NotImplementedError: "  # how the builder says that it does not know an architecture
TAIL_LINES = 15


def export(job: Job, out: Path, variant: str) -> None:
    """Make the ONNX folder `out` from the merged model; the builder's output is appended to the job's log.

    Raises:
        NotDeployable: there is no such variant, or the builder does not know the architecture.
        MissingExtra: the builder is not installed.
        RuntimeError: the builder failed otherwise; the message is the end of its log.
    """
    arguments = _arguments(variant)
    _need_builder()
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as cache:
        _build(["-m", str(job.merged), "-o", str(out), "-e", "cpu", "-c", cache, *arguments], job.log)
    for file in _texts(job.merged):
        if not (out / file.name).exists():
            shutil.copyfile(file, out / file.name)


def unsupported(variant: str, recipe: Recipe, config: Mapping[str, Any]) -> str | None:
    """Only the builder knows, and it says so when it is asked."""
    return None


def _arguments(variant: str) -> Sequence[str]:
    if variant not in ARGUMENTS:
        known = ", ".join(f"onnx-{name}" for name in VARIANTS)
        raise NotDeployable(f"export format {'-'.join(filter(None, ('onnx', variant)))}: there is {known}")
    return ARGUMENTS[variant]


def _need_builder() -> None:
    missing = [name for name in NEEDS if find_spec(name) is None]
    if missing:
        raise MissingExtra(f"ONNX export needs {', '.join(missing)}: pip install 'qkit[onnx]'")


def _build(arguments: Sequence[str], log: Path) -> None:
    """Run the builder to its end."""
    begin = log.stat().st_size if log.exists() else 0
    with log.open("ab") as sink:
        done = subprocess.run(
            [sys.executable, "-m", "onnxruntime_genai.models.builder", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=sink,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
            preexec_fn=death_wish(),
            check=False,
        )
    if done.returncode:
        _raise_for(done.returncode, log.read_bytes()[begin:].decode(errors="replace"))


def _raise_for(status: int, text: str) -> None:
    """Turn a failed build into an error: the builder's own words where it refuses the architecture."""
    lines = text.replace("\r", "\n").splitlines()
    refusal = next((line.removeprefix(REFUSAL) for line in reversed(lines) if line.startswith(REFUSAL)), None)
    if refusal is not None:
        raise NotDeployable(f"onnxruntime-genai's builder: {refusal} Leave the onnx formats out of export.formats")
    raise RuntimeError(f"onnxruntime-genai's builder ended with status {status}:\n" + "\n".join(lines[-TAIL_LINES:]))


def _texts(model: Path) -> list[Path]:
    """Configuration, tokenizer and template of a model folder, without the index of its weights."""
    return [file for pattern in TEXTS for file in model.glob(pattern) if not file.name.endswith(".index.json")]
