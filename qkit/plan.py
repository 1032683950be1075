"""The memory plan: what a stage will need, item by item, before anything is loaded. Arithmetic only; imports no torch.

What has a known layout (weights, adapter, gradients, optimizer state) is exact to the byte. Activations are counted per
token from what autograd keeps of each layer; logits and working space follow from the head and the largest matrix.
The rest (the process, the CUDA context, what the allocator holds back) is measured or estimated, and marked so.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from qkit import cards
from qkit.device import Device, detect
from qkit.errors import ModelError, RecipeError
from qkit.recipe import Recipe
from qkit.shape import Linear, Shape, layer_linears, other_parameters, parameters, shape_of

if TYPE_CHECKING:
    from rich.console import RenderableType

GIB = 2**30
MIB = 2**20

BLOCK = 64  # bitsandbytes: weights that share one absmax
NESTED_BLOCK = 256  # double quantization: absmax values that share one absmax of their own
CODE_BYTES = 16 * 4  # per matrix: the 16 values of NF4 or FP4 in fp32
NESTED_CODE_BYTES = 256 * 4  # once: the 256 values of the 8-bit absmax in fp32
OFFSET_BYTES = 4  # per matrix, double quantization: the mean that was taken off the absmax

DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
BASE_BYTES = 2  # whatever is not quantized is loaded in bf16
ADAPTER_BYTES = 4  # the adapter is trained in fp32
AUTOCAST_BYTES = 2  # and autocast keeps a bf16 copy of it for the length of a forward and backward

# Values that an optimizer keeps per trained parameter: in fp32, or, for matrices of 4,096 values and more, in 8 bit
# with one fp32 absmax for each 256.
MOMENTS = {"adamw": 2, "adam": 2, "ademamix": 3, "lion": 1, "rmsprop": 1, "sgd": 0, "adagrad": 1}
SMALLEST_8BIT = 4096
STATE_BLOCK = 256

# The head on labelled positions: log-probabilities, their gradient and the logits' gradient in fp32.
LABELLED_LOGIT_BYTES = 12
# TRL's fused head on GPUs: one bf16 tile of at most so many tokens by so many entries of the vocabulary.
TILE_TOKENS = 4096
TILE_VOCABULARY = 32768

MOVING = ("activations", "logits", "workspace")  # items that come and go within a step


@dataclass(frozen=True)
class Overhead:
    """What a device takes beside the tensors. `fixed` is an item's name, bytes and formula."""

    fixed: tuple[str, int, str]
    held_back: float  # bytes that the allocator keeps to itself, per byte of what comes and goes
    vllm_bytes: int
    copies: (
        bool  # peft casts each adapter's input to fp32 unless CUDA's autocast is on, and CPU's autocast casts it back
    )
    unmetered: frozenset[str] = frozenset()  # items that the meter does not see


# By meter, since what counts as needed depends on who counts.
OVERHEADS = {
    "cuda_allocated": Overhead(
        fixed=("context", 600 * MIB, "estimate: CUDA context, kernels, cuBLAS"),
        held_back=0.0,
        vllm_bytes=1536 * MIB,  # estimate, with its CUDA graphs
        copies=False,
        unmetered=frozenset({"context"}),
    ),
    "rss": Overhead(
        # 556 MiB after importing torch, transformers, peft, trl, bitsandbytes, datasets; the rest is the trainer, the
        # tokenizer, the rows, and what loading leaves behind: what was missing to the measured peak of a 135M model
        fixed=("process", 960 * MIB, "measured: the interpreter with torch, transformers, peft and trl"),
        # resident size grows by 1.46 bytes for each byte of activations: glibc keeps freed blocks between those in use,
        # those of activations that (non-reentrant) checkpointing drops as well
        held_back=0.46,
        vllm_bytes=1126 * MIB,  # measured over its two processes
        copies=True,
    ),
}


@dataclass(frozen=True)
class MemoryItem:
    """A part of the peak. `exact`: to the byte; else a bound or an estimate, as `formula` says."""

    name: str
    bytes: int
    exact: bool
    formula: str


