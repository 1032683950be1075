"""ONNX files with a key-value cache: onnxruntime-genai's model builder makes the graph, and qkit rounds low-bit matrices itself.

Architectures that the builder does not support can be exported in fp32: transformers' exporter traces the graph. ONNX Runtime opens such a
graph; onnxruntime-genai does not.

Both run as programs of their own. Their output is completed in a temporary folder next to the target and then renamed, so that the target
is complete or absent.
"""

from __future__ import annotations

import itertools
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qkit.core.errors import NotDeployable
from qkit.core.files import read_json
from qkit.export._onnx import builder, genai_config, labelled
from qkit.export._onnx.builder import BUILDER, LEAVE_OUT
from qkit.export._onnx.trace import refusal
from qkit.export.folder import note
from qkit.model.provenance import MARK, TRACER
from qkit.plugins.exporter import Job
from qkit.plugins.task import open_task
from qkit.recipe.schema import Recipe
from qkit.tensors.companions import text_files

RUNTIME = "onnxruntime"
# gptq is qkit's, on the run's own rows; the others are the builder's
ALGORITHMS = ("gptq", "rtn", "k_quant", "k_quant_mixed")
BLOCKS = (16, 32, 64, 128, 256)  # weights that share a scale


@dataclass(frozen=True)
class Build:
    """How a variant is made: the builder's precision, and for low bits the rounding algorithm and the block size."""

    precision: str
    algorithm: str = ""
    block: int = 32

    @property
    def bits(self) -> int:
        return int(self.precision.removeprefix("int")) if self.algorithm else 16


def _int4_builds() -> dict[str, Build]:
    """Name every combination of algorithm and block size: int4, int4-rtn, int4-b64, int4-rtn-b64, and so on."""
    builds = {}
    for algorithm, block in itertools.product(("", *ALGORITHMS), (0, *BLOCKS)):
        name = "int4" + (f"-{algorithm}" if algorithm else "") + (f"-b{block}" if block else "")
        builds[name] = Build("int4", algorithm or "gptq", block or 32)
    return builds


BUILDS: Mapping[str, Build] = {
    "fp32": Build("fp32"),
    "fp16": Build("fp16"),
    "int8": Build("int8", "nearest"),
    "int4": Build("int4", "gptq"),
}
VARIANTS: Mapping[str, str] = {
    "fp32": "the merged weights exactly, computed in fp32",
    "fp16": "weights and arithmetic in fp16",
    "int8": "matrices in 8 bits, rounded to nearest",
    "int4": "matrices in 4 bits, rounded by GPTQ on the run's own rows; the head in 8 bits",
}
BY_HAND: Mapping[str, Build] = _int4_builds()
QUANTIZED = frozenset({"int8", *BY_HAND})
EXACT = frozenset({"fp32"})
LABELLED = frozenset({"fp32", "int8"})


ROUNDED_BY_QKIT = ("gptq", "nearest")
# Fast; the head in its final width
BUILDER_OPTIONS_TO_ROUND = ("algo_config=rtn", "matmul_mixed_precision=last_matmul:int8")
# The builder's algorithm where its matrices are not those of the model
FALLBACK = {"gptq": "k_quant_mixed", "nearest": "rtn"}
# The sliding window of this attention kernel fails on a padded batch with "seqlens_k is too small for sequence_length" (onnxruntime 1.31).
NO_PADDED_BATCHES = frozenset({"gpt_oss"})


def export(job: Job, out: Path, variant: str) -> None:
    """Make the ONNX folder `out` of the merged model; the builder's output is appended to `job.log`.

    Raises:
        NotDeployable: there is no such variant, or it cannot be made of this architecture.
        MissingExtra: the builder is not installed.
        DoesNotFit: the disk is full.
        RuntimeError: the program failed otherwise; the message is the end of its log.
    """
    if not open_task(job.recipe.task).HEAD.generates:
        labelled.export(job, out, variant)
        return
    build = build_of(variant)
    builder.need_builder()
    config = read_json(job.merged / "config.json")
    if reason := unsupported(variant, job.recipe, config):
        raise NotDeployable(reason, export_format=f"onnx-{variant}")
    with (
        builder.reporting_full_disk(out.parent),
        tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as scratch,
    ):
        folder = Path(scratch) / "complete"
        if architecture := builder.unknown_architecture(config):
            _trace(job, architecture, folder)
        else:
            _make(job, build, folder)
        genai_config.complete(job.merged, folder)
        if (folder / genai_config.FILE).exists():
            _compare_prompts(job, folder, out.name)
        folder.rename(out)


