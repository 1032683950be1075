"""ONNX files with a key-value cache: the graph by onnxruntime-genai's model builder, low-bit matrices by our own rounding.

An architecture that the builder does not know can be had in fp32: transformers' exporter traces its graph, which ONNX Runtime
opens and onnxruntime-genai does not.

Both are programs of their own: what they allocate and patch goes when they end. What they make is put together in a
folder beside the one asked for, which appears whole or not at all.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from qkit.core.errors import DoesNotFit, MissingExtra, NotDeployable
from qkit.core.files import read_json, write_json
from qkit.core.process import run_to_end
from qkit.export._onnx.trace import refusal
from qkit.export.folder import note
from qkit.export.prompts import compared
from qkit.measure.evidence import KEY
from qkit.model.provenance import MARK, NOTE, TRACER
from qkit.plugins.exporter import Job
from qkit.recipe.schema import Recipe
from qkit.tensors.companions import copy_companions, text_files

RUNTIME = "onnxruntime"


# The first is ours, on the run's rows; the others are the builder's.
ALGORITHMS = ("gptq", "rtn", "k_quant", "k_quant_mixed")
BLOCKS = (16, 32, 64, 128, 256)  # weights that share a scale


@dataclass(frozen=True)
class Build:
    """How a variant is made: the builder's precision, and for low bits the algorithm and block size."""

    precision: str
    algorithm: str = ""
    block: int = 32

    @property
    def bits(self) -> int:
        return int(self.precision.removeprefix("int")) if self.algorithm else 16


BUILDS: Mapping[str, Build] = {
    "fp32": Build("fp32"),
    "fp16": Build("fp16"),
    "int8": Build("int8", "nearest"),
    "int4": Build("int4", "gptq"),
}
VARIANTS: Mapping[str, str] = {
    "fp32": "every bit of the merged weights, computed in fp32",
    "fp16": "weights and sums in fp16",
    "int8": "matrices in 8 bit, rounded to the nearest",
    "int4": "matrices in 4 bit, each rounding error made up for by the weights still to be rounded; the head in 8 bit",
}
BY_HAND: Mapping[str, Build] = {
    "-".join(filter(None, ("int4", algorithm, f"b{block}" if block else ""))): Build(
        "int4", algorithm or "gptq", block or 32
    )
    for algorithm in ("", *ALGORITHMS)
    for block in (0, *BLOCKS)
}
QUANTIZED = frozenset({"int8", *BY_HAND})


# For the CPU the builder gives fp16 an attention without shared cache; the graph that it makes for CUDA runs on both.
PROVIDERS = {"fp16": "cuda"}
OPTIONS = {"fp16": ("fuse_qk_norm_gqa=false",)}
TO_REFIT = ("algo_config=rtn", "matmul_mixed_precision=last_matmul:int8")  # quick; the head as wide as it will be
OURS = ("gptq", "nearest")
INSTEAD = {"gptq": "k_quant_mixed", "nearest": "rtn"}  # the builder's, where its graph's matrices are not the model's


NEEDS = ("onnx", "onnx_ir", "onnxruntime", "onnxruntime_genai")
BUILDER = "onnxruntime-genai's builder"
GENAI = "genai_config.json"  # in a folder that onnxruntime-genai opens
# How the builder says that it does not know an architecture, and how our own program does.
REFUSAL = re.compile(r"^(?:NotImplementedError|qkit\.errors\.NotDeployable): (.*)", re.MULTILINE)
# Its sliding window is the kernel's own, which ends in "seqlens_k is too small for sequence_length" on a padded batch (onnxruntime 1.31).
UNEVEN = frozenset({"gpt_oss"})
LEAVE_OUT = "Leave the onnx formats out of export.formats"
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# How a full disk reads in the builder's log: the system's words, or numpy's, which counts what it could write.
FULL_TEXT = re.compile(rf"{'|'.join(map(os.strerror, FULL))}|OSError: \d+ requested and \d+ written")
TAIL_LINES = 15


