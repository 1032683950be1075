"""The memory plan: what each stage will need and whether it fits, before anything is loaded. Arithmetic only; imports no torch.

`qkit.memory` adds up the items of a stage, `qkit.remedies` says what to change, `qkit.roofline` how long it takes, `qkit.plan_screen`
draws it. This is what the rest of qkit calls.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from qkit import cards, memory, remedies, roofline
from qkit.device import Device, detect
from qkit.errors import ModelError, RecipeError
from qkit.recipe import ALL, Recipe
from qkit.remedies import Remedy, apply
from qkit.roofline import Pace
from qkit.shape import Shape, shape_of
from qkit.step import OVERHEADS, layer_bytes_per_token
from qkit.weights import (
    GIB,
    MIB,
    MemoryItem,
    adapted,
    adapter_sizes,
    gib,
    optimizer_bytes,
    quantized_bytes,
    weight_bytes,
)

Question = Literal["max_length", "batch", "rank", "card"]
QUESTIONS: tuple[Question, ...] = ("max_length", "batch", "rank", "card")
LENGTH_STEP = 16  # rows are padded to a multiple of this
LENGTHS = (256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)
LONGEST = 2**22  # no search goes further
NOT_ON_THE_DEVICE = ("export",)  # these work in the host's memory, whatever the device
ON_THE_HOST_TOO = ("evaluate", "merge")  # these may be run there apart from the rest

ITEMS: Mapping[str, Callable[[Recipe, Shape, Device], tuple[MemoryItem, ...]]] = {
    "load": memory.load_items,
    "evaluate": memory.evaluate_items,
    "merge": memory.merge_items,
    "export": memory.export_items,
    "serve": memory.serve_items,
}
STAGES = ("load", "train", "evaluate", "merge", "export", "serve")


@dataclass(frozen=True)
class Plan:
    """What a stage needs at its peak: the items, summing to `peak_bytes`. `device_bytes`: what the device gives.

    `remedies`: the shortest list that makes it fit, or all there is when nothing does. `elsewhere`: where it might run, when it does not fit.
    """

    fits: bool
    device: str
    device_bytes: int
    peak_bytes: int
    stage: str
    items: tuple[MemoryItem, ...]
    remedies: tuple[Remedy, ...] = ()
    elsewhere: str = ""


@dataclass(frozen=True)
class Checkpointing:
    """Whether layers are computed once more in the backward pass (train.gradient_checkpointing), and why that was decided."""

    on: bool
    why: str


def checkpointing(
    recipe: Recipe, device: Device, labelled_tokens: int | None = None, device_bytes: int | None = None
) -> Checkpointing:
    """As the recipe says; for `auto`, off where the plan of training then fits, else on."""
    if recipe.train.gradient_checkpointing != "auto":
        return Checkpointing(bool(recipe.train.gradient_checkpointing), "the recipe says so")
    try:
        shape = shape_of(recipe.model)
    except ModelError:
        return Checkpointing(True, "there is no plan for this model, and on needs less")
    limit = cards.usable_bytes(device) if device_bytes is None else device_bytes
    peak = _peak(shape, device, "train", labelled_tokens)(_checkpointed(recipe, False))
    room = f"{gib(peak)} of the {gib(limit)} on {cards.title(device)}"
    return Checkpointing(peak > limit, f"without it training {'would need' if peak > limit else 'needs'} {room}")


def decided(
    recipe: Recipe, device: Device, labelled_tokens: int | None = None, device_bytes: int | None = None
) -> Recipe:
    """The recipe with train.gradient_checkpointing decided where it is `auto`."""
    return _checkpointed(recipe, checkpointing(recipe, device, labelled_tokens, device_bytes).on)


def _checkpointed(recipe: Recipe, on: bool) -> Recipe:
    return recipe.model_copy(update={"train": recipe.train.model_copy(update={"gradient_checkpointing": on})})


def plan(
    recipe: Recipe,
    device_bytes: int | None = None,
    device: Device | None = None,
    stage: str = "train",
    labelled_tokens: int | None = None,
) -> Plan:
    """The plan of a stage on a device, by default this machine's.

    `device_bytes` puts a limit in the place of what the device has. `labelled_tokens`: the most of one batch that carry
    loss, when the rows are known; else all of them are counted.

    Raises:
        ModelError: the model's shape cannot be had.
    """
    device = device or detect()
    shape = shape_of(recipe.model)
    limit = cards.usable_bytes(device) if device_bytes is None else device_bytes
    available = _server_share(recipe, device, limit) if stage == "serve" else limit
    if stage == "train":
        recipe = decided(recipe, device, labelled_tokens, limit)
    items = stage_items(recipe, shape, device, stage, labelled_tokens)
    peak = sum(item.bytes for item in items)
    made = Plan(peak <= available, cards.title(device), available, peak, stage, items)
    if made.fits:
        return made
    found = remedies.shortest(recipe, stage, shape, device, available, _peak(shape, device, stage, labelled_tokens))
    host = stage in ON_THE_HOST_TOO and device.offloads
    elsewhere = f"`QKIT_DEVICE=cpu qkit {stage} RUN` does this stage in the host's memory." if host else ""
    return replace(made, remedies=found, elsewhere=elsewhere)


def stage_items(
    recipe: Recipe, shape: Shape, device: Device, stage: str, labelled_tokens: int | None = None
) -> tuple[MemoryItem, ...]:
    """The items of a stage at its peak."""
    if stage == "train":
        return memory.train_items(recipe, shape, device, labelled_tokens)
    return ITEMS[stage](recipe, shape, device)


def _peak(shape: Shape, device: Device, stage: str, labelled_tokens: int | None) -> Callable[[Recipe], int]:
    return lambda how: sum(item.bytes for item in stage_items(how, shape, device, stage, labelled_tokens))


def _server_share(how: Recipe, device: Device, limit: int) -> int:
    """What vLLM may take of a device."""
    return int(limit * how.serve.gpu_memory_utilization) if device.server_arguments else limit


def stages(recipe: Recipe, device: Device | None = None, labelled_tokens: int | None = None) -> tuple[Plan, ...]:
    """The plans of all stages, in order; those that work in the host's memory, or that the recipe lacks, are held against nothing."""
    made = [plan(recipe, None, device, stage, labelled_tokens) for stage in STAGES]
    served = {ALL, "vllm"} & {*recipe.export.formats}
    free = NOT_ON_THE_DEVICE if served else (*NOT_ON_THE_DEVICE, "serve")
    return tuple(replace(p, fits=True, remedies=(), elsewhere="") if p.stage in free else p for p in made)


