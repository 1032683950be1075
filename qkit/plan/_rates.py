"""The learning rate of each step and group of parameters: `qkit plan --schedule`. By the functions that training takes it from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from qkit.core.errors import RecipeError
from qkit.model.adapters import rates
from qkit.model.adapters.rates import Group, Rates
from qkit.model.shape import Shape
from qkit.plan import solve
from qkit.plan._subject import subject_of
from qkit.plan._traced.head import model_of
from qkit.plan._traced.model import built
from qkit.plan.fixed_memory import learnt_rows
from qkit.plan.sheet import checked_steps
from qkit.recipe import schedule
from qkit.recipe.schema import WHOLE, Recipe


@dataclass(frozen=True)
class Curve:
    """The rates of a group, one for each step. `learning_rate`: at its maximum."""

    name: str
    learning_rate: float
    rates: tuple[float, ...]


@dataclass(frozen=True)
class Course:
    """How the learning rate goes. `groups`: the first is the one that metrics.jsonl has."""

    lr_scheduler_type: str
    lr_scheduler_kwargs: dict[str, Any]
    steps: int
    warmup_steps: int
    groups: tuple[Curve, ...]

    def to_dict(self) -> dict[str, Any]:
        """The course for `--json`."""
        return asdict(self)


def course(recipe: Recipe, lengths: Sequence[Sequence[int]] = (), labels: int | None = None) -> Course:
    """How the learning rate of a recipe goes. `lengths`, `labels`: of the training rows, as in sheet.sheet.

    Raises:
        RecipeError: the number of steps is not known yet, too low for the schedule, or the rate follows a metric.
        ModelError: the model's groups of parameters cannot be determined.
    """
    train = recipe.train
    if schedule.follows_metric(train):
        raise RecipeError(
            f"--schedule: train.lr_scheduler_type={train.lr_scheduler_type} follows a metric, which is not known before training"
        )
    if (total := checked_steps(recipe, lengths)) is None:
        raise RecipeError(
            "--schedule: the number of steps is known after the data stage (`qkit data`), or with train.max_steps; set it"
        )
    factor = schedule.factor(train, total)
    factors = [factor(step) for step in range(total)]
    curves = (
        Curve(group.name, group.rate, tuple(group.rate * share for share in factors))
        for group in _groups(recipe, lengths, labels)
    )
    kind, kwargs = train.lr_scheduler_type, train.lr_scheduler_kwargs
    return Course(kind, kwargs, total, schedule.warmup(train, total), tuple(curves))


def _groups(recipe: Recipe, lengths: Sequence[Sequence[int]], labels: int | None) -> list[Group]:
    """The groups of parameters that training will have."""
    of_recipe = rates.rates_of(recipe)
    if not of_recipe.differ:
        return [of_recipe.group()]
    subject = subject_of(recipe, solve.known_of(lengths, recipe, labels))
    if isinstance(subject, Shape) and recipe.method not in WHOLE:
        return rates.in_order(_of_shape(recipe, subject, of_recipe), of_recipe)
    head = model_of(recipe.model) if isinstance(subject, Shape) else subject
    return rates.in_order(rates.grouped(built(recipe, head), of_recipe).values(), of_recipe)


def _of_shape(recipe: Recipe, shape: Shape, of_recipe: Rates) -> Iterator[Group]:
    """The groups of an adapter on a language model."""
    yield of_recipe.group()
    if recipe.method == "lora":
        yield of_recipe.second()
    if learnt_rows(recipe, shape):
        yield of_recipe.of_embeddings()
