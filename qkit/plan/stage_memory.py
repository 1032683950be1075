"""What each stage holds at its peak, item by item: arithmetic on a model's shape, without torch.

`qkit.weights` is exact, `qkit.step` is what comes and goes in training. What only a measurement can tell (the process, what an allocator
holds back) is marked `~`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace

from qkit.core.device import Device
from qkit.core.figures import MIB, mib
from qkit.model.shape import Shape, experts, linears, parameters
from qkit.plan.fixed_memory import ADAPTER_BYTES, BASE_BYTES, adapter_sizes, base_weights, folds, optimizer_item
from qkit.plan.items import MemoryItem
from qkit.plan.train_step import OVERHEADS, Moment, Step, around, logits_how, logits_part, moments, step_of
from qkit.plugins.runtime import PREFILL_TOKENS
from qkit.recipe.schema import Recipe

DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
BATCH_BYTES = 3 * 8  # per token: id, label and position, each int64


def train_items(how: Recipe, shape: Shape, device: Device, labelled: int | None) -> tuple[MemoryItem, ...]:
    """The items at the peak of a training step."""
    step = step_of(how, shape, device, labelled)
    width = DTYPE_BYTES[how.quantization.bnb_4bit_compute_dtype] if how.quantization.load_in_4bit else 0
    all_moments = moments(step, _largest(shape) * width, how.train.optim)
    moment = max(all_moments, key=lambda moment: moment.bytes)
    parameters_too = f" and {step.parameters:,} parameters of experts or routers" if step.parameters else ""
    trained = f"{step.trained:,} parameters in {step.modules:,} modules{parameters_too} at rank {step.rank} x 4 bytes"
    gradients = trained if moment.gradients else "none yet at the peak"
    return (
        base_weights(shape, how.quantization.load_in_4bit, how.quantization.bnb_4bit_use_double_quant),
        MemoryItem("adapter", step.trained * ADAPTER_BYTES, shape.exact, trained),
        MemoryItem("gradients", moment.gradients, shape.exact, gradients),
        optimizer_item(how, shape),
        *_moving_items(moment, step),
        _batch(step),
        *around(step, max(moment.kept for moment in all_moments)),
    )


def _moving_items(moment: Moment, step: Step) -> tuple[MemoryItem, ...]:
    """Activations, logits and working space at a moment."""
    parts = tuple(part.item() for part in moment.activations)
    kept = "sum of its parts" if parts else "gone at the update"
    at_head = logits_how(step) if moment.logits else f"gone at the peak; {mib(logits_part(step).bytes)} before it"
    copies = f"bf16 copies of the adapter {mib(moment.copies)}"
    matrix = f"the largest matrix dequantized {mib(moment.dequantized)}"
    update = f"the update's square roots {mib(moment.update)}"
    rows = f"embedding or head with learnt rows put in, and their gradients {mib(moment.matrices)}"
    space = moment.copies + moment.dequantized + moment.update + moment.matrices
    every = (
        (copies, moment.copies),
        (matrix, moment.dequantized),
        (update, moment.update),
        (rows, moment.matrices),
    )
    said = [text for text, size in every if size]
    return (
        MemoryItem("activations", moment.kept, False, kept, parts),
        MemoryItem("logits", moment.logits, False, at_head),
        MemoryItem("workspace", space, False, " + ".join(said) or "none at the peak"),
    )


@functools.cache
def _largest(shape: Shape) -> int:
    return max(linear.weights for linear, _ in linears(shape))


def _batch(step: Step) -> MemoryItem:
    mask = step.length**2 if step.packed else 0
    masks = f" + a mask of {step.length:,} x {step.length:,} bytes" if mask else ""
    how = f"{step.tokens:,} tokens x {BATCH_BYTES} bytes (ids, labels, positions){masks}"
    return MemoryItem("batch", step.tokens * BATCH_BYTES + mask, False, how)


def load_items(how: Recipe, shape: Shape, device: Device) -> tuple[MemoryItem, ...]:
    """Loading: the weights as training holds them, and the largest matrix that is still to be quantized."""
    tensor = _largest(shape) if how.quantization.load_in_4bit else 0
    name, size, formula = OVERHEADS[device.meter].fixed
    return (
        base_weights(shape, how.quantization.load_in_4bit, how.quantization.bnb_4bit_use_double_quant),
        MemoryItem(
            "workspace", tensor * BASE_BYTES, False, f"estimate: the largest matrix as it is read, {tensor:,} x 2 bytes"
        ),
        MemoryItem(name, size, False, formula),
    )


def evaluate_items(how: Recipe, shape: Shape, device: Device) -> tuple[MemoryItem, ...]:
    """The 4-bit weights are dequantized once; then a batch of answers, its prompts read at once, or the log-probabilities of a row."""
    name, size, formula = OVERHEADS[device.meter].fixed
    trained, count = sum(adapter_sizes(how, shape)), parameters(shape)
    answers = _answer_items(how, shape)
    scored = how.data.max_length * shape.vocabulary * (2 + 4 + 4)
    answering = sum(item.bytes for item in answers) >= scored
    logits = f"bound: a row of {how.data.max_length:,} tokens x {shape.vocabulary:,} x (2 + 4 + 4) bytes"
    folded = folds(how, shape).layer_bytes
    whole = MemoryItem("experts", folded, False, "bound: those of a layer with their adapters put in, in bf16")
    return (
        MemoryItem("weights", count * BASE_BYTES, shape.exact, f"{count:,} parameters x 2 bytes: dequantized once"),
        MemoryItem("adapter", trained * ADAPTER_BYTES, shape.exact, f"{trained:,} parameters x 4 bytes"),
        *([whole] if folded else []),
        *(item if answering else replace(item, bytes=0) for item in answers),
        MemoryItem("logits", 0 if answering else scored, False, logits),
        MemoryItem(name, size, False, formula),
    )


def _answer_items(how: Recipe, shape: Shape) -> tuple[MemoryItem, ...]:
    """The cache of a batch of answers, and what a layer makes of its prompts, all of which are read at once.

    A batch has as many prompts as PREFILL_TOKENS lets. Beside a product in 16 bits the adapter, which is in fp32 and not under autocast,
    makes its own, scales or adds it, and what comes of the gate waits meanwhile.
    """
    rows, new, most = (
        how.evaluate.batch_size,
        how.evaluate.max_new_tokens,
        min(how.data.max_length, how.serve.max_model_len),
    )
    tokens = min(rows * most, max(PREFILL_TOKENS, most))
    each = -(-tokens // rows) + new  # as many rows as there may be of as many tokens take most
    inner = shape.intermediate * (2 * (2 + 4 + 4) if shape.fused else 2 + 2 + 4 + 4)
    outer = shape.hidden * (
        4 * 2 + 4
    )  # the embeddings, what comes into the layer and into its MLP, that normed, and that in fp32
    read = f"bound: {tokens:,} tokens of prompts x ({inner:,} of the MLP + {outer:,} of its inputs) bytes, in one layer"
    cached = f"bound: {rows} rows x {each:,} tokens, keys and values in bf16"
    return (
        MemoryItem("kv_cache", rows * kv_bytes(shape, each), False, cached),
        MemoryItem("prefill", tokens * (inner + outer), False, read),
    )


def reference_items(how: Recipe, shape: Shape, device: Device) -> tuple[MemoryItem, ...]:
    """The trained model computed in fp32: its weights in 16 bits, of which embedding, head and one layer at a time are widened."""
    name, size, formula = OVERHEADS[device.meter].fixed
    trained, count = sum(adapter_sizes(how, shape)), parameters(shape)
    outside = shape.vocabulary * shape.hidden * (1 if shape.tied else 2)
    layer = (count - outside) // shape.layers
    wide = outside * 2 + layer * 4
    folded = 2 * folds(how, shape).layer_bytes
    scored = how.data.max_length * shape.vocabulary * (4 + 4 + 4)
    return (
        MemoryItem("weights", count * BASE_BYTES, shape.exact, f"{count:,} parameters x 2 bytes: dequantized once"),
        MemoryItem(
            "float32", wide, False, f"{outside:,} parameters x 2 bytes more, and {layer:,} of a layer x 4 bytes"
        ),
        MemoryItem("adapter", trained * ADAPTER_BYTES, shape.exact, f"{trained:,} parameters x 4 bytes"),
        *(
            [MemoryItem("experts", folded, False, "bound: those of a layer with their adapters put in, in fp32")]
            if folded
            else []
        ),
        MemoryItem(
            "logits", scored, False, f"bound: a row of {how.data.max_length:,} tokens x {shape.vocabulary:,} x 12 bytes"
        ),
        MemoryItem(name, size, False, formula),
    )


def merge_items(how: Recipe, shape: Shape, device: Device) -> tuple[MemoryItem, ...]:
    """Tensor by tensor on the host; then what was trained is computed in fp32, and each merged model opened and measured against that, as
    evaluate does with the live one. The largest of the three."""
    together = (matrix.weights for matrix in experts(shape))  # a checkpoint may hold them so
    tensor = max(_largest(shape), shape.vocabulary * shape.hidden, *together)
    _, size, formula = OVERHEADS["rss"].fixed
    moving = (
        MemoryItem(
            "workspace",
            2 * tensor * BASE_BYTES,
            False,
            f"estimate: the largest tensor and the next one, 2 x {tensor:,} x {BASE_BYTES} bytes; on the host",
        ),
        MemoryItem("process", size, False, formula),
    )
    opened = tuple(item for item in evaluate_items(how, shape, device) if item.name not in ("adapter", "experts"))
    ways = (moving, reference_items(how, shape, device), opened)
    return max(ways, key=lambda items: sum(item.bytes for item in items))


# Peak resident size of the builder less a bare process, over the fp32 weights of a 135M model: 1.1 and 1.6 GB measured.
ONNX_COPIES = {"fp32": 1, "int4": 2, "int8": 2}


def export_items(how: Recipe, shape: Shape, device: Device) -> tuple[MemoryItem, ...]:
    """The largest of the exports, in the host's memory whatever the device; what vLLM loads is the merged model itself."""
    made = [name.partition("-")[2] for name in how.export.formats if name.startswith("onnx")]
    copies = max((ONNX_COPIES.get(kind, 2) for kind in made), default=0)
    count = parameters(shape)
    how_many = (
        f"measured on one model: {copies} x {count:,} parameters in fp32" if copies else "files are linked or copied"
    )
    return (
        MemoryItem("weights", copies * count * 4, False, f"{how_many}; on the host"),
        MemoryItem("process", 560 * MIB, False, "measured: the interpreter with torch and transformers"),
    )


