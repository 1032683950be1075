"""Settings of an adapter that are valid each, and cannot be had together."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qkit.recipe.schema import Recipe

    Problems = Iterator[tuple[tuple[str | int, ...], str]]


def clashes(recipe: Recipe) -> Problems:
    """Conflicts of the section lora, as (key, message)."""
    section, where = recipe.lora, ("lora", "init_lora_weights")
    name = f"lora.init_lora_weights={section.init_lora_weights}"
    if section.takes_part_of_base and recipe.quantization.load_in_4bit:
        yield (
            where,
            f"{name} takes a part out of the base weights, which 4 bits would round anew: set quantization.load_in_4bit=false, or use loftq",
        )
    if section.init_lora_weights == "loftq" and not recipe.quantization.load_in_4bit:
        yield (
            where,
            f"{name} makes up for what 4 bits lose, and quantization.load_in_4bit=false loses nothing: remove it",
        )
    needs_matrices = section.takes_part_of_base or section.init_lora_weights in ("loftq", "eva")
    if needs_matrices and section.target_parameters:
        yield where, f"{name} is for linear modules, and lora.target_parameters names parameters: remove one of the two"
    if needs_matrices and section.use_dora:
        yield where, f"{name} changes what lora.use_dora measures the lengths of: remove one of the two"
    if section.use_dora and section.target_parameters:
        yield ("lora", "use_dora"), "lora.use_dora: PEFT has no DoRA for lora.target_parameters; remove one of the two"
    if section.init_from is not None and section.init_lora_weights is not True:
        yield (
            where,
            f"{name} has no effect, because lora.init_from={section.init_from} gives the weights: remove one of the two",
        )
