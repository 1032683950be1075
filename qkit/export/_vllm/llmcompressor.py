"""Quantizes weights to 4 or 8 bits with llm-compressor, calibrated on the run's own rows: a program for an environment of its own.

llm-compressor pins other versions than qkit does, so this file imports nothing of qkit; its arguments are one JSON document on the command
line.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import Any


def main(job: Mapping[str, Any]) -> None:
    """Quantize `model`, and write the folder `out`."""
    import torch
    from llmcompressor import oneshot
    from transformers import AutoModelForCausalLM, GenerationConfig

    # The AWQ of llm-compressor 0.14 pins memory, which needs an accelerator (pipelines/cache.py)
    if not torch.accelerator.is_available():
        torch.Tensor.pin_memory = lambda tensor, *_: tensor
    torch.manual_seed(job["seed"])
    model = AutoModelForCausalLM.from_pretrained(
        job["model"],
        dtype="auto",
        generation_config=GenerationConfig(),  # the model's own is copied later; transformers may refuse to load or save it
    )
    oneshot(
        model=model,
        dataset=_rows(job),
        recipe=_modifiers(job),
        max_seq_length=job["longest"],
        num_calibration_samples=job["samples"],
        shuffle_calibration_samples=False,
        data_collator=_one_row,
    )
    model.save_pretrained(job["out"], save_compressed=True)


def _rows(job: Mapping[str, Any]) -> Any:
    """Return the first `samples` rows of the file `rows`, as token ids that the model was trained on."""
    import pyarrow.parquet
    from datasets import Dataset

    ids = pyarrow.parquet.read_table(job["rows"], columns=["input_ids"]).column("input_ids").to_pylist()
    cut = [row[: job["longest"]] for row in ids[: job["samples"]]]
    return Dataset.from_dict({"input_ids": cut, "attention_mask": [[1] * len(row) for row in cut]})


def _one_row(batch: list[Mapping[str, list[int]]]) -> dict[str, Any]:
    import torch

    return {name: torch.tensor([row[name] for row in batch]) for name in ("input_ids", "attention_mask")}


def _modifiers(job: Mapping[str, Any]) -> list[Any]:
    """Return llm-compressor's modifiers. AWQ and SmoothQuant only move scales from activations to weights; the next modifier rounds."""
    from compressed_tensors.quantization import QuantizationScheme
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier
    from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier

    scheme = {"config_groups": {"group_0": QuantizationScheme(**job["scheme"])}, "ignore": job["ignore"]}
    if job["method"] == "awq":
        return [AWQModifier(), QuantizationModifier(**scheme)]
    if job["method"] == "smoothquant":
        return [SmoothQuantModifier(), GPTQModifier(**scheme)]
    return [GPTQModifier(**scheme)]


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
