"""Which methods of training conversations have, and what each cannot be combined with."""

from __future__ import annotations

from collections.abc import Iterator

from qkit.recipe.schema import WHOLE, Recipe

METHODS = ("lora", "full", "peft")

Problems = Iterator[tuple[tuple[str | int, ...], str]]


def clashes(recipe: Recipe) -> Problems:
    """What the method needs, or cannot have."""
    if recipe.method not in METHODS:
        yield (
            ("method",),
            f"method={recipe.method} is for tasks with labels, and task={recipe.task} has none: use one of {', '.join(METHODS)}",
        )
    if recipe.method in WHOLE and recipe.quantization.load_in_4bit:
        yield (
            ("method",),
            f"method={recipe.method} saves a whole model, whose weights cannot be trained or saved in 4 bit: set "
            "quantization.load_in_4bit=false, or method=lora",
        )
    if recipe.method != "full":
        yield from _of_frozen_weights(recipe)


def _of_frozen_weights(recipe: Recipe) -> Problems:
    """Settings of method=full, of a recipe that trains an adapter on frozen weights."""
    if recipe.layers != type(recipe.layers)():
        yield (
            ("layers",),
            f"layers divides the weights that method=full trains, and method={recipe.method} trains none: remove it",
        )
    if recipe.train.trainable:
        yield (
            ("train", "trainable"),
            f"train.trainable names weights that method=full trains, and method={recipe.method} trains none: remove it",
        )
    if not recipe.train.bf16:
        yield (
            ("train", "bf16"),
            "train.bf16=false: an adapter for conversations is trained in bf16 on 16-bit or 4-bit weights; remove it, or set method=full",
        )
