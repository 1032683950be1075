"""Evaluation during training: whether a recipe asks for it, and conflicts between the values that say so."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from qkit.core.errors import as_yaml, nearest, short
from qkit.recipe import registry, schedule

if TYPE_CHECKING:
    from qkit.recipe.schema import Data, Recipe
    from qkit.recipe.training import Train

    Key = tuple[str | int, ...]
    Problems = Iterator[tuple[Key, str]]

LOSS, SCORE = "loss", "score"  # what train.metric_for_best_model can name for every task
OF_SOURCE = f"{LOSS}/"  # and, with the name of a source of data.validation, its loss
ADVICE = "give data.validation a source, or data.split.validation a share"


def is_loss(name: str) -> bool:
    """Whether a figure of train.metric_for_best_model is a loss, of all rows or of a source, and not the task's."""
    return name == LOSS or name.startswith(OF_SOURCE)


def may_have_rows(data: Data) -> bool:
    """Whether a recipe holds out validation rows."""
    return bool(data.validation or (data.split and data.split.validation))


def evaluates(recipe: Recipe) -> bool:
    """Whether training evaluates, if the data stage leaves validation rows."""
    return recipe.train.eval_strategy != "no" and may_have_rows(recipe.data)


def depends_on_metric(train: Train) -> bool:
    """Whether what is trained depends on the task's metric: it tells the best step, when to stop, or when the rate falls."""
    decides = train.keeps_best or train.early_stopping_patience is not None or schedule.follows_metric(train)
    return decides and not is_loss(train.metric_for_best_model)


def clashes(recipe: Recipe) -> Problems:
    """Conflicts, as (key, message)."""
    train = recipe.train
    named = wanted(train)
    if named and not may_have_rows(recipe.data):
        yield (
            ("train", named[0]),
            f"train.{named[0]}={as_yaml(getattr(train, named[0]))} needs validation rows, and there are none: {ADVICE}, or remove it",
        )
    contrary = [name for name in named if name != "eval_strategy"]
    if train.eval_strategy == "no" and contrary:
        yield (
            ("train", contrary[0]),
            f"train.{contrary[0]}={as_yaml(getattr(train, contrary[0]))} needs evaluation during training, but train.eval_strategy=no: "
            "remove one of the two",
        )
    if train.eval_strategy == "epoch" and train.eval_steps is not None:
        yield (
            ("train", "eval_steps"),
            f"train.eval_steps={train.eval_steps} conflicts with train.eval_strategy=epoch: remove one of the two",
        )
    if train.eval_strategy == "steps" and train.eval_steps is None:
        yield ("train", "eval_steps"), "train.eval_strategy=steps needs train.eval_steps"
    if train.early_stopping_threshold and train.early_stopping_patience is None:
        yield (
            ("train", "early_stopping_threshold"),
            f"train.early_stopping_threshold={train.early_stopping_threshold:g} has no effect without train.early_stopping_patience",
        )
    yield from _of_metric(recipe)


def wanted(train: Train) -> list[str]:
    """The fields whose values make no sense without evaluation."""
    asked = {
        "lr_scheduler_type": schedule.follows_metric(train),
        "eval_strategy": train.eval_strategy in ("steps", "epoch"),
        "eval_steps": train.eval_steps is not None,
        "eval_on_start": train.eval_on_start,
        "eval_rows": train.eval_rows is not None,
        "eval_score_rows": bool(train.eval_score_rows),
        "metric_for_best_model": train.metric_for_best_model != LOSS,
        "early_stopping_patience": train.early_stopping_patience is not None,
        "load_best_model_at_end": bool(train.load_best_model_at_end),
    }
    return [name for name, is_asked in asked.items() if is_asked]


def _of_metric(recipe: Recipe) -> Problems:
    name, task = recipe.train.metric_for_best_model, recipe.task
    if is_loss(name) or task not in registry.names(registry.TASKS):
        return
    known = [LOSS, SCORE, *registry.figure_names(task)]
    if name not in known:
        yield (
            ("train", "metric_for_best_model"),
            f"train.metric_for_best_model={short(name)}: not a figure of task={task}{nearest(name, known)}; must be {', '.join(known)}, or "
            f"{OF_SOURCE}SOURCE",
        )
    elif not scores_rows(recipe):
        yield (
            ("train", "metric_for_best_model"),
            f"train.metric_for_best_model={name} needs train.eval_score_rows: on how many validation rows it is computed",
        )


def scores_rows(recipe: Recipe) -> bool:
    """Whether an evaluation computes the task's metric: of a model that generates text, only where the recipe asks for it."""
    if recipe.train.eval_score_rows is None:
        return registry.task_has_labels(recipe.task)
    return recipe.train.eval_score_rows > 0


def interval(train: Train, total: int, batches: int | None) -> int | None:
    """Steps between two evaluations of a training of `total` steps; None if that depends on the batches of an epoch, which are not known."""
    if train.eval_steps is not None:
        return max(1, math.ceil(total * train.eval_steps)) if train.eval_steps < 1 else int(train.eval_steps)
    return None if batches is None else math.ceil(batches / train.gradient_accumulation_steps)


def evaluations(train: Train, total: int, batches: int | None) -> int | None:
    """How often a training of `total` steps evaluates: at its interval, and after the last step; None if that is not known.

    `batches`: of an epoch; None: unknown.
    """
    each = interval(train, total, batches)
    if each is not None:
        return math.ceil(total / each) + train.eval_on_start
    return math.ceil(train.num_train_epochs) + train.eval_on_start if train.max_steps < 0 else None
