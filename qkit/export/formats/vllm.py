"""Formats for vLLM: the merged model in 16 bits or quantized, or the adapter alone, to be served on its base."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qkit.core.errors import MissingExtra, ModelError
from qkit.core.process import run_to_end
from qkit.export.folder import create, link_weights, note, write_companions
from qkit.model.config import EXPERTS
from qkit.model.provenance import check_adapter
from qkit.plugins.exporter import Job
from qkit.recipe.schema import Recipe
from qkit.setup import side_environments
from qkit.tensors.companions import copy_companions

VARIANTS = {
    "": "the merged model in 16 bits",
    "adapter": "the adapter alone, for --enable-lora on its base",
    "w8a8": "weights and activations in 8-bit integers",
    "w4a16": "weights in 4 bits, in groups",
    "fp8": "weights and activations in 8-bit floats",
}
QUANTIZED = frozenset({"w8a8", "w4a16", "fp8"})
RUNTIME = "vllm"
ENVIRONMENT = "llmcompressor"
PROGRAM = Path(__file__).parent.parent / "_vllm" / "llmcompressor.py"  # run by that environment's python
NEAREST = "round-to-nearest"
TAIL_LINES = 15


def export(job: Job, out: Path, variant: str) -> None:
    """Make `out`.

    Raises:
        NotDeployable: there is no such variant, or vLLM does not support this adapter.
        ModelError: the adapter belongs to another base, or no group size divides the widths of the model.
        MissingExtra: the recipe names a method whose environment is missing.
        RuntimeError: llm-compressor failed; the message is the end of its log.
    """
    create(out, "vllm", variant, VARIANTS)
    if variant == "":
        link_weights(job.merged, out)
        copy_companions(job.merged, out)
    elif variant == "adapter":
        _adapter(job, out)
    else:
        _quantized(job, out, variant)


def unsupported(variant: str, recipe: Recipe, config: Mapping[str, Any]) -> str | None:
    """Apply vLLM's rules for adapters, and the limits of qkit's own rounding."""
    if variant == "adapter":
        from qkit.server import lora

        return lora.refusal(recipe, config)
    if variant in QUANTIZED and any((config.get(key) or 0) > 1 for key in EXPERTS):
        return "quantizing a mixture of experts is not supported; use vllm (16 bits)"
    if variant == "w4a16":
        from qkit.export._vllm.compressed import group_size

        try:
            group_size(config)
        except ModelError as error:
            return str(error)
    return None


# --- the adapter alone ------------------------------------------------------------------------------------------------


def _adapter(job: Job, out: Path) -> None:
    """Copy the adapter's two files, tokenizer and template, and record the base that it belongs to."""
    from qkit.server import lora

    base_of_adapter = check_adapter(job.adapter, job.base)
    config = json.loads((job.adapter / "adapter_config.json").read_text(encoding="utf-8"))
    rank = lora.rank_for(config)
    copy_companions(job.merged, out)
    (out / "config.json").unlink()  # the model's: a folder with a config.json counts as a whole model
    shutil.copyfile(job.adapter / "adapter_model.safetensors", out / "adapter_model.safetensors")
    config["base_model_name_or_path"] = str(job.base.resolve())
    (out / "adapter_config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    note(out, **base_of_adapter, max_lora_rank=rank)


# --- quantized --------------------------------------------------------------------------------------------------------


def _quantized(job: Job, out: Path, variant: str) -> None:
    from qkit.export._vllm.compressed import left_in_16_bit, quantization_config, scheme, write_nearest

    config = json.loads((job.merged / "config.json").read_text(encoding="utf-8"))
    method = _method(job, variant)
    if method == NEAREST:
        write_nearest(job.merged, out, variant, config, job.recipe.merge.max_shard_bytes)
        quantization = quantization_config(variant, config, left_in_16_bit(job.merged))
        write_companions(job.merged, out, quantization_config=quantization)
        note(out, method=NEAREST)
    else:
        _calibrated(job, out, scheme(variant, config), method)


def _method(job: Job, variant: str) -> str:
    """Return how the weights are rounded.

    fp8 with a scale for each token needs no calibration data: llm-compressor rounds it to nearest too.

    Raises:
        MissingExtra: the recipe names a method whose environment is missing.
    """
    method = job.recipe.export.method
    if variant == "fp8" or method == NEAREST:
        return NEAREST
    if side_environments.python_of(ENVIRONMENT):
        return "gptq" if method == "auto" else method
    command = side_environments.command(ENVIRONMENT)
    if method != "auto":
        raise MissingExtra(
            f"export.method={method} requires llm-compressor's environment, which is missing; `{command}` creates it",
            package=ENVIRONMENT,
        )
    job.notify(
        f"vllm-{variant}: weights are rounded to nearest; for GPTQ on your own rows, create its environment with `{command}`"
    )
    return NEAREST


def _calibrated(job: Job, out: Path, scheme_of: Mapping[str, Any], method: str) -> None:
    """Run llm-compressor; then restore the files next to the weights, which another version of transformers wrote."""
    from qkit.export._vllm.compressed import NOT_QUANTIZED

    rows = job.recipe.export.calibration_rows
    task = {
        "model": str(job.merged.resolve()),
        "out": str(out.resolve()),
        "rows": str(job.rows.resolve()),
        "samples": rows,
        "longest": job.recipe.data.max_length,
        "seed": job.recipe.seed,
        "method": method,
        "scheme": scheme_of,
        "ignore": NOT_QUANTIZED,
    }
    _start(task, job.log)
    quantization = json.loads((out / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    write_companions(job.merged, out, quantization_config=quantization)
    (out / "recipe.yaml").unlink(missing_ok=True)  # llm-compressor's; qkit.json records its arguments
    note(out, method=method, calibration_rows=rows, made_by=side_environments.ENVIRONMENTS[ENVIRONMENT].requirements)


def _start(task: Mapping[str, Any], log: Path) -> None:
    """Run the program to its end, with the Python of its own environment."""
    program = [str(side_environments.python_of(ENVIRONMENT)), "-I", str(PROGRAM), json.dumps(task)]
    status, text = run_to_end(program, log, {"HF_HUB_OFFLINE": "1"})
    if status:
        raise RuntimeError(
            f"llm-compressor ended with status {status}; export.method={NEAREST} does not need it:\n"
            + "\n".join(text.splitlines()[-TAIL_LINES:])
        )
