"""Conflicts among the values that say how weights are updated: schedule, optimizer, and groups with a learning rate of their own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from qkit.recipe import _scheduler_kwargs, optimizers, schedule

if TYPE_CHECKING:
    from qkit.recipe.schema import Recipe

    Problems = Iterator[tuple[tuple[str | int, ...], str]]


def mistakes(recipe: Recipe) -> Problems:
    """Errors, as (key, message)."""
    train = recipe.train
    for entry, message in _scheduler_kwargs.problems(train):
        yield ("train", "lr_scheduler_kwargs", entry), message
    for key, message in optimizers.problems(train):
        yield ("train", key), message
    if schedule.follows_metric(train) and train.warmup_steps:
        yield (
            ("train", "warmup_steps"),
            f"train.warmup_steps={train.warmup_steps} has no effect with train.lr_scheduler_type={train.lr_scheduler_type}, which begins at "
            "the maximum: remove it",
        )
    if train.embedding_learning_rate is not None and recipe.layers.rate_decay < 1:
        yield (
            ("train", "embedding_learning_rate"),
            f"train.embedding_learning_rate={train.embedding_learning_rate:g} and layers.rate_decay={recipe.layers.rate_decay:g} both set the "
            "rate of the embeddings: remove one of the two",
        )
