"""What to change when a plan does not fit: first what leaves the result as it is, then what does not, the cheapest first."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from qkit.core.device import Device
from qkit.core.figures import MIB
from qkit.model.shape import Shape
from qkit.plan.speed import time_factor
from qkit.recipe.schema import Recipe

WORTH_SAYING = 16 * MIB  # what saves less is not worth a line
MOST_PARTS = 64
SMALLEST_RANK = 8
SMALLEST_LENGTH = 256
SHORTEST_ANSWER = 16


IN_4_BIT = (("quantization.load_in_4bit=true",),)


Peak = Callable[[Recipe], int]


@dataclass(frozen=True)
class Remedy:
    """Recipe values that lower the peak, what they save on top of the remedies before, and what they cost.

    `time_factor`: how many times as long training takes, by its arithmetic. `same_result`: what is learnt stays as it is, or nearly.
    """

    set: tuple[str, ...]
    saves_bytes: int
    price: str
    time_factor: float = 1.0
    same_result: bool = True


@dataclass(frozen=True)
class _Change:
    """One thing to change, in one or several strengths, the mildest first."""

    price: str
    strengths: tuple[tuple[str, ...], ...]
    same_result: bool = True


_Chosen = tuple[_Change, tuple[str, ...]]


def apply(recipe: Recipe, remedies: Sequence[Remedy]) -> Recipe:
    """The recipe with remedies applied, in their order."""
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
    """Section (empty at the top), key and value of a `--set`."""
    dotted, _, value = text.partition("=")
    section, _, key = dotted.rpartition(".")
    return section, key, yaml.safe_load(value)


def shortest(recipe: Recipe, stage: str, shape: Shape, device: Device, limit: int, peak: Peak) -> tuple[Remedy, ...]:
    """The shortest list that brings the peak under the limit; all that saves anything when none does.

    Changes are taken in their order, each as mild as is enough, and those that a later one makes needless are taken out again.
    """
    chosen: list[_Chosen] = []
    changed, now = recipe, peak(recipe)
    for change in _changes(recipe, stage, device):
        if now <= limit:
            break
        strength, after = _enough(changed, change, limit, peak)
        if after <= limit or now - after >= WORTH_SAYING:
            chosen.append((change, strength))
            changed, now = _with(changed, strength), after
    if now <= limit:
        chosen = _pruned(recipe, chosen, limit, peak)
    return tuple(_priced(recipe, chosen, shape, device, peak))


def alternatives(recipe: Recipe, stage: str, shape: Shape, device: Device, peak: Peak) -> tuple[Remedy, ...]:
    """Every change alone, in its mildest strength, in the order of the list above: for a person to choose from."""
    found: list[Remedy] = []
    for change in _changes(recipe, stage, device):
        found += _priced(recipe, [(change, change.strengths[0])], shape, device, peak)
    return tuple(remedy for remedy in found if remedy.saves_bytes >= WORTH_SAYING)


def _enough(recipe: Recipe, change: _Change, limit: int, peak: Peak) -> tuple[tuple[str, ...], int]:
    """The mildest strength that is enough, or the strongest, and the peak with it."""
    for strength in change.strengths:
        if (after := peak(_with(recipe, strength))) <= limit:
            break
    return strength, after


def _pruned(recipe: Recipe, chosen: list[_Chosen], limit: int, peak: Peak) -> list[_Chosen]:
    """Without the changes that are not needed; those that alter the result, and the dearest, are given up first."""
    for entry in reversed(chosen):
        rest = [other for other in chosen if other is not entry]
        if peak(_with(recipe, [text for _, strength in rest for text in strength])) <= limit:
            return _pruned(recipe, rest, limit, peak)  # without it another may have become needless, that helped it
    return chosen


def _priced(recipe: Recipe, chosen: Sequence[_Chosen], shape: Shape, device: Device, peak: Peak) -> Iterator[Remedy]:
    before = peak(recipe)
    for change, strength in chosen:
        changed = _with(recipe, strength)
        after, factor = peak(changed), time_factor(recipe, changed, shape, device)
        yield Remedy(strength, before - after, change.price, factor, change.same_result)
        recipe, before = changed, after


# --- what can be changed ----------------------------------------------------------------------------------------------


def _changes(recipe: Recipe, stage: str, device: Device) -> Iterator[_Change]:
    """Everything that the stage honours, in the order in which to try it."""
    if stage == "serve":
        yield from _serving(recipe)
    elif stage in ("evaluate", "merge"):  # a merged model is measured as evaluate does
        yield from _answering(recipe)
    elif stage == "load":
        yield from (change for change in _costly(recipe) if change.strengths == IN_4_BIT)
    elif stage == "train":
        yield from _harmless(recipe, device)
        yield from _costly(recipe)


def _harmless(recipe: Recipe, device: Device) -> Iterator[_Change]:
    """At a constant effective batch, in the order of what they cost in time."""
    if device.offloads and not recipe.train.optim.endswith("8bit"):
        yield _Change("optimizer state in 8 bit, nearly the same", (("train.optim=paged_adamw_8bit",),))
    if recipe.quantization.load_in_4bit and not recipe.quantization.bnb_4bit_use_double_quant:
        yield _Change("a little rounding of the absmax", (("quantization.bnb_4bit_use_double_quant=true",),))
    yield from _smaller_batch(recipe)
    if not recipe.train.gradient_checkpointing:
        yield _Change("each layer is computed twice", (("train.gradient_checkpointing=true",),))
    if device.offloads and not recipe.train.activation_offloading:
        yield _Change("activations travel to the host and back", (("train.activation_offloading=true",),))


def _smaller_batch(recipe: Recipe) -> Iterator[_Change]:
    """The same batch in parts; a pack cannot be divided, so packs are made smaller and more of them accumulated."""
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


def _costly(recipe: Recipe) -> Iterator[_Change]:
    """Changes that alter what is learnt."""
    if not recipe.quantization.load_in_4bit:
        yield _Change("the base model is rounded to 4 bit", IN_4_BIT, same_result=False)
    yield from _halved("a smaller adapter", "lora.r", recipe.lora.r, SMALLEST_RANK, False)
    lengths = [recipe.data.max_length // n for n in (2, 4, 8) if recipe.data.max_length // n >= SMALLEST_LENGTH]
    sets = tuple((f"data.max_length={length}", *_shorter_batch(recipe, length)) for length in lengths)
    if sets:
        yield _Change("longer rows are left out or cut", sets, same_result=False)


def _shorter_batch(recipe: Recipe, length: int) -> Iterator[str]:
    """With shorter rows a batch need not hold more than one of them; the effective batch shrinks with it."""
    if recipe.data.batch_tokens > length:
        yield f"data.batch_tokens={length}"


def _answering(recipe: Recipe) -> Iterator[_Change]:
    section = recipe.evaluate
    yield from _halved("smaller batches of answers", "evaluate.batch_size", section.batch_size, 1, True)
    yield from _halved("shorter answers", "evaluate.max_new_tokens", section.max_new_tokens, SHORTEST_ANSWER, False)
    lengths = [recipe.data.max_length // n for n in (2, 4, 8) if recipe.data.max_length // n >= SMALLEST_LENGTH]
    if lengths:
        sets = tuple((f"data.max_length={length}",) for length in lengths)
        yield _Change("longer rows are left out or cut", sets, same_result=False)


def _serving(recipe: Recipe) -> Iterator[_Change]:
    least = max(recipe.evaluate.max_new_tokens, SMALLEST_LENGTH)
    yield from _halved("fewer conversations at once", "serve.concurrency", recipe.serve.concurrency, 1, True)
    yield from _halved("shorter conversations", "serve.max_model_len", recipe.serve.max_model_len, least, False)


def _halved(price: str, key: str, value: int, least: int, same: bool) -> Iterator[_Change]:
    sizes: list[Any] = [value // n for n in (2, 4, 8, 16, 32) if value // n >= least]
    if sizes:
        yield _Change(price, tuple((f"{key}={size}",) for size in sizes), same)
