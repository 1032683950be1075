"""The memory of each stage at its peak, item by item: arithmetic on a model's shape, without torch.

fixed_memory.py is exact, train_step.py adds the tensors that come and go in training, and _overhead.py adds what was measured or fitted. An
item that is not exact is shown with `~`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace

from qkit.core.device import Device
from qkit.core.figures import MIB, mib
from qkit.model.shape import Shape, experts, linears, parameters
from qkit.plan._overhead import HOST, fixed_item, overhead_of
from qkit.plan.fixed_memory import ADAPTER_BYTES, BASE_BYTES, adapter_count, base_weights, folds, optimizer_item
from qkit.plan.items import MemoryItem
from qkit.plan.train_step import Moment, Part, TrainStep, logits_formula, logits_part, moments, overhead_items, step_of
from qkit.plugins.runtime import PREFILL_TOKENS
from qkit.plugins.task import open_task
from qkit.recipe import validation
from qkit.recipe.schema import WHOLE, Recipe

DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
BATCH_BYTES = 3 * 8  # per token: id, label and position, each int64


def train_items(recipe: Recipe, shape: Shape, device: Device, labelled: int | None) -> tuple[MemoryItem, ...]:
    """The items at the peak of a training step. `labelled`: tokens with loss in a micro-batch; None: unknown."""
    step = step_of(recipe, shape, device, labelled)
    width = DTYPE_BYTES[recipe.quantization.bnb_4bit_compute_dtype] if recipe.quantization.load_in_4bit else 0
    by_name = moments(step, _largest(shape) * width, recipe.train.optim)
    if validation.evaluates(recipe) and validation.scores_rows(recipe):
        by_name["answers to validation rows"] = _answering(recipe, shape, _largest(shape) * width)
    name = max(by_name, key=lambda name: by_name[name].bytes)
    peak = by_name[name]
    others = f" and {step.parameters:,} parameters of experts or routers" if step.parameters else ""
    trained = f"{step.trained:,} parameters in {step.modules:,} modules{others} at rank {step.rank} x 4 bytes"
    gradients = trained if peak.gradients else f"none yet at the peak ({name})"
    return (
        base_weights(shape, recipe.quantization.load_in_4bit, recipe.quantization.bnb_4bit_use_double_quant),
        MemoryItem("adapter", step.trained * ADAPTER_BYTES, shape.exact, trained),
        MemoryItem("gradients", peak.gradients, shape.exact, gradients),
        optimizer_item(recipe, shape),
        *_passing_items(name, peak, step),
        _batch(step),
        *overhead_items(step, max(moment.activation_bytes for moment in by_name.values())),
    )


def _answering(recipe: Recipe, shape: Shape, dequantized: int) -> Moment:
    """An evaluation between two steps generates answers."""
    parts = tuple(Part(item.name, 1, 1, item.bytes) for item in answer_items(recipe, shape))
    return Moment(activations=parts, dequantized=dequantized)


def _passing_items(name: str, peak: Moment, step: TrainStep) -> tuple[MemoryItem, ...]:
    """Activations, logits and working space at the peak, which is called `name`."""
    parts = tuple(part.item() for part in peak.activations)
    activations = f"sum of its parts at the peak: {name}" if parts else f"none at the peak: {name}"
    gone = f"none at the peak ({name}); {mib(logits_part(step).bytes)} at the loss"
    workspace = (
        ("bf16 copies of the adapter", peak.copies),
        ("the largest matrix dequantized", peak.dequantized),
        ("the square roots in the update", peak.update),
        ("embedding or head with the learnt rows inserted, and its gradient", peak.matrices),
    )
    formula = " + ".join(f"{text} {mib(size)}" for text, size in workspace if size)
    return (
        MemoryItem("activations", peak.activation_bytes, False, activations, parts),
        MemoryItem("logits", peak.logits, False, logits_formula(step) if peak.logits else gone),
        MemoryItem("workspace", sum(size for _, size in workspace), False, formula or f"none at the peak: {name}"),
    )


@functools.cache
def _largest(shape: Shape) -> int:
    return max(linear.weights for linear, _ in linears(shape))


def _batch(step: TrainStep) -> MemoryItem:
    mask = step.length**2 if step.packed else 0
    masks = f" + a mask of {step.length:,} x {step.length:,} bytes" if mask else ""
    formula = f"{step.tokens:,} tokens x {BATCH_BYTES} bytes (ids, labels, positions){masks}"
    return MemoryItem("batch", step.tokens * BATCH_BYTES + mask, False, formula)


def load_items(recipe: Recipe, shape: Shape, device: Device) -> tuple[MemoryItem, ...]:
    """The weights as training holds them, and the largest matrix before it is quantized."""
    tensor = _largest(shape) if recipe.quantization.load_in_4bit else 0
    if recipe.method in WHOLE:
        return *_whole(shape), fixed_item(overhead_of(device))
    return (
        base_weights(shape, recipe.quantization.load_in_4bit, recipe.quantization.bnb_4bit_use_double_quant),
        MemoryItem(
            "workspace",
            tensor * BASE_BYTES,
            False,
            f"estimate: the largest matrix before quantization, {tensor:,} x 2 bytes",
        ),
        fixed_item(overhead_of(device)),
    )


def evaluate_items(recipe: Recipe, shape: Shape, device: Device) -> tuple[MemoryItem, ...]:
    """The weights, dequantized to 16 bits; then either a batch of answers or the log-probabilities of one row, whichever is larger."""
    trained, count = adapter_count(recipe, shape), parameters(shape)
    answers = answer_items(recipe, shape)
    outputs = open_task(recipe.task).head_outputs(recipe, shape.vocabulary)
    scored = recipe.data.max_length * outputs * (2 + 4 + 4)
    answering = sum(item.bytes for item in answers) >= scored
    logits = f"bound: a row of {recipe.data.max_length:,} tokens x {outputs:,} x (2 + 4 + 4) bytes"
    folded = folds(recipe, shape).layer_bytes
    whole = MemoryItem("experts", folded, False, "bound: the experts of one layer with their adapters added, in bf16")
    held = (
        MemoryItem("weights", count * BASE_BYTES, shape.exact, f"{count:,} parameters x 2 bytes: dequantized once"),
        MemoryItem("adapter", trained * ADAPTER_BYTES, shape.exact, f"{trained:,} parameters x 4 bytes"),
        *([whole] if folded else []),
    )
    copies = MemoryItem("copies", count * BASE_BYTES, False, f"{count:,} parameters x 2 bytes: made by autocast")
    return (
        *((*_whole(shape), copies) if recipe.method in WHOLE else held),
        *(item if answering else replace(item, bytes=0) for item in answers),
        MemoryItem("logits", 0 if answering else scored, False, logits),
        fixed_item(overhead_of(device)),
    )


def _whole(shape: Shape) -> tuple[MemoryItem]:
    """The weights of a model that was trained itself."""
    count = parameters(shape)
    return (MemoryItem("weights", count * ADAPTER_BYTES, shape.exact, f"{count:,} parameters x 4 bytes"),)


def answer_items(recipe: Recipe, shape: Shape) -> tuple[MemoryItem, ...]:
    """The KV cache of a batch of answers, and the temporaries of one layer during the prefill of all prompts at once.

    PREFILL_TOKENS limits the prompts of a batch. For each product in 16 bits, the adapter, which is in fp32 and not under autocast, computes
    and then scales or adds a second one; the output of the gate exists meanwhile.
    """
    rows, new = recipe.evaluate.batch_size, recipe.evaluate.max_new_tokens
    most = min(recipe.data.max_length, recipe.serve.max_model_len)
    tokens = min(rows * most, max(PREFILL_TOKENS, most))
    each = -(-tokens // rows) + new  # the cache is largest with all rows, each of the same length
    inner = shape.intermediate * (2 * (2 + 4 + 4) if shape.fused else 2 + 2 + 4 + 4)
    # The embeddings, the inputs of the layer and of its MLP, the normed input, and that in fp32.
    outer = shape.hidden * (4 * 2 + 4)
    read = f"bound: {tokens:,} prompt tokens x ({inner:,} of the MLP + {outer:,} of its inputs) bytes, in one layer"
    cached = f"bound: {rows} rows x {each:,} tokens, keys and values in bf16"
    return (
        MemoryItem("kv_cache", rows * kv_bytes(shape, each), False, cached),
        MemoryItem("prefill", tokens * (inner + outer), False, read),
    )


def reference_items(recipe: Recipe, shape: Shape, device: Device) -> tuple[MemoryItem, ...]:
    """The reference model: weights in 16 bits; embedding, head and one layer at a time are cast to fp32."""
    trained, count = adapter_count(recipe, shape), parameters(shape)
    outside = shape.vocabulary * shape.hidden * (1 if shape.tied else 2)
    layer = (count - outside) // shape.layers
    wide = outside * 2 + layer * 4
    folded = 2 * folds(recipe, shape).layer_bytes
    outputs = open_task(recipe.task).head_outputs(recipe, shape.vocabulary)
    scored = recipe.data.max_length * outputs * (4 + 4 + 4)
    held = (
        MemoryItem("weights", count * BASE_BYTES, shape.exact, f"{count:,} parameters x 2 bytes: dequantized once"),
        MemoryItem(
            "float32",
            wide,
            False,
            f"{outside:,} parameters x 2 bytes more, and {layer:,} parameters of one layer x 4 bytes",
        ),
        MemoryItem("adapter", trained * ADAPTER_BYTES, shape.exact, f"{trained:,} parameters x 4 bytes"),
        *(
            [MemoryItem("experts", folded, False, "bound: the experts of one layer with their adapters added, in fp32")]
            if folded
            else []
        ),
    )
    return (
        *(_whole(shape) if recipe.method in WHOLE else held),
        MemoryItem(
            "logits",
            scored,
            False,
            f"bound: a row of {recipe.data.max_length:,} tokens x {outputs:,} x 12 bytes",
        ),
        fixed_item(overhead_of(device)),
    )


def merge_items(recipe: Recipe, shape: Shape, device: Device) -> tuple[MemoryItem, ...]:
    """The largest of three: merging one tensor at a time on the host, computing the reference model, and measuring a merged model
    against that as `evaluate` does."""
    together = (matrix.weights for matrix in experts(shape))  # a checkpoint may store them as one tensor
    tensor = max(_largest(shape), shape.vocabulary * shape.hidden, *together)
    loading = (
        MemoryItem(
            "workspace",
            2 * tensor * BASE_BYTES,
            False,
            f"estimate: the largest tensor and the next one, 2 x {tensor:,} x {BASE_BYTES} bytes; on the host",
        ),
        fixed_item(HOST),
    )
    opened = tuple(item for item in evaluate_items(recipe, shape, device) if item.name not in ("adapter", "experts"))
    candidates = (loading, reference_items(recipe, shape, device), opened)
    return max(candidates, key=lambda items: sum(item.bytes for item in items))


# Copies of the fp32 weights: the builder's peak resident size without a bare process. Measured with a 135M model: 1.1 and 1.6 GB.
ONNX_COPIES = {"fp32": 1, "int4": 2, "int8": 2}


def export_items(recipe: Recipe, shape: Shape, device: Device) -> tuple[MemoryItem, ...]:
    """The largest export, in the host's memory on any device. The exports for vLLM link or copy the merged model."""
    kinds = [name.partition("-")[2] for name in recipe.export.formats if name.startswith("onnx")]
    copies = max((ONNX_COPIES.get(kind, 2) for kind in kinds), default=0)
    count = parameters(shape)
    formula = (
        f"measured on one model: {copies} x {count:,} parameters in fp32" if copies else "files are linked or copied"
    )
    return (
        MemoryItem("weights", copies * count * 4, False, f"{formula}; on the host"),
        MemoryItem("process", 560 * MIB, False, "measured: the interpreter with torch and transformers"),
    )