def export(job: Job, out: Path, variant: str) -> None:
    """Make the ONNX folder `out` of the merged model; the builder's output is appended to `job.log`.

    Raises:
        NotDeployable: there is no such variant, or it cannot be had of the architecture.
        MissingExtra: the builder is not installed.
        DoesNotFit: the disk is full.
        RuntimeError: the program failed otherwise; the message is the end of its log.
    """
    build = _known(variant)
    _need_builder()
    config = read_json(job.merged / "config.json")
    if reason := unsupported(variant, job.recipe, config):
        raise NotDeployable(reason)
    with _room(out), tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as scratch:
        whole = Path(scratch) / "whole"
        if unknown := _unknown(config):
            _trace(job, unknown, whole)
        else:
            _make(job, build, whole)
        _complete(job.merged, whole)
        if (whole / GENAI).exists():
            _try_prompts(job, whole, out.name)
        whole.rename(out)


def unsupported(variant: str, recipe: Recipe, config: Mapping[str, Any]) -> str | None:
    """Why no ONNX file could be made of a model with this config.json; None where it can, or the builder is not here to ask."""
    unknown = _unknown(config)
    if config.get("model_type") in UNEVEN:
        return f"ONNX Runtime's attention for {config['model_type']} takes no rows of different lengths at once. {LEAVE_OUT}"
    if unknown is None:
        return None
    refused = f"{BUILDER} makes no ONNX file of {unknown}; it takes {', '.join(sorted(architectures()))}. "
    if reason := refusal(config):
        return f"{refused}{TRACER} neither: {reason}. {LEAVE_OUT}"
    if variant != "fp32":
        return f"{refused}onnx-fp32 can be had, from {TRACER}: keep it alone of the onnx formats in export.formats"
    return None


def _unknown(config: Mapping[str, Any]) -> str | None:
    """The architecture of a config.json, where the builder is here and does not know it."""
    architecture = next(iter(config.get("architectures") or ()), None)
    known = architectures()
    return architecture if known and architecture not in known else None


def architectures() -> frozenset[str]:
    """The architectures that the installed builder names in its source; none where it is not installed."""
    found = find_spec("onnxruntime_genai")
    for folder in (found and found.submodule_search_locations) or ():
        source = Path(folder) / "models" / "builder.py"
        if source.is_file():
            return frozenset(re.findall(r'architectures\[0\] == "(\w+)"', source.read_text(encoding="utf-8")))
    return frozenset()


def _known(variant: str) -> Build:
    if build := BUILDS.get(variant) or BY_HAND.get(variant):
        return build
    raise NotDeployable(
        f"export format {'-'.join(filter(None, ('onnx', variant)))}: there is "
        f"{', '.join(f'onnx-{name}' for name in VARIANTS)}; and onnx-int4-ALGORITHM-bBLOCK, either of which may be left "
        f"out, with algorithm {', '.join(ALGORITHMS)} and block {', '.join(map(str, BLOCKS))}"
    )


def _need_builder() -> None:
    missing = [name for name in NEEDS if find_spec(name) is None]
    if missing:
        raise MissingExtra(f"ONNX export needs {', '.join(missing)}: pip install 'qkit[onnx]'")


@contextmanager
def _room(out: Path) -> Iterator[None]:
    """A disk that fills up is the user's to clear, and said so."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise _full(out.parent) from error


def _full(folder: Path) -> DoesNotFit:
    left = shutil.disk_usage(folder).free / 2**20
    return DoesNotFit(
        f"{folder}: the disk filled up while an ONNX file was made ({left:,.0f} MiB free now that its parts are removed). "
        "It takes up to 4 bytes per weight for the file and as much again while it is built"
    )


def _trace(job: Job, architecture: str, whole: Path) -> None:
    """Have the graph traced into the folder `whole`, with a note by which the runtime knows it."""
    job.notify(
        f"export: {architecture} is unknown to {BUILDER}: {TRACER} makes onnx-fp32, which ONNX Runtime opens "
        "and onnxruntime-genai, and so `qkit serve`, does not"
    )
    program = [sys.executable, "-m", "qkit.export._onnx.trace", str(job.merged), str(whole)]
    status, text = run_to_end(program, job.log, {"HF_HUB_OFFLINE": "1"})
    if status:
        raise _failure(status, text, whole, TRACER)
    note(whole, **MARK)


def _make(job: Job, build: Build, whole: Path) -> None:
    """Build into the folder `whole`, with the matrices rounded by us or by the builder."""
    from qkit.export._onnx.requantize import Unmatched

    if build.algorithm in OURS:
        try:
            return _rounded_by_us(job, build, whole)
        except Unmatched as reason:
            shutil.rmtree(whole)
            build = Build(build.precision, INSTEAD[build.algorithm], build.block)
            _note(job.log, f"{reason}: rounded by the builder's {build.algorithm} instead")
    options = (f"algo_config={build.algorithm}", f"block_size={build.block}") if build.algorithm else ()
    return _build(job, build, options, whole)


def _rounded_by_us(job: Job, build: Build, whole: Path) -> None:
    """The builder's graph, its matrices replaced by ours; the graph itself is thrown away."""
    from qkit.export._onnx.requantize import refit

    built = whole.with_name("built")
    _build(job, Build("int4", "rtn", build.block), (*TO_REFIT, f"block_size={build.block}"), built)
    whole.mkdir()
    refit(job, built, whole, build.bits)
    for file in text_files(built):
        file.rename(whole / file.name)


