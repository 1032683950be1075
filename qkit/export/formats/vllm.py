"""What vLLM loads: the merged model in 16 bit or quantized, or the adapter apart, to be put on its base."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qkit.core.errors import MissingExtra, ModelError
from qkit.core.process import run_to_end
from qkit.export.folder import beside_weights, link_weights, note, start
from qkit.model.config import EXPERTS
from qkit.model.provenance import check_adapter
from qkit.plugins.exporter import Job
from qkit.recipe.schema import Recipe
from qkit.setup import side_environments
from qkit.tensors.companions import copy_companions

VARIANTS = {
    "": "the merged model in 16 bit",
    "adapter": "the adapter apart, for --enable-lora on its base",
    "w8a8": "weights and activations in 8 bit integers",
    "w4a16": "weights in 4 bit, in groups",
    "fp8": "weights and activations in 8 bit floats",
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
        NotDeployable: there is no such variant, or vLLM would not take this adapter.
        ModelError: the adapter is not of this base, or no group size suits the model's widths.
        MissingExtra: the recipe names a method whose environment is not there.
        RuntimeError: llm-compressor failed; the message is the end of its log.
    """
    start(out, "vllm", variant, VARIANTS)
    if variant == "":
        link_weights(job.merged, out)
        copy_companions(job.merged, out)
    elif variant == "adapter":
        _adapter(job, out)
    else:
        _quantized(job, out, variant)


def unsupported(variant: str, recipe: Recipe, config: Mapping[str, Any]) -> str | None:
    """vLLM's rules for adapters, and what our rounding does not know."""
    if variant == "adapter":
        from qkit.server import lora

        return lora.refusal(recipe, config)
    if variant in QUANTIZED and any((config.get(key) or 0) > 1 for key in EXPERTS):
        return "a mixture of experts is not quantized by this version; use vllm (16 bit)"
    if variant == "w4a16":
        from qkit.export._vllm.compressed import group_size

        try:
            group_size(config)
        except ModelError as error:
            return str(error)
    return None


# --- the adapter apart ------------------------------------------------------------------------------------------------


def _adapter(job: Job, out: Path) -> None:
    """The adapter's two files, tokenizer and template, and on which base it belongs."""
    from qkit.server import lora

    belongs = check_adapter(job.adapter, job.base)
    config = json.loads((job.adapter / "adapter_config.json").read_text(encoding="utf-8"))
    rank = lora.rank_for(config)
    copy_companions(job.merged, out)
    (out / "config.json").unlink()  # the base's: a folder that has one is taken for a whole model
    shutil.copyfile(job.adapter / "adapter_model.safetensors", out / "adapter_model.safetensors")
    config["base_model_name_or_path"] = str(job.base.resolve())
    (out / "adapter_config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    note(out, **belongs, max_lora_rank=rank)


# --- quantized --------------------------------------------------------------------------------------------------------


def _quantized(job: Job, out: Path, variant: str) -> None:
    from qkit.export._vllm.compressed import left_in_16_bit, quantization_config, scheme, write_nearest

    config = json.loads((job.merged / "config.json").read_text(encoding="utf-8"))
    method = _method(job, variant)
    if method == NEAREST:
        write_nearest(job.merged, out, variant, config, job.recipe.merge.max_shard_bytes)
        made = quantization_config(variant, config, left_in_16_bit(job.merged))
        beside_weights(job.merged, out, quantization_config=made)
        note(out, method=NEAREST)
    else:
        _calibrated(job, out, scheme(variant, config), method)


def _method(job: Job, variant: str) -> str:
    """How the weights are rounded. 8-bit floats scaled by token need no data: there the nearest value is what llm-compressor takes as well."""
    wanted = job.recipe.export.method
    if variant == "fp8" or wanted == NEAREST:
        return NEAREST
    if side_environments.python_of(ENVIRONMENT):
        return "gptq" if wanted == "auto" else wanted
    makes = side_environments.command(ENVIRONMENT)
    if wanted != "auto":
        raise MissingExtra(f"export.method={wanted}: llm-compressor's environment is not there; `{makes}` makes it")
    job.notify(
        f"vllm-{variant}: rounded to the nearest value; `{makes}` makes the environment in which GPTQ fits the weights to your rows"
    )
    return NEAREST


def _calibrated(job: Job, out: Path, scheme_of: Mapping[str, Any], method: str) -> None:
    """By llm-compressor, as a program of its own; then everything beside the weights, which another transformers wrote, as it was."""
    from qkit.export._vllm.compressed import IGNORED

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
        "ignore": IGNORED,
    }
    _start(task, job.log)
    written = json.loads((out / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    beside_weights(job.merged, out, quantization_config=written)
    (out / "recipe.yaml").unlink(missing_ok=True)  # llm-compressor's own; what was asked of it is in qkit.json
    note(out, method=method, calibration_rows=rows, made_by=side_environments.ENVIRONMENTS[ENVIRONMENT].requirements)


def _start(task: Mapping[str, Any], log: Path) -> None:
    """Run the program to its end in the environment that was made for it."""
    program = [str(side_environments.python_of(ENVIRONMENT)), "-I", str(PROGRAM), json.dumps(task)]
    status, text = run_to_end(program, log, {"HF_HUB_OFFLINE": "1"})
    if status:
        raise RuntimeError(
            f"llm-compressor ended with status {status}; export.method={NEAREST} does without it:\n"
            + "\n".join(text.splitlines()[-TAIL_LINES:])
        )
