"""The points of the memory benchmark: which shapes, and what is varied from point to point."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qkit.model.config import known_models
from qkit.recipe.schema import Recipe

USUAL = {"quantization": "nf4-double", "rank": 16, "rows": 4, "length": 256, "labelled": 0.5, "checkpointing": False}


def _shape(
    kind: str, hidden: int, intermediate: int, layers: int, heads: int, kv: int, vocabulary: int, **more: Any
) -> dict[str, Any]:
    return {
        "model_type": kind,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "vocab_size": vocabulary,
        "pad_token_id": 0,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "tie_word_embeddings": True,
        "max_position_embeddings": 8192,
        **more,
    }


SMALL = {
    "llama-15M": _shape("llama", 256, 768, 6, 4, 2, 32000),
    "qwen2-60M": _shape("qwen2", 512, 1536, 8, 8, 2, 64000),
    "qwen3-60M": _shape("qwen3", 512, 1536, 8, 8, 2, 64000, head_dim=64),
    "mistral-60M": _shape("mistral", 512, 1536, 8, 8, 2, 32000, head_dim=64, sliding_window=None),
    "phi3-60M": _shape("phi3", 512, 1536, 8, 8, 8, 32064),
    "gemma2-80M": _shape("gemma2", 512, 1536, 8, 4, 2, 64000, head_dim=128),
    "gemma3-80M": _shape("gemma3_text", 512, 1536, 8, 4, 1, 64000, head_dim=128),
}


def _known(name: str) -> dict[str, Any]:
    return {**known_models()[name], "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 1}


SHAPES = {
    **SMALL,
    "smollm2-135M": _known("HuggingFaceTB/SmolLM2-135M"),
    "smollm2-360M": _known("HuggingFaceTB/SmolLM2-360M"),
    "qwen2.5-0.5B": _known("Qwen/Qwen2.5-0.5B"),
    "llama-3.2-1B": _known("meta-llama/Llama-3.2-1B"),
    "qwen2.5-1.5B": _known("Qwen/Qwen2.5-1.5B"),
    "mistral-7B": _known("mistralai/Mistral-7B-v0.3"),
    "qwen2.5-7B": _known("Qwen/Qwen2.5-7B"),
    "llama-3.1-8B": _known("meta-llama/Llama-3.1-8B"),
}

LARGE = ("mistral-7B", "qwen2.5-7B", "llama-3.1-8B")


def _point(shape: str, **changed: Any) -> dict[str, Any]:
    name = " ".join([shape, *(f"{key}={value}" for key, value in changed.items())])
    return {"name": name, **USUAL, **changed, "shape": shape, "config": SHAPES[shape]}


def cpu_points() -> list[dict[str, Any]]:
    """From 15M to 8B on a CPU: every shape once as usual, then one thing after the other changed."""
    return [*_small(), *_whole(), *_middle(), *large_points()]


def _small() -> Iterator[dict[str, Any]]:
    for shape in SMALL:
        yield _point(shape)
        yield _point(shape, checkpointing=True, rows=8)
    yield _point("llama-15M", quantization="bf16")
    yield _point("llama-15M", quantization="nf4", rank=64)
    yield _point("qwen2-60M", attention="eager")
    yield _point("qwen2-60M", labelled=1.0)
    yield _point("qwen2-60M", labelled=0.05)
    yield _point("qwen2-60M", length=2048, rows=1)
    yield _point("qwen2-60M", length=64, rows=32)
    yield _point("qwen2-60M", dropout=0.05)
    yield _point("qwen2-60M", accumulation=2)
    yield _point("qwen2-60M", optimizer="sgd")


def _whole() -> Iterator[dict[str, Any]]:
    """All weights are trained, in fp32."""
    for shape in ("llama-15M", "qwen2-60M", "gemma2-80M"):
        yield _point(shape, method="full", quantization="bf16")
    yield _point("qwen2-60M", method="full", quantization="bf16", checkpointing=True)


def _middle() -> Iterator[dict[str, Any]]:
    yield _point("smollm2-135M")
    yield _point("smollm2-135M", checkpointing=True)
    yield _point("smollm2-135M", quantization="nf4")
    yield _point("smollm2-135M", quantization="bf16")
    yield _point("smollm2-135M", rank=64)
    yield _point("smollm2-135M", rows=8)
    yield _point("smollm2-135M", length=1024, rows=2)
    yield _point("smollm2-135M", labelled=1.0)
    yield _point("smollm2-135M", targets=["q_proj", "v_proj"])
    yield _point("smollm2-360M")
    yield _point("smollm2-360M", checkpointing=True, rows=8)
    yield _point("smollm2-360M", quantization="bf16", rank=8)
    yield _point("qwen2.5-0.5B", rows=2)
    yield _point("qwen2.5-0.5B", checkpointing=True, length=512)
    yield _point("llama-3.2-1B", rows=2)
    yield _point("llama-3.2-1B", checkpointing=True, rows=2, rank=64)
    yield _point("qwen2.5-1.5B", rows=2)
    yield _point("qwen2.5-1.5B", checkpointing=True, rows=2)


def large_points() -> list[dict[str, Any]]:
    """The three true 7B and 8B shapes, one row of 256 tokens."""
    return [_point(shape, checkpointing=True, rows=1) for shape in LARGE]


def gpu_points() -> list[dict[str, Any]]:
    """7B and 8B on a CUDA card of 24 GB; the two without checkpointing and the longest want more."""
    point = functools.partial(_point, labelled=0.5, checkpointing=True)
    made = []
    for shape in LARGE:
        made += [point(shape, rows=1, length=length) for length in (512, 2048, 8192)]
        made += [point(shape, rows=8, length=1024)]
        made += [point(shape, rows=1, length=2048, optimizer="paged_adamw_8bit")]
        made += [point(shape, rows=1, length=2048, rank=64)]
        made += [point(shape, rows=1, length=2048, quantization="nf4")]
        made += [point(shape, rows=1, length=512, labelled=1.0, attention="eager")]
    made += [_point(shape, rows=1, length=512) for shape in ("mistral-7B", "llama-3.1-8B")]
    return made


def recipe_of(point: dict[str, Any], folder: Path) -> Recipe:
    """A point as the recipe that asks for it, with its model's config.json in `folder`."""
    tokens = point["rows"] * point["length"]
    quantized = point["quantization"] != "bf16"
    return Recipe.model_validate(
        {
            "task": "chat",
            "method": point.get("method", "lora"),
            "model": {"source": str(folder), "attn_implementation": point.get("attention", "sdpa")},
            "quantization": {
                "load_in_4bit": quantized,
                "bnb_4bit_use_double_quant": point["quantization"] == "nf4-double",
            },
            "lora": {
                "r": point["rank"],
                "lora_alpha": 2 * point["rank"],
                "lora_dropout": point.get("dropout", 0.0),
                "target_modules": point.get("targets", "all-linear"),
            },
            "data": {"train": [{"source": "random"}], "max_length": point["length"], "batch_tokens": tokens},
            "train": {
                "max_steps": 2,
                "gradient_checkpointing": point["checkpointing"],
                "gradient_accumulation_steps": point.get("accumulation", 1),
                "optim": point.get("optimizer", "adamw_torch"),
            },
        }
    )