def alternatives(recipe: Recipe, made: Plan, device: Device, labelled_tokens: int | None = None) -> tuple[Remedy, ...]:
    """Every single change that lowers the peak of a plan, each alone."""
    shape, recipe = shape_of(recipe.model), decided(recipe, device, labelled_tokens)
    return remedies.alternatives(recipe, made.stage, shape, device, _peak(shape, device, made.stage, labelled_tokens))


def predicted_items(recipe: Recipe, device: Device, labelled_tokens: int | None = None) -> dict[str, int]:
    """Bytes by name of what the device's meter should see at the peak of training; empty when the shape is unknown."""
    try:
        how = decided(recipe, device, labelled_tokens)
        items = memory.train_items(how, shape_of(recipe.model), device, labelled_tokens)
    except ModelError:
        return {}
    return {item.name: item.bytes for item in items if item.name not in OVERHEADS[device.meter].unmetered}


# --- asking the other way round ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Solved:
    """The answer to `--solve`. `value`: tokens, rows, a rank, or a card's name; None: there is none that fits."""

    question: str
    value: int | str | None
    set: tuple[str, ...]
    plan: Plan | None


def solve(recipe: Recipe, question: Question, device_bytes: int | None = None, device: Device | None = None) -> Solved:
    """The longest row (one to a batch), the most rows of full length in a batch, the highest rank, or the smallest card that fits."""
    device = device or detect()
    if question == "card":
        return _smallest_card(recipe)
    shape = shape_of(recipe.model)
    limit = cards.usable_bytes(device) if device_bytes is None else device_bytes
    peak = _peak(shape, device, "train", None)
    setter = {"max_length": _with_length, "batch": _with_rows, "rank": _with_rank}[question]
    scale = LENGTH_STEP if question == "max_length" else 1
    most = min(LONGEST, shape.positions or LONGEST) if question == "max_length" else LONGEST
    count = _largest_that_fits(
        lambda n: peak(apply(recipe, (Remedy(setter(recipe, n * scale), 0, ""),))) <= limit, most // scale
    )
    if count == 0:
        return Solved(question, None, (), None)
    chosen = setter(recipe, count * scale)
    return Solved(question, count * scale, chosen, plan(apply(recipe, (Remedy(chosen, 0, ""),)), limit, device))


