"""Recipe changes for a plan that does not fit: first those that leave the result as it is, then the others, each group cheapest first."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import yaml

from qkit.core.device import Device
from qkit.core.figures import MIB
from qkit.plan._subject import Subject
from qkit.plan.speed import time_factor
from qkit.plugins.task import open_task
from qkit.recipe.optimizers import OPTIMIZERS, UNKNOWN
from qkit.recipe.schema import WHOLE, Recipe

WORTH_SAYING = 16 * MIB  # a remedy that saves less is not shown
MOST_PARTS = 64
SMALLEST_RANK = 8
SMALLEST_LENGTH = 256
SMALLEST_TEXT = 32  # tokens that a head reads at once
SHORTEST_ANSWER = 16


IN_4_BIT = (("quantization.load_in_4bit=true",),)
_AN_ADAPTER = (("method=lora",), ("method=lora", "quantization.load_in_4bit=true"))


Peak = Callable[[Recipe], int]


@dataclass(frozen=True)
class Remedy:
    """Recipe values that lower the peak, in the form of `--set`, and the bytes that they save on top of the remedies before.

    `cost`: the drawback. `time_factor`: training time as a multiple of the time before, by FLOPs and bandwidth. `same_result`: whether
    training learns the same, or nearly.
    """

    set: tuple[str, ...]
    saves_bytes: int
    cost: str
    time_factor: float = 1.0
    same_result: bool = True

    def to_dict(self) -> dict[str, Any]:
        """For `--json`, where the cost is called "price"."""
        fields = asdict(self)
        return {"price" if name == "cost" else name: value for name, value in fields.items()}


@dataclass(frozen=True)
class _Change:
    """One change, at one or several levels, the smallest change first."""

    cost: str
    levels: tuple[tuple[str, ...], ...]
    same_result: bool = True


_Chosen = tuple[_Change, tuple[str, ...]]


def apply(recipe: Recipe, remedies: Sequence[Remedy]) -> Recipe:
    """The recipe with the remedies applied in order."""
    return _with(recipe, [text for remedy in remedies for text in remedy.set])


def _with(recipe: Recipe, texts: Sequence[str]) -> Recipe:
    for text in texts:
        section, key, value = _parsed(text)
        if section:
            changed = getattr(recipe, section).model_copy(update={key: value})
            recipe = recipe.model_copy(update={section: changed})
        else:
            recipe = recipe.model_copy(update={key: value})
    return recipe


@functools.lru_cache(maxsize=1024)
def _parsed(text: str) -> tuple[str, str, Any]:
    """Section (empty for a top-level field), key and value of a `--set`."""
    dotted, _, value = text.partition("=")
    section, _, key = dotted.rpartition(".")
    return section, key, yaml.safe_load(value)


def shortest(
    recipe: Recipe, stage: str, subject: Subject, device: Device, limit: int, peak: Peak
) -> tuple[Remedy, ...]:
    """The shortest list of remedies with which the peak is within `limit` bytes; if none is enough, everything that saves memory.

    Changes are added in order, each at the smallest sufficient level; changes that a later one makes unnecessary are removed.
    """
    chosen: list[_Chosen] = []
    changed, now = recipe, peak(recipe)
    for change in _changes(recipe, stage, device):
        if now <= limit:
            break
        level, after = _smallest_sufficient(changed, change, limit, peak)
        if after <= limit or now - after >= WORTH_SAYING:
            chosen.append((change, level))
            changed, now = _with(changed, level), after
    if now <= limit:
        chosen = _pruned(recipe, chosen, limit, peak)
    return tuple(_with_savings(recipe, chosen, subject, device, peak))


def alternatives(recipe: Recipe, stage: str, subject: Subject, device: Device, peak: Peak) -> tuple[Remedy, ...]:
    """Every change on its own, at its smallest level, in the order of `shortest`."""
    remedies: list[Remedy] = []
    for change in _changes(recipe, stage, device):
        remedies += _with_savings(recipe, [(change, change.levels[0])], subject, device, peak)
    return tuple(remedy for remedy in remedies if remedy.saves_bytes >= WORTH_SAYING)


def _smallest_sufficient(recipe: Recipe, change: _Change, limit: int, peak: Peak) -> tuple[tuple[str, ...], int]:
    """The smallest sufficient level, or else the largest, and the peak with it in bytes."""
    for level in change.levels:
        if (after := peak(_with(recipe, level))) <= limit:
            break
    return level, after


def _pruned(recipe: Recipe, chosen: list[_Chosen], limit: int, peak: Peak) -> list[_Chosen]:
    """The changes that are needed; those that alter the result, and the most costly, are removed first."""
    for entry in reversed(chosen):
        rest = [other for other in chosen if other is not entry]
        if peak(_with(recipe, [text for _, level in rest for text in level])) <= limit:
            return _pruned(recipe, rest, limit, peak)  # another change may be unnecessary now
    return chosen


def _with_savings(
    recipe: Recipe, chosen: Sequence[_Chosen], subject: Subject, device: Device, peak: Peak
) -> Iterator[Remedy]:
    before = peak(recipe)
    for change, level in chosen:
        changed = _with(recipe, level)
        after, factor = peak(changed), time_factor(recipe, changed, subject, device)
        yield Remedy(level, before - after, change.cost, factor, change.same_result)
        recipe, before = changed, after


# --- possible changes ----------------------------------------------------------------------------------------------


def _changes(recipe: Recipe, stage: str, device: Device) -> Iterator[_Change]:
    """The changes that affect the stage, in the order in which to try them."""
    if stage == "serve":
        yield from _serving(recipe)
    elif stage in ("evaluate", "merge"):  # a merged model is measured as evaluate does
        yield from _answering(recipe)
    elif stage == "load":
        yield from (change for change in _smaller_weights(recipe) if change.levels == IN_4_BIT)
    elif stage == "train":
        for change in (*_result_keeping(recipe, device), *_result_changing(recipe)):
            if levels := tuple(level for level in change.levels if _makes_sense(recipe, level)):
                yield replace(change, levels=levels)


def _makes_sense(recipe: Recipe, level: Sequence[str]) -> bool:
    """Whether the task has a use for what a change sets."""
    task = open_task(recipe.task)
    before, after = ({key for key, _ in task.clashes(one)} for one in (recipe, _with(recipe, level)))
    return after <= before


def _result_keeping(recipe: Recipe, device: Device) -> Iterator[_Change]:
    """Changes that keep the effective batch size and the result, the fastest first."""
    smaller = OPTIMIZERS.get(recipe.train.optim, UNKNOWN).in_8_bits
    if device.offloads and smaller:
        yield _Change("8-bit optimizer state, nearly the same result", ((f"train.optim={smaller}",),))
    if recipe.quantization.load_in_4bit and not recipe.quantization.bnb_4bit_use_double_quant:
        yield _Change(
            "slight rounding of the quantization constants", (("quantization.bnb_4bit_use_double_quant=true",),)
        )
    yield from _smaller_batch(recipe)
    if not recipe.train.gradient_checkpointing:
        yield _Change("the forward pass of each layer runs twice", (("train.gradient_checkpointing=true",),))
    if device.offloads and not recipe.train.activation_offloading and _generates(recipe):
        yield _Change("activations are copied to the host and back", (("train.activation_offloading=true",),))


def _smaller_batch(recipe: Recipe) -> Iterator[_Change]:
    """The same batch in micro-batches. A pack cannot be divided, so packs get smaller and more of them are accumulated."""
    rows, steps = recipe.data.batch_tokens // recipe.data.max_length, recipe.train.gradient_accumulation_steps
    parts = [count for count in (2, 4, 8, 16, 32, MOST_PARTS) if count <= rows]
    sets: list[tuple[str, ...]]
    if recipe.data.packing:
        sets = [
            (f"data.batch_tokens={recipe.data.batch_tokens // n}", f"train.gradient_accumulation_steps={steps * n}")
            for n in parts
        ]
    else:
        sets = [(f"micro_batches={recipe.micro_batches * n}",) for n in parts if recipe.micro_batches * n <= rows]
    if sets:
        yield _Change("smaller matrix products", tuple(sets))


def _result_changing(recipe: Recipe) -> Iterator[_Change]:
    """Changes that alter the result."""
    if not recipe.train.bf16:
        yield _Change("the computation is rounded to bf16", (("train.bf16=true",),), same_result=False)
    yield from _smaller_weights(recipe)
    if recipe.method == "lora":
        yield from _halved("a smaller adapter", "lora.r", recipe.lora.r, SMALLEST_RANK, False)
    sets = tuple((f"data.max_length={length}", *_shorter_batch(recipe, length)) for length in _shorter(recipe))
    if sets:
        yield _Change("longer rows are dropped or truncated", sets, same_result=False)


def _smaller_weights(recipe: Recipe) -> Iterator[_Change]:
    """A method that trains all weights needs them, their gradients and the optimizer's state in fp32."""
    if recipe.method in WHOLE:
        yield _Change("an adapter is trained in place of all weights", _AN_ADAPTER, same_result=False)
    elif not recipe.quantization.load_in_4bit:
        yield _Change("the base model is quantized to 4 bits", IN_4_BIT, same_result=False)


