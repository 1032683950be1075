"""What `train.lr_scheduler_kwargs` may say for each schedule. transformers would ignore some of it, and follow some of it to where nobody
wants to go: below 0, above the maximum, or into a decay that begins half way down.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from qkit.core.errors import nearest, short
from qkit.recipe._rules import ABOVE_0, AT_LEAST_0, INSIDE, SHARE, Rule, is_number, one_of, whole

if TYPE_CHECKING:
    from qkit.recipe.training import Train


CURVE = one_of("linear", "cosine", "1-sqrt")

BY_METRIC = ("reduce_lr_on_plateau",)  # the schedules whose rate follows a metric, and not the number of the step

RULES: Mapping[str, Mapping[str, Rule]] = {
    "linear": {},
    "cosine": {"num_cycles": ABOVE_0},
    "cosine_with_min_lr": {"min_lr": AT_LEAST_0, "min_lr_rate": SHARE, "num_cycles": ABOVE_0},
    "cosine_with_restarts": {"num_cycles": whole(1)},
    "constant": {},
    "constant_with_warmup": {},
    "polynomial": {"lr_end": AT_LEAST_0, "power": ABOVE_0},
    "inverse_sqrt": {"timescale": whole(1)},
    "warmup_stable_decay": {
        "num_decay_steps": whole(1),
        "num_stable_steps": whole(0),
        "warmup_type": CURVE,
        "decay_type": CURVE,
        "min_lr_ratio": SHARE,
        "num_cycles": ABOVE_0,
    },
    "reduce_lr_on_plateau": {  # its `mode` is that of train.metric_for_best_model
        "factor": INSIDE,
        "patience": whole(0),
        "threshold": AT_LEAST_0,
        "threshold_mode": one_of("rel", "abs"),
        "cooldown": whole(0),
        "min_lr": AT_LEAST_0,
        "eps": AT_LEAST_0,
    },
}
LR_END = 1e-7  # transformers' default of polynomial

Problems = Iterator[tuple[str, str]]


def problems(train: Train) -> Problems:
    """What is wrong whatever the number of steps, as (entry, message)."""
    kind, kwargs, rules = train.lr_scheduler_type, train.lr_scheduler_kwargs, RULES[train.lr_scheduler_type]
    wrong = dict(_wrong_values(kind, kwargs, rules))
    yield from wrong.items()
    if not wrong:
        yield from _RELATIONS.get(kind, _none)(train, kwargs)


def _wrong_values(kind: str, kwargs: Mapping[str, Any], rules: Mapping[str, Rule]) -> Problems:
    for name, value in kwargs.items():
        where = f"train.lr_scheduler_kwargs.{short(name)}"
        if name not in rules:
            known = f"it has {', '.join(rules)}" if rules else "it has none"
            yield (
                name,
                f"{where}: train.lr_scheduler_type={kind} has no such entry{nearest(name, [*rules])}; {known}",
            )
        elif not rules[name].allows(value):
            yield name, f"{where}={short(value)} must be {rules[name].words}"


def _none(train: Train, kwargs: Mapping[str, Any]) -> Problems:
    yield from ()


def _floor(train: Train, kwargs: Mapping[str, Any]) -> Problems:
    given = [name for name in ("min_lr", "min_lr_rate") if name in kwargs]
    if len(given) != 1:
        yield (
            "min_lr",
            "train.lr_scheduler_type=cosine_with_min_lr needs one of train.lr_scheduler_kwargs.min_lr, a rate, and min_lr_rate, a share of "
            f"train.learning_rate; {'both are' if given else 'neither is'} set",
        )
    elif kwargs.get("min_lr", 0) >= train.learning_rate:
        yield "min_lr", _not_below("min_lr", f"{kwargs['min_lr']:g}", train)


def _end(train: Train, kwargs: Mapping[str, Any]) -> Problems:
    if (end := kwargs.get("lr_end", LR_END)) >= train.learning_rate:
        yield "lr_end", _not_below("lr_end", f"{end:g}" + ("" if "lr_end" in kwargs else " (the default)"), train)


def _least(train: Train, kwargs: Mapping[str, Any]) -> Problems:
    if kwargs.get("min_lr", 0) >= train.learning_rate:
        yield "min_lr", _not_below("min_lr", f"{kwargs['min_lr']:g}", train)


def _not_below(name: str, value: str, train: Train) -> str:
    return (
        f"train.lr_scheduler_kwargs.{name}={value} must be below train.learning_rate={train.learning_rate:g}, "
        "from which the rate falls to it"
    )


def _timescale(train: Train, kwargs: Mapping[str, Any]) -> Problems:
    if not train.warmup_steps and "timescale" not in kwargs:
        yield (
            "timescale",
            "train.lr_scheduler_type=inverse_sqrt falls on the scale of the warm-up, but train.warmup_steps=0: set it, or "
            "train.lr_scheduler_kwargs.timescale, the steps after which the rate is 1/sqrt(2) of its maximum",
        )


def _phases(train: Train, kwargs: Mapping[str, Any]) -> Problems:
    if "num_decay_steps" not in kwargs:
        yield (
            "num_decay_steps",
            "train.lr_scheduler_type=warmup_stable_decay needs train.lr_scheduler_kwargs.num_decay_steps, the steps at the end in which the "
            "rate falls",
        )
    if "warmup_type" in kwargs and not train.warmup_steps:
        yield (
            "warmup_type",
            f"train.lr_scheduler_kwargs.warmup_type={kwargs['warmup_type']} has no effect with train.warmup_steps=0: remove it, or set them",
        )
    if "num_cycles" in kwargs and kwargs.get("decay_type", "cosine") != "cosine":
        yield (
            "num_cycles",
            f"train.lr_scheduler_kwargs.num_cycles={kwargs['num_cycles']:g} applies to decay_type=cosine, but "
            f"decay_type={kwargs['decay_type']}: remove it",
        )


_RELATIONS: Mapping[str, Callable[[Train, Mapping[str, Any]], Problems]] = {
    "cosine_with_min_lr": _floor,
    "polynomial": _end,
    "inverse_sqrt": _timescale,
    "warmup_stable_decay": _phases,
    "reduce_lr_on_plateau": _least,
}


def problems_with(train: Train, total: int, rising: int) -> Problems:
    """Conflicts with a training of `total` steps, of which `rising` are its warm-up, as (entry, message)."""
    kwargs = train.lr_scheduler_kwargs
    if train.lr_scheduler_type == "warmup_stable_decay" and is_number(kwargs.get("num_decay_steps")):
        yield from _sums(kwargs, total, rising)
    cycles = kwargs.get("num_cycles", 1)
    if train.lr_scheduler_type == "cosine_with_restarts" and is_number(cycles) and cycles > total - rising:
        yield (
            "num_cycles",
            f"train.lr_scheduler_kwargs.num_cycles={cycles} must not exceed the {total - rising} steps after the warm-up; lower it",
        )


def _sums(kwargs: Mapping[str, Any], total: int, rising: int) -> Problems:
    """The phases of a schedule that has three: together they are the training."""
    falling, stable = kwargs["num_decay_steps"], kwargs.get("num_stable_steps")
    said = f"{rising} of warm-up + " + ("" if stable is None else f"{stable} stable + ") + f"{falling} of decay"
    added = rising + (stable or 0) + falling
    if stable is None and added > total:
        yield (
            "num_decay_steps",
            f"train.lr_scheduler_kwargs: {said} are {added} steps, more than the {total} of the training, so that the rate would begin "
            "below its maximum; lower num_decay_steps or train.warmup_steps",
        )
    if stable is not None and added != total:
        what = (
            "the rate would stay at its minimum for the rest"
            if added < total
            else "the rate would not fall to its minimum"
        )
        yield (
            "num_stable_steps",
            f"train.lr_scheduler_kwargs: {said} are {added} steps, but the training has {total}: {what}; remove num_stable_steps, which is "
            "then what remains",
        )
