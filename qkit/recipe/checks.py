"""Combinations of values that conflict although each value is valid."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from qkit.core.errors import nearest, short
from qkit.recipe import _adapters, idle, validation
from qkit.recipe.registry import MERGED, TASKS, accepts, format_names, names, task_clashes, task_has_labels
from qkit.recipe.schema import ALL, LABEL_SERVER

if TYPE_CHECKING:
    from qkit.recipe.schema import Data, Recipe


Key = tuple[str | int, ...]


def clashes(recipe: Recipe) -> Iterator[tuple[Key, str]]:
    """Conflicts between valid values, as (key, message): what is wrong and what to do."""
    if recipe.data.batch_tokens < recipe.data.max_length:
        yield (
            ("data", "batch_tokens"),
            f"data.batch_tokens={recipe.data.batch_tokens} is less than data.max_length={recipe.data.max_length}: "
            "the longest row would not fit into a batch; raise data.batch_tokens or lower data.max_length",
        )
    if recipe.serve.max_model_len < recipe.evaluate.max_new_tokens:
        yield (
            ("serve", "max_model_len"),
            f"serve.max_model_len={recipe.serve.max_model_len} must be greater than "
            f"evaluate.max_new_tokens={recipe.evaluate.max_new_tokens}",
        )
    if recipe.merge.base == "dequantized" and not recipe.quantization.load_in_4bit:
        yield (
            ("merge", "base"),
            "merge.base=dequantized needs quantization.load_in_4bit=true; use merge.base=16bit, or remove it",
        )
    if recipe.micro_batches > 1 and recipe.data.packing:
        yield (
            ("micro_batches",),
            f"micro_batches={recipe.micro_batches} splits a batch by rows, but with data.packing=true a batch is one row; "
            "lower data.batch_tokens and raise train.gradient_accumulation_steps instead",
        )
    for runtime in recipe.bench.runtimes:
        if runtime not in _always_benched(recipe) and not {runtime, ALL} & {*recipe.export.formats}:
            yield (
                ("bench", "runtimes"),
                f"bench.runtimes contains {short(repr(runtime))}, but export.formats does not",
            )
    yield from _target_clashes(recipe)
    yield from _adapters.clashes(recipe)
    yield from _split_clashes(recipe.data)
    yield from idle.mistakes(recipe)
    yield from validation.clashes(recipe)
    yield from _unknown_names(recipe)
    yield from task_clashes(recipe)


def _always_benched(recipe: Recipe) -> tuple[str, ...]:
    """What a bench can measure that is no export: the merged model, and with labels the server."""
    return ("transformers", *([LABEL_SERVER] if task_has_labels(recipe.task) else []))


def _target_clashes(recipe: Recipe) -> Iterator[tuple[Key, str]]:
    where, targets = ("lora", "target_modules"), recipe.lora.target_modules
    named = {targets} if isinstance(targets, str) else {*targets}
    if "lm_head" in named:
        yield (
            where,
            "lora.target_modules contains lm_head, whose adapter would not be trained: the loss uses the weights of the head directly; "
            "remove it",
        )
    if not targets and not recipe.lora.target_parameters:
        yield (
            where,
            "lora.target_modules and lora.target_parameters are both empty: nothing would be trained; remove them to use all-linear",
        )
    for name in sorted(named):
        if re.sub(r"[\W_]", "", name).lower() == "alllinear" and (
            name.lower() != "all-linear" or not isinstance(targets, str)
        ):
            yield (
                where,
                f"lora.target_modules={short(repr(name))}: write it as the string all-linear, not in a list",
            )
    if recipe.model.add_tokens and "embed_tokens" in named:
        yield (
            where,
            "lora.target_modules contains embed_tokens, but model.add_tokens trains rows of it; PEFT supports only one of the two",
        )


def _split_clashes(data: Data) -> Iterator[tuple[Key, str]]:
    if data.split is None:
        return
    total = data.split.train + data.split.validation + data.split.test
    if abs(total - 1) > 1e-6:
        yield ("data", "split"), f"the fractions of data.split must add up to 1, but add up to {total:g}"
    for name in ("validation", "test"):
        if getattr(data, name):
            yield ("data", name), f"data.{name} lists sources and data.split splits data.train: remove one of the two"


def _unknown_names(recipe: Recipe) -> Iterator[tuple[Key, str]]:
    """Tasks are files in tasks/, export formats are files in export/formats/: the folder is the registry."""
    if recipe.task not in (tasks := names(TASKS)):
        yield (
            ("task",),
            f"unknown task {short(repr(recipe.task))}{nearest(recipe.task, tasks)}; available: {', '.join(tasks)}",
        )
    for name in recipe.export.formats:
        if name != ALL and not accepts(name):
            yield ("export", "formats"), f"unknown format {_instead(name, [ALL, *format_names()])}"
    for name in recipe.verify.gates:
        if name not in (MERGED, ALL) and not accepts(name):
            yield (
                ("verify", "gates", name),
                f"verify.gates: unknown format {_instead(name, [MERGED, ALL, *format_names()])}",
            )


def _instead(name: str, known: Sequence[str]) -> str:
    return f"{short(repr(name))}{nearest(name, known)}; available: {', '.join(known)}"
