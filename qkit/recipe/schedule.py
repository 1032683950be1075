"""The number of optimizer steps and of warm-up steps, and the rate of each: the same for the plan, the recipe's checks and the trainer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from qkit.core.batching import LENGTH_STEP, count_batches, packed
from qkit.core.errors import RecipeError
from qkit.recipe import _scheduler_kwargs

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


def factor(train: Train, total: int) -> Callable[[int], float]:
    """The rate of each step, from 0, as a share of the group's own: transformers' schedule, one step ahead in a warm-up.

    So the first step of a warm-up has a rate above 0, and the first after it has the maximum. Not of reduce_lr_on_plateau, whose rate no step
    number tells. `train` may be TrainingArguments as well.
    """
    from torch import nn, optim, zeros
    from transformers import get_scheduler

    assert not follows_metric(train)
    rising, kwargs = warmup(train, total), dict(train.lr_scheduler_kwargs or {})
    ahead = 1 if rising else 0
    if train.lr_scheduler_type == "inverse_sqrt":
        kwargs.setdefault("timescale", rising or None)  # by default the warm-up's length, which is one more here
    optimizer = optim.SGD([nn.Parameter(zeros(1))], lr=train.learning_rate)
    rate = get_scheduler(train.lr_scheduler_type, optimizer, rising + ahead, total + ahead, kwargs).lr_lambdas[0]
    return lambda step: float(rate(step + ahead))


def follows_metric(train: Train) -> bool:
    """Whether the rate depends on a metric, and not on the number of the step. `train` may be TrainingArguments as well."""
    return train.lr_scheduler_type in _scheduler_kwargs.BY_METRIC


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
    else:
        for entry, message in _scheduler_kwargs.problems_with(train, total, rising):
            yield f"lr_scheduler_kwargs.{entry}", message
    if train.logging_steps > total:
        yield (
            "logging_steps",
            f"train.logging_steps={train.logging_steps} must not exceed the {total} steps of the training, or no loss is logged; lower it",
        )


def check(train: Train, total: int) -> None:
    """Raise RecipeError when the train section conflicts with the number of steps."""
    if messages := [message for _, message in problems(train, total)]:
        raise RecipeError("\n".join(messages))