def kv_bytes_per_token(shape: Shape) -> int:
    """Bytes of keys and values of one token in all layers, in 16 bits."""
    return 2 * shape.layers * shape.kv * BASE_BYTES


def kv_bytes(shape: Shape, length: int) -> int:
    """Bytes of keys and values of a conversation of `length` tokens. Layers with a sliding window keep at most the window."""
    windowed = min(length, shape.window or length) * shape.windowed
    return 2 * shape.kv * BASE_BYTES * ((shape.layers - shape.windowed) * length + windowed)


def serve_items(recipe: Recipe, shape: Shape, device: Device) -> tuple[MemoryItem, ...]:
    """vLLM with the merged model, and a KV cache for serve.concurrency conversations of serve.max_model_len tokens."""
    count, width, overhead = parameters(shape), DTYPE_BYTES[recipe.merge.dtypes[0]], overhead_of(device)
    length, many = recipe.serve.max_model_len, recipe.serve.concurrency
    cache = many * kv_bytes(shape, length)
    window = (
        f", {shape.windowed} of them at most {shape.window:,} tokens" if shape.window and shape.window < length else ""
    )
    count_text = "one conversation" if many == 1 else f"{many} conversations"
    cached = (
        f"{count_text} of {length:,} tokens x {kv_bytes_per_token(shape):,} bytes over {shape.layers} layers{window}"
    )
    return (
        MemoryItem("weights", count * width, shape.exact, f"{count:,} parameters x {width} bytes"),
        MemoryItem("kv_cache", cache, shape.exact, cached),
        MemoryItem("runtime", overhead.vllm_bytes, False, overhead.vllm_formula),
    )


def conversations(items: Sequence[MemoryItem], available: int, shape: Shape, length: int) -> int:
    """How many conversations of `length` tokens a server holds at once if the KV cache takes all remaining memory of `available` bytes."""
    taken = sum(item.bytes for item in items if item.name != "kv_cache")
    return max(0, (available - taken) // kv_bytes(shape, length))
