"""Whether a server's weights and cache fit, and what else to serve them with."""

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


ONNX_SEQS = 4  # as many as onnxruntime-genai's own default
ONNX_CACHE_BYTES = 4  # of a number in the cache
ONNX_BYTES = 460 << 20


# --- does it fit --------------------------------------------------------------------------------------------------------


def cache_bytes(how: Recipe) -> int:
    """What serve.concurrency conversations of full length need; 0 when the model's shape cannot be had."""
    try:
        return how.serve.concurrency * kv_bytes(shape_of(how.model), how.serve.max_model_len)
    except (ModelError, MissingExtra):
        return 0


def planned(serving: Serving) -> plan_plan.Plan | None:
    """The memory plan; None when the model's shape cannot be had. Weights on this disk count as what they are there.

    Raises:
        DoesNotFit: it needs more than the device has; the message says what to change.
    """
    try:
        made = _onnx_plan(serving) if serving.runtime == "onnxruntime" else _vllm_plan(serving)
    except (ModelError, MissingExtra):
        return None
    if not made.fits:
        raise DoesNotFit(f"{serving.name}: {plan_plan.refusal(made)}")
    return made


def _vllm_plan(serving: Serving) -> plan_plan.Plan:
    made = plan_plan.plan(serving.recipe, device=serving.device, stage="serve")
    size = _file_bytes(serving)
    if not size:
        return made
    on_disk = f"{size:,} bytes of {Path(serving.model).name} on disk"
    weights = plan_items.MemoryItem("weights", size, True, on_disk)
    return _of_items(made, [weights if item.name == "weights" else item for item in made.items])


def _onnx_plan(serving: Serving) -> plan_plan.Plan:
    """The engine keeps a cache of the model's full length for each request that runs."""
    decoder = (model := read_json(Path(serving.model) / "genai_config.json")["model"])["decoder"]
    section, size = serving.section, _file_bytes(serving)
    many, length = section.max_num_seqs or ONNX_SEQS, model["context_length"]
    width = 2 * decoder["num_hidden_layers"] * decoder["num_key_value_heads"] * decoder["head_size"] * ONNX_CACHE_BYTES
    items = [
        plan_items.MemoryItem("weights", size, True, f"{size:,} bytes of {Path(serving.model).name} on disk"),
        plan_items.MemoryItem("kv_cache", many * length * width, True, f"{many} x {length:,} tokens x {width:,} bytes"),
        plan_items.MemoryItem(
            "runtime", ONNX_BYTES, False, "measured: the interpreter with transformers and ONNX Runtime"
        ),
    ]
    limit = serving.device.memory_bytes
    remedy = remedies.Remedy(
        (f"serve.max_num_seqs={max(1, many // 2)}",), (many - many // 2) * length * width, "fewer at once"
    )
    made = plan_plan.Plan(True, gpus.title(serving.device), limit, 0, "serve", (), (remedy,) if many > 1 else ())
    return _of_items(made, items)


def _of_items(made: plan_plan.Plan, items: Sequence[plan_items.MemoryItem]) -> plan_plan.Plan:
    peak = sum(item.bytes for item in items)
    return replace(made, items=tuple(items), peak_bytes=peak, fits=peak <= made.device_bytes)


def _file_bytes(serving: Serving) -> int:
    """Of the weights, as far as they are on this disk."""
    if is_adapter(Path(serving.model)):
        return 0  # its base's weights are what counts, and they are elsewhere
    return sum(file.stat().st_size for kind in (SHARDS, "*.onnx.data") for file in Path(serving.model).glob(kind))