def question(text: str | None) -> Question | None:
    """What --solve asks for.

    Raises:
        RecipeError: it cannot be solved for.
    """
    found = next((known for known in QUESTIONS if known == text), None)
    if text is not None and found is None:
        raise RecipeError(f"--solve {text}: there are {', '.join(QUESTIONS)}")
    return found


def _with_length(recipe: Recipe, length: int) -> tuple[str, ...]:
    return f"data.max_length={length}", f"data.batch_tokens={length}"


def _with_rows(recipe: Recipe, rows: int) -> tuple[str, ...]:
    return (f"data.batch_tokens={rows * recipe.data.max_length}",)


def _with_rank(recipe: Recipe, rank: int) -> tuple[str, ...]:
    return (f"lora.r={rank}",)


def _largest_that_fits(fits: Callable[[int], bool], most: int) -> int:
    """The largest count up to `most` for which `fits` holds, given that more never needs less; 0 when there is none."""
    if not fits(1):
        return 0
    low, high = 1, 2
    while high <= most and fits(high):
        low, high = high, high * 2
    high = min(high, most + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _smallest_card(recipe: Recipe) -> Solved:
    for card in sorted(cards.CARDS.values(), key=lambda card: card.memory_bytes):
        made = plan(recipe, device=cards.device(card.name))
        if made.fits:
            return Solved("card", card.name, (), made)
    return Solved("card", None, (), None)


# --- what the rows say ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LengthChoice:
    """What one choice of data.max_length keeps and needs. `labelled`: tokens that carry loss."""

    max_length: int
    rows: int
    rows_share: float
    labelled: int
    labelled_share: float
    peak_bytes: int
    fits: bool
    seconds: float | None


@dataclass(frozen=True)
class LengthTable:
    """Percentiles of the rows' lengths in tokens, and the choices of data.max_length."""

    percentiles: dict[str, int]
    choices: tuple[LengthChoice, ...]


def length_table(lengths: Sequence[Sequence[int]], recipe: Recipe, device: Device) -> LengthTable:
    """What each choice of data.max_length keeps of the rows, and what it needs.

    `lengths`: sorted [tokens, rows, labelled tokens], one entry for each length, before the rule for long rows. Rows beyond a choice count
    as left out. A choice above the recipe's own batch raises the batch to one such row.
    """
    longest, everything = lengths[-1][0], roofline.kept(lengths, lengths[-1][0])
    marks = [length for length in LENGTHS if length < longest]
    ends = [*marks, next((length for length in LENGTHS if length >= longest), longest)]
    shares = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}
    return LengthTable(
        {name: percentile(lengths, share) for name, share in shares.items()},
        tuple(_choice(lengths, everything, length, recipe, device) for length in ends),
    )


def labelled_of(lengths: Sequence[Sequence[int]], recipe: Recipe) -> int | None:
    """Tokens of a batch that carry loss, at the share of the rows' length that has most; None when no rows are known."""
    shares = [labelled / (tokens * rows) for tokens, rows, labelled in lengths if tokens <= recipe.data.max_length]
    return round(max(shares) * recipe.data.batch_tokens) if shares else None


def percentile(lengths: Sequence[Sequence[int]], share: float) -> int:
    """The length in tokens that at least this share of the rows do not exceed."""
    wanted, seen = share * sum(rows for _, rows, _ in lengths), 0
    for tokens, rows, _ in lengths:
        seen += rows
        if seen >= wanted:
            return tokens
    return lengths[-1][0]


def _choice(
    lengths: Sequence[Sequence[int]], everything: roofline.Rows, length: int, recipe: Recipe, device: Device
) -> LengthChoice:
    shape, rows = shape_of(recipe.model), roofline.kept(lengths, length)
    batch = max(length, recipe.data.batch_tokens)
    how = apply(recipe, (Remedy((f"data.max_length={length}", f"data.batch_tokens={batch}"), 0, ""),))
    labelled = labelled_of(lengths, how)
    how = decided(how, device, labelled)
    peak = _peak(shape, device, "train", labelled)(how)
    return LengthChoice(
        max_length=length,
        rows=rows.rows,
        rows_share=rows.rows / everything.rows,
        labelled=rows.labelled,
        labelled_share=rows.labelled / everything.labelled if everything.labelled else 0.0,
        peak_bytes=peak,
        fits=peak <= cards.usable_bytes(device),
        seconds=roofline.pace(how, shape, device, rows).seconds,
    )