@dataclass(frozen=True)
class Remedy:
    """Recipe values that lower the peak, what they save on top of the remedies before, and what they cost."""

    set: tuple[str, ...]
    saves_bytes: int
    price: str


@dataclass(frozen=True)
class Plan:
    """What a stage needs at its peak: the items, summing to `peak_bytes`. `device_bytes`: what the device gives."""

    fits: bool
    device: str
    device_bytes: int
    peak_bytes: int
    stage: str
    items: tuple[MemoryItem, ...]
    remedies: tuple[Remedy, ...] = ()


def plan(
    recipe: Recipe,
    device_bytes: int | None = None,
    device: Device | None = None,
    stage: str = "train",
    labelled_tokens: int | None = None,
) -> Plan:
    """The plan of a stage (train or serve) on a device, by default this machine's.

    `device_bytes` puts a limit in the place of what the device has. `labelled_tokens`: the most of one batch that carry
    loss, when the rows are known; else all of them are counted.

    Raises:
        ModelError: the model's shape cannot be had.
    """
    device = device or detect()
    shape = shape_of(recipe.model)
    limit = cards.usable_bytes(device) if device_bytes is None else device_bytes

    def made(how: Recipe) -> Plan:
        if stage == "serve":
            items, available = _serve_items(how, shape, device), _server_share(how, device, limit)
        else:
            items, available = _train_items(how, shape, device, labelled_tokens), limit
        peak = sum(item.bytes for item in items)
        return Plan(peak <= available, cards.title(device), available, peak, stage, items)

    found = made(recipe)
    return found if found.fits else replace(found, remedies=tuple(_remedies(recipe, found, made, device)))


def predicted_items(recipe: Recipe, device: Device, labelled_tokens: int | None = None) -> dict[str, int]:
    """Bytes by name of what the device's meter should see at the peak of training; empty when the shape is unknown."""
    try:
        items = plan(recipe, device=device, labelled_tokens=labelled_tokens).items
    except ModelError:
        return {}
    return {item.name: item.bytes for item in items if item.name not in OVERHEADS[device.meter].unmetered}


def predicted_peak_bytes(recipe: Recipe, stage: str, device: Device, labelled_tokens: int | None = None) -> int | None:
    """What the device's meter should read after a stage; None for stages that are not planned."""
    if stage != "train":
        return None
    return sum(predicted_items(recipe, device, labelled_tokens).values()) or None


def device_for(card: str | None, memory: str | None) -> Device | None:
    """The device that the command line names: a known card, a GPU of some size, or None for this machine.

    Raises:
        UserError: no such card, or the size cannot be read.
    """
    named = cards.device(card) if card else None
    if memory is None:
        return named
    size = _bytes_of(memory)
    return replace(named, memory_bytes=size) if named else Device("cuda", f"{memory} card", size, cores=1)


def _bytes_of(text: str) -> int:
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?\s*", text, re.IGNORECASE)
    if not match or float(match[1]) == 0:
        raise RecipeError(f"--memory {text}: write a size such as 24GiB or 8GB")
    power = " KMGT".index(match[2].upper() or " ")
    return int(float(match[1]) * (1024 if match[3] else 1000) ** power)


def to_dict(made: Plan) -> dict[str, Any]:
    """The plan as a JSON document."""
    return asdict(made)


# --- weights and what is trained ------------------------------------------------------------------------------------


