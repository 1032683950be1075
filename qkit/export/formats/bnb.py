"""The merged model quantized to NF4, for transformers. vLLM has no loader for it since 0.32 (`qkit.runtimes.vllm.methods`)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qkit.core.device import detect, released
from qkit.export.folder import create, note, write_companions
from qkit.model.config import EXPERTS
from qkit.plugins.exporter import Job
from qkit.plugins.task import open_task
from qkit.recipe.schema import Recipe

VARIANTS = {"nf4": "NF4, packed by bitsandbytes"}
QUANTIZED = frozenset({"nf4"})
RUNTIME = "transformers"


def export(job: Job, out: Path, variant: str) -> None:
    """Make `out` from the merged model, which is in memory in 4 bits while it is written.

    Raises:
        NotDeployable: there is no such variant.
    """
    create(out, "bnb", variant, VARIANTS)
    import torch
    import transformers
    from transformers import BitsAndBytesConfig, GenerationConfig

    section = job.recipe.quantization.model_copy(update={"load_in_4bit": True, "bnb_4bit_quant_type": variant})
    config = BitsAndBytesConfig(**section.model_dump())
    with released():
        model = getattr(
            transformers, open_task(job.recipe.task).HEAD.auto_class
        ).from_pretrained(
            str(job.merged),
            dtype=torch.bfloat16,
            device_map=detect().device_map,
            quantization_config=config,
            generation_config=GenerationConfig(),  # the model's own is copied later; transformers may refuse to load or save it
            trust_remote_code=job.recipe.model.trust_remote_code,
        )
        # Run no forward pass before this: on a CPU, bitsandbytes would then repack the weights, and save those.
        model.save_pretrained(str(out), max_shard_size=job.recipe.merge.max_shard_bytes)
        del model
    written = json.loads((out / "config.json").read_text(encoding="utf-8"))
    write_companions(job.merged, out, quantization_config=written["quantization_config"], dtype="bfloat16")
    note(out, double_quantization=section.bnb_4bit_use_double_quant)


def unsupported(variant: str, recipe: Recipe, config: Mapping[str, Any]) -> str | None:
    """A mixture of experts is unsupported: bitsandbytes quantizes linear modules only, and experts are not linear modules."""
    if any((config.get(key) or 0) > 1 for key in EXPERTS):
        return "the experts of a mixture would stay in 16 bits; use safetensors"
    return None