def _build(job: Job, build: Build, options: Sequence[str], out: Path) -> None:
    """Run the builder to its end."""
    arguments = ["-m", str(job.merged), "-o", str(out), "-c", str(out.with_name("cache")), "-p", build.precision]
    arguments += ["-e", PROVIDERS.get(build.precision, "cpu")]
    if options := (*options, *OPTIONS.get(build.precision, ())):
        arguments += ["--extra_options", *options]
    program = [sys.executable, "-m", "onnxruntime_genai.models.builder", *arguments]
    status, text = run_to_end(program, job.log, {"HF_HUB_OFFLINE": "1"})
    if status:
        raise _failure(status, text, out)


def _failure(status: int, text: str, out: Path, who: str = BUILDER) -> Exception:
    """The error that a failed build stands for."""
    tail = text.splitlines()[-TAIL_LINES:]
    if refusals := REFUSAL.findall(text):
        return NotDeployable(f"{who}: {refusals[-1]} {LEAVE_OUT}")
    if any(map(FULL_TEXT.search, tail)):
        return _full(out.parent)
    return RuntimeError(f"{who} ended with status {status}:\n" + "\n".join(tail))


def _note(log: Path, line: str) -> None:
    with log.open("a", encoding="utf-8") as sink:
        sink.write(line + "\n")


def _complete(model: Path, out: Path) -> None:
    """What stands beside the model's weights, in the place of what the builder has saved anew; onnxruntime-genai stops where the generation
    config says."""
    copy_companions(model, out, but=(NOTE,) if (out / NOTE).exists() else ())
    if not (out / GENAI).exists():
        return  # traced
    config = read_json(out / GENAI)
    if (out / "generation_config.json").exists():
        stop = read_json(out / "generation_config.json").get("eos_token_id")
        config["model"]["eos_token_id"] = config["model"]["eos_token_id"] if stop is None else stop
    config["model"] |= _within(config["model"])
    config["model"]["decoder"]["session_options"]["provider_options"] = []  # the CPU; others are added where they are
    write_json(out / GENAI, config)


def _try_prompts(job: Job, whole: Path, name: str) -> None:
    """Note how the library's own prompts differ from training's; the model card then shows how to make them with transformers."""
    found = compared(whole, job.rows, job.recipe.model.trust_remote_code)
    note(whole, **{KEY: found})
    if found["differ"]:
        job.notify(
            f"export: {name}: {found['by']} by itself makes other prompts than training had, in {len(found['differ'])} of "
            f"{found['cases']} cases ({found['differ'][0]}); its README.md shows how to make them with transformers"
        )


def _within(model: Mapping[str, Any]) -> dict[str, Any]:
    """What ends an answer and what pads, without ids that the embedding has no row for: the library would look them up."""
    rows, stop = model["vocab_size"], model["eos_token_id"]
    stops = [number for number in (stop if isinstance(stop, list) else [stop]) if number < rows]
    pad = model.get("pad_token_id")
    padded = {"pad_token_id": stops[0]} if stops and pad is not None and pad >= rows else {}
    return {"eos_token_id": stops if isinstance(stop, list) or not stops else stops[0], **padded}
