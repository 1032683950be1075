"""How many optimizer steps a training has, and how long its learning rate takes to rise: the same figures for the plan, the recipe's checks
and the trainer.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from qkit.core.batching import count_batches, packed
from qkit.core.errors import RecipeError

if TYPE_CHECKING:
    from qkit.recipe.schema import Recipe, Train


def steps(train: Train, batches: int) -> int:
    """Optimizer steps over data of so many batches; the last step of an epoch may have fewer of them."""
    if train.max_steps > 0:
        return train.max_steps
    return math.ceil(train.num_train_epochs * math.ceil(batches / train.gradient_accumulation_steps))


def planned_steps(how: Recipe, lengths: Sequence[Sequence[int]]) -> int | None:
    """Optimizer steps, as far as recipe and lengths tell; None: not known.

    `lengths`: [tokens, rows, ...] of each length, before data.too_long was applied.
    """
    if how.train.max_steps > 0:
        return how.train.max_steps
    beyond = any(entry[0] > how.data.max_length for entry in lengths)
    if not lengths or (beyond and how.data.too_long != "drop"):
        return None
    rows = [(entry[0], entry[1]) for entry in lengths if entry[0] <= how.data.max_length]
    if how.data.packing:
        each = [tokens for tokens, count in rows for _ in range(count)]
        batches = 1 + max((pack for pack, _ in packed(each, how.data.batch_tokens)), default=-1)
    else:
        batches = count_batches(rows, how.data.batch_tokens)
    return steps(how.train, batches) if batches else None


def warmup(train: Train, total: int) -> int:
    """Steps that the learning rate rises for: a share of all of them, rounded up, where train.warmup_steps is below 1."""
    return math.ceil(total * train.warmup_steps) if train.warmup_steps < 1 else int(train.warmup_steps)


def problems(train: Train, total: int) -> Iterator[tuple[str, str]]:
    """What does not go together with a training of so many steps: the key in the section, and what is wrong."""
    if (rising := warmup(train, total)) and rising >= total:
        said = f"{train.warmup_steps}" + ("" if train.warmup_steps >= 1 else f", which is {rising} steps,")
        highest = train.learning_rate * total / (rising + 1)
        yield (
            "warmup_steps",
            f"train.warmup_steps={said} is no shorter than the training, which has {total} steps: of train.learning_rate="
            f"{train.learning_rate:g} it would get no higher than {highest:.2g}; lower it, or give a share of the steps such as 0.1",
        )
    if train.logging_steps > total:
        yield (
            "logging_steps",
            f"train.logging_steps={train.logging_steps} is beyond the training, which has {total} steps: no loss would be logged; lower it",
        )


def check(train: Train, total: int) -> None:
    """Raise RecipeError when the recipe's train section and the number of steps do not go together."""
    if found := [text for _, text in problems(train, total)]:
        raise RecipeError("\n".join(found))