def quantized_bytes(weights: int, double_quant: bool) -> int:
    """Bytes of one 4-bit matrix as bitsandbytes stores it: packed values, absmax, code table."""
    packed = -(-weights // 2)
    blocks = -(-weights // BLOCK)
    if not double_quant:
        return packed + 4 * blocks + CODE_BYTES
    return packed + blocks + 4 * -(-blocks // NESTED_BLOCK) + CODE_BYTES + OFFSET_BYTES


def weight_bytes(recipe: Recipe, shape: Shape) -> int:
    """Bytes of the base model as training holds it: every linear of the layers in 4 bit, the rest in bf16."""
    if not recipe.quantization.load_in_4bit:
        return parameters(shape) * BASE_BYTES
    nested = recipe.quantization.bnb_4bit_use_double_quant
    layer = sum(quantized_bytes(linear.weights, nested) for linear in layer_linears(shape))
    return other_parameters(shape) * BASE_BYTES + shape.layers * layer + (NESTED_CODE_BYTES if nested else 0)


def adapted(recipe: Recipe, shape: Shape) -> list[Linear]:
    """The modules that get an adapter, as peft reads `target_modules`; one entry per module of the model.

    Raises:
        ModelError: nothing is named so.
    """
    targets = recipe.lora.target_modules
    layer = layer_linears(shape)
    modules = [replace(linear, name=f"model.layers.{i}.{linear.name}") for i in range(shape.layers) for linear in layer]
    if targets == "all-linear":
        return modules
    modules.append(Linear("lm_head", shape.hidden, shape.vocabulary))
    modules.append(Linear("model.embed_tokens", shape.vocabulary, shape.hidden))
    if isinstance(targets, str):
        chosen = [module for module in modules if re.fullmatch(targets, module.name)]
    else:
        chosen = [module for module in modules if any(f".{module.name}".endswith(f".{target}") for target in targets)]
    if not chosen:
        names = ", ".join(linear.name.rpartition(".")[2] for linear in layer)
        raise ModelError(f"lora.target_modules={targets!r} names no module of this model; it has {names}")
    return chosen


def adapter_sizes(recipe: Recipe, shape: Shape) -> list[int]:
    """Trained parameters, matrix by matrix: A is r x inputs, B is outputs x r."""
    return [recipe.lora.r * width for module in adapted(recipe, shape) for width in (module.inputs, module.outputs)]


def optimizer_bytes(optim: str, sizes: Sequence[int]) -> int:
    """State that an optimizer of this name keeps for matrices of these sizes (an unknown one is taken for Adam)."""
    name = optim.removeprefix("paged_")
    moments = MOMENTS.get(name.partition("_")[0], 2)
    if not name.endswith("8bit"):
        return moments * 4 * sum(sizes)
    return sum(moments * (n + 4 * -(-n // STATE_BLOCK) if n >= SMALLEST_8BIT else 4 * n) for n in sizes)


def kv_bytes_per_token(shape: Shape) -> int:
    """Keys and values of one token in all layers, in 16 bits."""
    return 2 * shape.layers * shape.kv * BASE_BYTES


# --- training -------------------------------------------------------------------------------------------------------


def layer_bytes_per_token(recipe: Recipe, shape: Shape, device: Device) -> int:
    """Bytes that autograd keeps of one layer and token, in bf16 under autocast with frozen weights.

    Products with frozen matrices keep no input. Norms keep an fp32 copy of their input, and their output; attention
    keeps queries, keys, values, its output and a log-sum per head; the gated MLP four tensors of its width; an adapter
    r values.
    """
    layer = layer_linears(shape)
    norms = shape.norms_per_layer * (6 * shape.hidden + 4)
    attention = 4 * shape.attention + 4 * shape.kv + 4 * shape.heads
    if shape.qk_norm:
        attention += 6 * (shape.attention + shape.kv)
    if recipe.model.attn_implementation == "eager":
        attention += 8 * shape.heads * recipe.data.max_length  # scores in fp32, probabilities in fp32 and bf16 at once
    adapters = 2 * recipe.lora.r * len(layer)
    if recipe.lora.lora_dropout:
        adapters += 3 * sum(linear.inputs for linear in layer)  # a mask, and an input of its own for each adapter
    return norms + attention + 8 * shape.intermediate + adapters + _copies_per_token(shape, device)


def _copies_per_token(shape: Shape, device: Device) -> int:
    """Bytes of the adapters' own copies of their inputs, where they do not share one."""
    if not OVERHEADS[device.meter].copies:
        return 0
    shared = 0 if shape.fused else 6 * shape.hidden
    return shared + 2 * shape.attention


def _train_items(how: Recipe, shape: Shape, device: Device, labelled_tokens: int | None) -> tuple[MemoryItem, ...]:
    """The items at the peak of a training step, which is at the head or in the backward pass of a layer."""
    sizes = adapter_sizes(how, shape)
    trained = sum(sizes)
    optim = how.train.optim
    items = [
        MemoryItem("weights", weight_bytes(how, shape), shape.exact, _weights_formula(how)),
        MemoryItem("adapter", trained * ADAPTER_BYTES, True, f"{trained:,} parameters x 4 bytes"),
        MemoryItem("gradients", trained * ADAPTER_BYTES, True, f"{trained:,} parameters x 4 bytes"),
        MemoryItem("optimizer", optimizer_bytes(optim, sizes), "adamw" in optim, f"state of {optim}"),
        *_step_items(how, shape, device, labelled_tokens, trained),
        _workspace(how, shape),
    ]
    return (*items, *_overhead(items, device, _dropped(how, shape, device)))


def _weights_formula(how: Recipe) -> str:
    if not how.quantization.load_in_4bit:
        return "all parameters x 2 bytes"
    absmax = "8-bit" if how.quantization.bnb_4bit_use_double_quant else "fp32"
    return f"linears in 4 bit, {absmax} absmax for each {BLOCK}; embeddings, head, norms in bf16"


def _step_items(
    how: Recipe, shape: Shape, device: Device, labelled_tokens: int | None, trained: int
) -> Iterator[MemoryItem]:
    """Activations and logits at the higher of a step's two peaks: at the head, or in a layer's backward pass."""
    tokens = how.data.batch_tokens
    labelled = tokens if labelled_tokens is None else min(labelled_tokens, tokens)
    layer = tokens * layer_bytes_per_token(how, shape, device)
    hidden = tokens * shape.hidden * BASE_BYTES
    kept = hidden * (shape.layers + 4) if how.train.gradient_checkpointing else layer * shape.layers + 4 * hidden
    kept += trained * AUTOCAST_BYTES
    logits = labelled * 6 * shape.hidden + _logit_bytes(shape, device, labelled)
    backward = tokens * (8 * shape.intermediate + 12 * shape.hidden)
    if how.train.gradient_checkpointing:
        backward += layer
    how_kept = "inputs of all layers" if how.train.gradient_checkpointing else f"{shape.layers} layers"
    if logits >= backward:
        yield MemoryItem("activations", kept, False, f"bound: {tokens:,} tokens, {how_kept}")
        yield MemoryItem(
            "logits", logits, False, f"bound: {labelled:,} tokens with loss, vocabulary {shape.vocabulary:,}"
        )
    else:
        yield MemoryItem(
            "activations", kept + backward, False, f"bound: {tokens:,} tokens, {how_kept}, one layer's backward"
        )
        yield MemoryItem("logits", 0, False, f"gone by the time of the peak; {_gib(logits)} before it")


def _logit_bytes(shape: Shape, device: Device, labelled: int) -> int:
    if device.uses_labelled_head:
        return labelled * shape.vocabulary * LABELLED_LOGIT_BYTES
    return min(labelled, TILE_TOKENS) * min(shape.vocabulary, TILE_VOCABULARY) * BASE_BYTES


def _workspace(how: Recipe, shape: Shape) -> MemoryItem:
    """The largest matrix dequantized, as each 4-bit product does for its own."""
    if not how.quantization.load_in_4bit:
        return MemoryItem("workspace", 0, True, "nothing is dequantized")
    largest = max(linear.weights for linear in layer_linears(shape))
    width = DTYPE_BYTES[how.quantization.bnb_4bit_compute_dtype]
    return MemoryItem(
        "workspace", largest * width, False, f"the largest matrix dequantized: {largest:,} x {width} bytes"
    )


def _dropped(how: Recipe, shape: Shape, device: Device) -> int:
    """Bytes of activations that checkpointing lets go in the forward pass."""
    if not how.train.gradient_checkpointing:
        return 0
    return (shape.layers - 1) * how.data.batch_tokens * layer_bytes_per_token(how, shape, device)


def _overhead(items: Sequence[MemoryItem], device: Device, dropped: int) -> Iterator[MemoryItem]:
    overhead = OVERHEADS[device.meter]
    name, size, formula = overhead.fixed
    yield MemoryItem(name, size, False, formula)
    if overhead.held_back:
        moving = dropped + sum(item.bytes for item in items if item.name in MOVING)
        held = f"measured: {overhead.held_back:.0%} of {', '.join(MOVING)} and what is dropped early is held back"
        yield MemoryItem("allocator", int(moving * overhead.held_back), False, held)


# --- serving --------------------------------------------------------------------------------------------------------


def _serve_items(how: Recipe, shape: Shape, device: Device) -> tuple[MemoryItem, ...]:
    """vLLM with the merged model and room for one conversation of full length; more of it serves more users at once."""
    count, width = parameters(shape), DTYPE_BYTES[how.merge.dtype]
    length, per_token = how.serve.max_model_len, kv_bytes_per_token(shape)
    cached = f"one conversation of {length:,} tokens x {per_token:,} bytes"
    return (
        MemoryItem("weights", count * width, shape.exact, f"{count:,} parameters x {width} bytes"),
        MemoryItem("kv_cache", per_token * length, shape.exact, cached),
        MemoryItem("runtime", OVERHEADS[device.meter].vllm_bytes, False, "vLLM and its own activations"),
    )


def _server_share(how: Recipe, device: Device, limit: int) -> int:
    """What vLLM may take of a device."""
    return int(limit * how.serve.gpu_memory_utilization) if device.server_arguments else limit


# --- what to do when it does not fit --------------------------------------------------------------------------------

WORTH_SAYING = 16 * MIB

Change = tuple[tuple[str, ...], str, Recipe]  # what to set, its price, the recipe with it


def _remedies(recipe: Recipe, found: Plan, made: Callable[[Recipe], Plan], device: Device) -> Iterator[Remedy]:
    """Changes in the order to try them, those that keep the result first; each on top of the others, until it fits."""
    for changes in (_harmless, _costly):
        done: set[str] = set()
        while not found.fits:
            options = [c for c in changes(recipe, found.stage, device, made) if _key(c) not in done]
            best = min(options, key=lambda change: made(change[2]).peak_bytes, default=None)
            if best is None or (saved := found.peak_bytes - made(best[2]).peak_bytes) < WORTH_SAYING:
                break
            yield Remedy(best[0], saved, best[1])
            recipe, found = best[2], made(best[2])
            done.add(_key(best))


def _key(change: Change) -> str:
    """What a change is about: the first key that it sets."""
    return change[0][0].partition("=")[0]


def _harmless(recipe: Recipe, stage: str, device: Device, made: Callable[[Recipe], Plan]) -> Iterator[Change]:
    """Changes that cost time and leave the result as it is, or nearly."""
    if stage == "serve":
        return
    if not recipe.train.gradient_checkpointing:
        yield _change(recipe, "about a third more time", ("train", "gradient_checkpointing", True))
    if recipe.quantization.load_in_4bit and not recipe.quantization.bnb_4bit_use_double_quant:
        yield _change(recipe, "a little rounding of the absmax", ("quantization", "bnb_4bit_use_double_quant", True))
    if device.meter == "cuda_allocated" and not recipe.train.optim.endswith("8bit"):
        yield _change(recipe, "optimizer state in 8 bit", ("train", "optim", "paged_adamw_8bit"))
    smaller = [_smaller_batch(recipe, parts) for parts in (2, 4, 8, 16, 32, 64)]
    yield from _first_that_fits([change for change in smaller if change is not None], made)


def _costly(recipe: Recipe, stage: str, device: Device, made: Callable[[Recipe], Plan]) -> Iterator[Change]:
    """Changes that alter what is learnt or served."""
    if stage == "serve":
        lengths = [recipe.serve.max_model_len // parts for parts in (2, 4, 8)]
        wanted = [length for length in lengths if length >= recipe.evaluate.max_new_tokens]
        changes = [_change(recipe, "shorter conversations", ("serve", "max_model_len", length)) for length in wanted]
        yield from _first_that_fits(changes, made)
        return
    if not recipe.quantization.load_in_4bit:
        yield _change(recipe, "the base model is rounded to 4 bit", ("quantization", "load_in_4bit", True))
    ranks = [recipe.lora.r // parts for parts in (2, 4, 8) if recipe.lora.r // parts >= 8]
    yield from _first_that_fits([_change(recipe, "a smaller adapter", ("lora", "r", rank)) for rank in ranks], made)
    lengths = [recipe.data.max_length // parts for parts in (2, 4) if recipe.data.max_length // parts >= 256]
    shorter = [
        _change(recipe, "longer rows are dropped", ("data", "max_length", length), ("data", "batch_tokens", length))
        for length in lengths
    ]
    yield from _first_that_fits(
        [change for change in shorter if change[2].data.batch_tokens < recipe.data.batch_tokens], made
    )


def _smaller_batch(recipe: Recipe, parts: int) -> Change | None:
    tokens = recipe.data.batch_tokens // parts
    if tokens < recipe.data.max_length:
        return None
    steps = recipe.train.gradient_accumulation_steps * parts
    return _change(
        recipe,
        "smaller matrix products",
        ("data", "batch_tokens", tokens),
        ("train", "gradient_accumulation_steps", steps),
    )


def _first_that_fits(changes: Sequence[Change], made: Callable[[Recipe], Plan]) -> Iterator[Change]:
    """Of one change in several sizes, mildest first: the first that is enough, or the strongest."""
    fitting = (change for change in changes if made(change[2]).fits)
    yield from [chosen] if (chosen := next(fitting, changes[-1] if changes else None)) else []


def _change(recipe: Recipe, price: str, *values: tuple[str, str, Any]) -> Change:
    for section, key, value in values:
        changed = getattr(recipe, section).model_copy(update={key: value})
        recipe = recipe.model_copy(update={section: changed})
    texts = tuple(f"{section}.{key}={str(value).lower() if value is True else value}" for section, key, value in values)
    return texts, price, recipe


# --- saying it ------------------------------------------------------------------------------------------------------


def refusal(made: Plan) -> str:
    """Why a plan does not fit and what to set, in one sentence each: the message of DoesNotFit."""
    largest = max(made.items, key=lambda item: item.bytes)
    text = (
        f"needs {_gib(made.peak_bytes)}; the {made.device} has {_gib(made.device_bytes)}. "
        f"Largest: {largest.name} {_gib(largest.bytes)}."
    )
    if made.remedies:
        tries = ", then ".join(f"{' '.join(remedy.set)} (-{_gib(remedy.saves_bytes)})" for remedy in made.remedies)
        text += f" Try {tries}."
    left = made.peak_bytes - sum(remedy.saves_bytes for remedy in made.remedies)
    if left > made.device_bytes:
        even = f"Even so it needs {_gib(left)}: take" if made.remedies else "Take"
        text += f" {even} a smaller model or a larger device."
    return text


def screen(made: Plan) -> RenderableType:
    """The plan for a terminal: the verdict, the items, and what to set when it does not fit."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    table.add_column("item")
    table.add_column("GiB", justify="right")
    table.add_column("how", overflow="fold")
    for item in made.items:
        table.add_row(item.name, f"{'' if item.exact else '~'}{item.bytes / GIB:.2f}", item.formula)
    table.add_row(
        "peak", f"{made.peak_bytes / GIB:.2f}", f"of {made.device_bytes / GIB:.2f} on {made.device}", style="bold"
    )
    style = "bold green" if made.fits else "bold red"
    return Group(Text(_verdict(made), style=style), Text(), table, *(Text(line) for line in _remedy_lines(made)))


def _verdict(made: Plan) -> str:
    if not made.fits:
        return f"{made.stage} does not fit: {refusal(made)}"
    needs = f"needs {_gib(made.peak_bytes)} of {_gib(made.device_bytes)} on {made.device}"
    return f"{made.stage} fits: {needs}, {_gib(made.device_bytes - made.peak_bytes)} to spare"


def _remedy_lines(made: Plan) -> Iterator[str]:
    if made.remedies:
        yield ""
    for remedy in made.remedies:
        sets = " ".join(f"--set {text}" for text in remedy.set)
        yield f"{sets}  saves {_gib(remedy.saves_bytes)}; price: {remedy.price}"


def _gib(count: int) -> str:
    return f"{count / GIB:.1f} GiB"