# --- beside the figures of others -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Anchor:
    """A published line for Llama-3.1-8B at rank 32 and batch 1 beside ours: bytes at the recipe's length, and why they differ."""

    name: str
    fixed_bytes: int
    bytes_per_token: int
    peak_bytes: int
    ours_bytes: int
    why: str


def anchors(recipe: Recipe, device: Device) -> tuple[Anchor, ...]:
    """Published lines for shapes like Llama-3.1-8B's, at this recipe's tokens; ours is the same adapter, batch 1, checkpointed."""
    shape = shape_of(recipe.model)
    if (
        (shape.layers, shape.hidden, shape.intermediate) != (32, 4096, 14336)
        or shape.vocabulary < 10**5
        or shape.sparse
    ):
        return ()
    length = recipe.data.max_length
    same = ("lora.r=32", f"data.batch_tokens={length}", "train.gradient_checkpointing=true", "micro_batches=1")
    items = memory.train_items(apply(recipe, (Remedy(same, 0, ""),)), shape, device, None)
    ours, slope = sum(item.bytes for item in items), _slope(recipe, same, shape, device)
    logits, kept, mlp = 16 * shape.vocabulary, 2 * shape.layers * shape.hidden, 6 * shape.intermediate
    offsets = (
        f"it holds {logits:,} bytes of logits per token (16 x vocabulary) beside {kept:,} of layers' inputs and {mlp:,} of the MLP; "
        f"here the loss is made in tiles, which leaves {slope:,} per token"
    )
    smart = (
        f"its line per token is below the layers' inputs alone ({kept:,}), so these are on the host: "
        "train.activation_offloading=true does that here"
    )
    lines = (
        ("transformers + flash attention", 9_697_000_000, 2_470_800, offsets),
        ("Unsloth", 7_370_000_000, 211_900, smart),
    )
    return tuple(
        Anchor(name, fixed, per, fixed + per * length, ours, _why(why, fixed + per * length, ours))
        for name, fixed, per, why in lines
    )


def _slope(recipe: Recipe, same: tuple[str, ...], shape: Shape, device: Device) -> int:
    """Bytes per token between 4,096 and 8,192, where the tile of logits has its full size."""
    first, second = (
        sum(
            i.bytes
            for i in memory.train_items(
                apply(recipe, (Remedy((*same, *_with_length(recipe, n)), 0, ""),)), shape, device, None
            )
        )
        for n in (4096, 8192)
    )
    return (second - first) // 4096


def _why(why: str, theirs: int, ours: int) -> str:
    """A difference of a tenth or less needs no reason."""
    return why if abs(ours / theirs - 1) > 0.1 else ""


# --- devices ----------------------------------------------------------------------------------------------------------


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


# --- saying it --------------------------------------------------------------------------------------------------------


def to_dict(made: Plan) -> dict[str, Any]:
    """The plan as a JSON document."""
    return asdict(made)


def refusal(made: Plan) -> str:
    """Why a plan does not fit and what to set, in one sentence each: the message of DoesNotFit."""
    largest = max(made.items, key=lambda item: item.bytes)
    text = (
        f"needs {gib(made.peak_bytes)}; the {made.device} has {gib(made.device_bytes)}. "
        f"Largest: {largest.name} {gib(largest.bytes)}."
    )
    if made.remedies:
        tries = ", then ".join(f"{' '.join(remedy.set)} (-{gib(remedy.saves_bytes)})" for remedy in made.remedies)
        text += f" Try {tries}."
    left = made.peak_bytes - sum(remedy.saves_bytes for remedy in made.remedies)
    if left > made.device_bytes:
        even = f"Even so it needs {gib(left)}: take" if made.remedies else "Take"
        text += f" {even} a smaller model or a larger device."
    return f"{text} Or {made.elsewhere}" if made.elsewhere else text


__all__ = [
    "GIB",
    "MIB",
    "Checkpointing",
    "MemoryItem",
    "Pace",
    "Plan",
    "Remedy",
    "Solved",
    "adapted",
    "adapter_sizes",
    "alternatives",
    "anchors",
    "apply",
    "checkpointing",
    "decided",
    "device_for",
    "labelled_of",
    "layer_bytes_per_token",
    "length_table",
    "optimizer_bytes",
    "plan",
    "predicted_items",
    "quantized_bytes",
    "refusal",
    "solve",
    "stages",
    "to_dict",
    "weight_bytes",
]
