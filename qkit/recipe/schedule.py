"""The number of optimizer steps and of warm-up steps: the same figures for the plan, the recipe's checks and the trainer."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from qkit.core.batching import LENGTH_STEP, count_batches, packed
from qkit.core.errors import RecipeError

if TYPE_CHECKING:
    from qkit.recipe.schema import Recipe
    from qkit.recipe.training import Train


def steps(train: Train, batches: int) -> int:
    """Optimizer steps for a number of batches per epoch; the last step of an epoch may have fewer batches."""
    if train.max_steps > 0:
        return train.max_steps
    return math.ceil(train.num_train_epochs * math.ceil(batches / train.gradient_accumulation_steps))


def planned_steps(recipe: Recipe, lengths: Sequence[Sequence[int]], length_step: int = LENGTH_STEP) -> int | None:
    """Optimizer steps, as far as recipe and lengths tell; None if unknown.

    `lengths`: [tokens, rows, ...] for each length, before data.too_long is applied; `length_step`: the task's.
    """
    if recipe.train.max_steps > 0:
        return recipe.train.max_steps
    batches = planned_batches(recipe, lengths, length_step)
    return steps(recipe.train, batches) if batches else None


def planned_batches(recipe: Recipe, lengths: Sequence[Sequence[int]], length_step: int = LENGTH_STEP) -> int | None:
    """Batches of an epoch, as far as recipe and lengths tell; None if unknown. `lengths`, `length_step`: as of `planned_steps`."""
    beyond = any(entry[0] > recipe.data.max_length for entry in lengths)
    if not lengths or (beyond and recipe.data.too_long != "drop"):
        return None
    rows = [(entry[0], entry[1]) for entry in lengths if entry[0] <= recipe.data.max_length]
    if recipe.data.packing:
        each = [tokens for tokens, count in rows for _ in range(count)]
        return 1 + max((pack for pack, _ in packed(each, recipe.data.batch_tokens)), default=-1)
    return count_batches(rows, recipe.data.batch_tokens, length_step, recipe.data.batch_rows or math.inf)


def warmup(train: Train, total: int) -> int:
    """Warm-up steps: a share of `total`, rounded up, where train.warmup_steps is below 1."""
    return math.ceil(total * train.warmup_steps) if train.warmup_steps < 1 else int(train.warmup_steps)


def problems(train: Train, total: int) -> Iterator[tuple[str, str]]:
    """Conflicts with a training of `total` steps, as (key in the section, message)."""
    if (rising := warmup(train, total)) and rising >= total:
        value = f"{train.warmup_steps}" + ("" if train.warmup_steps >= 1 else f", which is {rising} steps,")
        highest = train.learning_rate * total / (rising + 1)
        yield (
            "warmup_steps",
            f"train.warmup_steps={value} must be less than the {total} steps of the training: the learning rate would rise to "
            f"{highest:.2g} only, not to train.learning_rate={train.learning_rate:g}; lower it, or give a share of the steps such as 0.1",
        )
    if train.logging_steps > total:
        yield (
            "logging_steps",
            f"train.logging_steps={train.logging_steps} must not exceed the {total} steps of the training, or no loss is logged; lower it",
        )


def check(train: Train, total: int) -> None:
    """Raise RecipeError when the train section conflicts with the number of steps."""
    if messages := [message for _, message in problems(train, total)]:
        raise RecipeError("\n".join(messages))
