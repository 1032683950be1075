"""Whether the weights and the cache of a server fit into the device's memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from qkit.core.errors import DoesNotFit, MissingExtra, ModelError
from qkit.core.files import read_json
from qkit.model.config import shape_of
from qkit.plan import gpus, remedies
from qkit.plan import items as plan_items
from qkit.plan import plan as plan_plan
from qkit.plan.stage_memory import kv_bytes
from qkit.recipe.schema import Recipe
from qkit.server.lora import is_adapter
from qkit.tensors.shards import SHARDS

if TYPE_CHECKING:
    from qkit.serve.request import Serving


ONNX_SEQS = 4  # the default of onnxruntime-genai
ONNX_CACHE_BYTES = 4  # per number in the cache

ONNX_BYTES = 460 << 20  # measured: the interpreter with transformers and ONNX Runtime


def cache_bytes(recipe: Recipe) -> int:
    """The KV cache for serve.concurrency conversations of full length; 0 if the model's shape is unknown."""
    try:
        return recipe.serve.concurrency * kv_bytes(shape_of(recipe.model), recipe.serve.max_model_len)
    except (ModelError, MissingExtra):
        return 0


def planned(serving: Serving) -> plan_plan.Plan | None:
    """The memory plan, or None if the model's shape is unknown. Weights on this disk count with their size there.

    Raises:
        DoesNotFit: the server needs more memory than the device has. The message says what to change.
    """
    try:
        plan = _plan(serving)
    except (ModelError, MissingExtra):
        return None
    if not plan.fits:
        raise DoesNotFit(f"{serving.name}: {plan_plan.refusal(plan)}")
    return plan


def _plan(serving: Serving) -> plan_plan.Plan:
    if serving.purpose is not None:
        if serving.runtime == "vllm":
            raise ModelError(f"{serving.model}: what vLLM needs for a model with labels is not known")
        return _labelled_plan(serving)
    return _onnx_plan(serving) if serving.runtime == "onnxruntime" else _vllm_plan(serving)


def _labelled_plan(serving: Serving) -> plan_plan.Plan:
    """The weights, and what the process needs without them; the states of a batch of 512 tokens are small beside either."""
    weights = sum(file.stat().st_size for file in Path(serving.model).glob("*.onnx*"))
    items = [
        plan_items.MemoryItem("weights", weights, True, f"{weights:,} bytes of {Path(serving.model).name} on disk"),
        plan_items.MemoryItem(
            "runtime", ONNX_BYTES, False, "measured: the interpreter with transformers and ONNX Runtime"
        ),
    ]
    limit = serving.device.memory_bytes
    return _with_items(plan_plan.Plan(True, gpus.title(serving.device), limit, 0, "serve", (), ()), items)


def _vllm_plan(serving: Serving) -> plan_plan.Plan:
    plan = plan_plan.plan(serving.recipe, device=serving.device, stage="serve")
    size = _file_bytes(serving)
    if not size:
        return plan
    on_disk = f"{size:,} bytes of {Path(serving.model).name} on disk"
    weights = plan_items.MemoryItem("weights", size, True, on_disk)
    return _with_items(plan, [weights if item.name == "weights" else item for item in plan.items])


def _onnx_plan(serving: Serving) -> plan_plan.Plan:
    """The engine keeps a cache of the model's full length for each running request."""
    model = read_json(Path(serving.model) / "genai_config.json")["model"]
    decoder = model["decoder"]
    section, size = serving.section, _file_bytes(serving)
    seqs, length = section.max_num_seqs or ONNX_SEQS, model["context_length"]
    width = 2 * decoder["num_hidden_layers"] * decoder["num_key_value_heads"] * decoder["head_size"] * ONNX_CACHE_BYTES
    items = [
        plan_items.MemoryItem("weights", size, True, f"{size:,} bytes of {Path(serving.model).name} on disk"),
        plan_items.MemoryItem("kv_cache", seqs * length * width, True, f"{seqs} x {length:,} tokens x {width:,} bytes"),
        plan_items.MemoryItem(
            "runtime", ONNX_BYTES, False, "measured: the interpreter with transformers and ONNX Runtime"
        ),
    ]
    limit = serving.device.memory_bytes
    remedy = remedies.Remedy(
        (f"serve.max_num_seqs={max(1, seqs // 2)}",), (seqs - seqs // 2) * length * width, "fewer requests at once"
    )
    empty = plan_plan.Plan(True, gpus.title(serving.device), limit, 0, "serve", (), (remedy,) if seqs > 1 else ())
    return _with_items(empty, items)


def _with_items(plan: plan_plan.Plan, items: Sequence[plan_items.MemoryItem]) -> plan_plan.Plan:
    peak = sum(item.bytes for item in items)
    return replace(plan, items=tuple(items), peak_bytes=peak, fits=peak <= plan.device_bytes)


def _file_bytes(serving: Serving) -> int:
    """The size of the weights on this disk; 0 if they are elsewhere."""
    if is_adapter(Path(serving.model)):
        return 0  # the weights that count are the base's, in another folder
    return sum(file.stat().st_size for kind in (SHARDS, "*.onnx.data") for file in Path(serving.model).glob(kind))