def _shorter(recipe: Recipe) -> list[int]:
    """Shorter values of data.max_length."""
    least = SMALLEST_LENGTH if _generates(recipe) else SMALLEST_TEXT
    return [recipe.data.max_length // n for n in (2, 4, 8) if recipe.data.max_length // n >= least]


def _generates(recipe: Recipe) -> bool:
    return open_task(recipe.task).HEAD.generates


def _shorter_batch(recipe: Recipe, length: int) -> Iterator[str]:
    """A batch of one row; this also reduces the effective batch size."""
    if recipe.data.batch_tokens > length:
        yield f"data.batch_tokens={length}"


def _answering(recipe: Recipe) -> Iterator[_Change]:
    section = recipe.evaluate
    if _generates(recipe):
        yield from _halved("smaller batches of answers", "evaluate.batch_size", section.batch_size, 1, True)
        yield from _halved("shorter answers", "evaluate.max_new_tokens", section.max_new_tokens, SHORTEST_ANSWER, False)
    if lengths := _shorter(recipe):
        sets = tuple((f"data.max_length={length}",) for length in lengths)
        yield _Change("longer rows are dropped or truncated", sets, same_result=False)


def _serving(recipe: Recipe) -> Iterator[_Change]:
    least = max(recipe.evaluate.max_new_tokens, SMALLEST_LENGTH)
    yield from _halved("fewer conversations at once", "serve.concurrency", recipe.serve.concurrency, 1, True)
    yield from _halved("shorter conversations", "serve.max_model_len", recipe.serve.max_model_len, least, False)


def _halved(cost: str, key: str, value: int, least: int, same: bool) -> Iterator[_Change]:
    sizes: list[Any] = [value // n for n in (2, 4, 8, 16, 32) if value // n >= least]
    if sizes:
        yield _Change(cost, tuple((f"{key}={size}",) for size in sizes), same)