def kv_bytes_per_token(shape: Shape) -> int:
    """Keys and values of one token in all layers, in 16 bits."""
    return 2 * shape.layers * shape.kv * BASE_BYTES


def kv_bytes(shape: Shape, length: int) -> int:
    """Keys and values of a conversation: layers with a sliding window keep no more than that."""
    windowed = min(length, shape.window or length) * shape.windowed
    return 2 * shape.kv * BASE_BYTES * ((shape.layers - shape.windowed) * length + windowed)


def serve_items(how: Recipe, shape: Shape, device: Device) -> tuple[MemoryItem, ...]:
    """vLLM with the merged model and room for serve.concurrency conversations of full length; more of it serves more users at once."""
    count, width, overhead = parameters(shape), DTYPE_BYTES[how.merge.dtypes[0]], OVERHEADS[device.meter]
    length, many = how.serve.max_model_len, how.serve.concurrency
    cache = many * kv_bytes(shape, length)
    window = (
        f", {shape.windowed} of them no more than {shape.window:,}" if shape.window and shape.window < length else ""
    )
    who = "one conversation" if many == 1 else f"{many} conversations"
    cached = f"{who} of {length:,} tokens x {kv_bytes_per_token(shape):,} bytes over {shape.layers} layers{window}"
    return (
        MemoryItem("weights", count * width, shape.exact, f"{count:,} parameters x {width} bytes"),
        MemoryItem("kv_cache", cache, shape.exact, cached),
        MemoryItem("runtime", overhead.vllm_bytes, False, overhead.vllm_how),
    )


def conversations(items: Sequence[MemoryItem], available: int, shape: Shape, length: int) -> int:
    """How many conversations of this length a server holds at once, when the cache takes all that is left."""
    taken = sum(item.bytes for item in items if item.name != "kv_cache")
    return max(0, (available - taken) // kv_bytes(shape, length))