def unsupported(variant: str, recipe: Recipe, config: Mapping[str, Any]) -> str | None:
    """Return why no ONNX file can be made of a model with this config.json; None if it can, or if the builder is not installed."""
    if not open_task(recipe.task).HEAD.generates:
        return None
    architecture = builder.unknown_architecture(config)
    if config.get("model_type") in NO_PADDED_BATCHES:
        return f"ONNX Runtime's attention for {config['model_type']} does not support rows of different lengths in a batch. {LEAVE_OUT}"
    if architecture is None:
        return None
    refused = f"{BUILDER} does not support {architecture}; it supports {', '.join(sorted(builder.architectures()))}. "
    if reason := refusal(config):
        return f"{refused}{TRACER} cannot export it either: {reason}. {LEAVE_OUT}"
    if variant != "fp32":
        return f"{refused}{TRACER} can make onnx-fp32: keep only that one of the onnx formats in export.formats"
    return None


def build_of(variant: str) -> Build:
    """Return how a variant is made.

    Raises:
        NotDeployable: there is no such variant.
    """
    if build := BUILDS.get(variant) or BY_HAND.get(variant):
        return build
    name = "-".join(filter(None, ("onnx", variant)))
    raise NotDeployable(
        f"unknown export format {name}; the formats are "
        f"{', '.join(f'onnx-{name}' for name in VARIANTS)}, and onnx-int4-ALGORITHM-bBLOCK, where either part may be omitted; "
        f"ALGORITHM is one of {', '.join(ALGORITHMS)}, and BLOCK one of {', '.join(map(str, BLOCKS))}",
        export_format=name,
    )


def _trace(job: Job, architecture: str, out: Path) -> None:
    """Trace the graph into the folder `out`, with a note by which the runtime recognizes it."""
    job.notify(
        f"export: {BUILDER} does not support {architecture}: {TRACER} makes onnx-fp32, which ONNX Runtime opens; "
        "onnxruntime-genai, and so `qkit serve`, cannot open it"
    )
    builder.run_program(["-m", "qkit.export._onnx.trace", str(job.merged), str(out)], job.log, out, TRACER)
    note(out, **MARK)


def _make(job: Job, build: Build, out: Path) -> None:
    """Build into the folder `out`; the matrices are rounded by qkit, or by the builder."""
    from qkit.export._onnx.requantize import Unmatched

    algorithm = build.algorithm
    if algorithm in ROUNDED_BY_QKIT:
        try:
            return _rounded_by_qkit(job, build, out)
        except Unmatched as reason:
            shutil.rmtree(out)
            algorithm = FALLBACK[algorithm]
            with job.log.open("a", encoding="utf-8") as log:
                log.write(f"{reason}: rounded by the builder's {algorithm} instead\n")
    options = (f"algo_config={algorithm}", f"block_size={build.block}") if algorithm else ()
    return builder.build(job, build.precision, options, out)


def _rounded_by_qkit(job: Job, build: Build, out: Path) -> None:
    """Build a graph, and write it to `out` with its matrices rounded by qkit."""
    from qkit.export._onnx.requantize import requantize

    built = out.with_name("built")
    builder.build(job, "int4", (*BUILDER_OPTIONS_TO_ROUND, f"block_size={build.block}"), built)
    out.mkdir()
    requantize(job, built, out, build.bits)
    for file in text_files(built):
        file.rename(out / file.name)


def _compare_prompts(job: Job, folder: Path, name: str) -> None:
    """Record where the library's own prompts differ from those of training; the model card then shows how to make them with transformers."""
    from qkit.export.prompts import compared
    from qkit.measure.evidence import KEY

    comparison = compared(folder, job.rows, job.recipe.model.trust_remote_code)
    note(folder, **{KEY: comparison})
    if comparison["differ"]:
        job.notify(
            f"export: {name}: the prompts of {comparison['by']} differ from those of training in {len(comparison['differ'])} of "
            f"{comparison['cases']} cases ({comparison['differ'][0]}); its README.md shows how to make them with transformers"
        )
