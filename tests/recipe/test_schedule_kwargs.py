"""Entries of train.lr_scheduler_kwargs: which are refused, before anything is loaded, and that the rest is what transformers takes."""

from __future__ import annotations

import inspect
from typing import Any, get_args

import pytest

from qkit.core.errors import RecipeError
from qkit.recipe import _scheduler_kwargs
from qkit.recipe.load import from_dict
from qkit.recipe.schema import Recipe
from qkit.recipe.training import Schedule

WSD = "warmup_stable_decay"


def recipe(kind: str, kwargs: dict[str, Any], **train: Any) -> Recipe:
    section = {"lr_scheduler_type": kind, "lr_scheduler_kwargs": kwargs, **train}
    return from_dict({"task": "chat", "model": {"source": "owner/x"}, "data": {}, "train": section}, (), "the test")


REFUSED: list[tuple[str, dict[str, Any], dict[str, Any], str]] = [
    ("linear", {"num_cycles": 1}, {}, r"kwargs\.num_cycles: .*=linear has no such entry; it has none"),
    ("constant", {"min_lr": 1e-5}, {}, r"kwargs\.min_lr: .*=constant has no such entry"),
    ("constant_with_warmup", {"min_lr": 1e-5}, {"warmup_steps": 2}, "no such entry"),
    ("cosine", {"num_cycle": 1}, {}, "did you mean 'num_cycles'"),
    ("cosine", {"last_epoch": 3}, {}, "no such entry"),
    ("cosine", {"num_cycles": 0}, {}, "must be a number above 0"),
    ("cosine", {"num_cycles": True}, {}, "must be a number above 0"),
    ("cosine", {"num_cycles": float("nan")}, {}, "must be a number above 0"),
    ("cosine_with_min_lr", {}, {}, "needs one of .* neither is set"),
    ("cosine_with_min_lr", {"min_lr": 1e-6, "min_lr_rate": 0.1}, {}, "both are set"),
    ("cosine_with_min_lr", {"min_lr": 1e-3}, {"learning_rate": 1e-3}, "must be below train.learning_rate=0.001"),
    ("cosine_with_min_lr", {"min_lr_rate": 1.0}, {}, "must be a share of at least 0 and below 1"),
    ("cosine_with_restarts", {"num_cycles": 1.5}, {}, "must be a whole number of at least 1"),
    ("cosine_with_restarts", {"num_cycles": 9}, {"max_steps": 10, "warmup_steps": 2}, "not exceed the 8 steps after"),
    ("polynomial", {"lr_end": -1e-6}, {}, "must be a number of at least 0"),
    ("polynomial", {"lr_end": 1e-3}, {"learning_rate": 1e-3}, "must be below train.learning_rate"),
    ("polynomial", {}, {"learning_rate": 1e-8}, r"lr_end=1e-07 \(the default\) must be below"),
    ("polynomial", {"power": 0}, {}, "must be a number above 0"),
    ("inverse_sqrt", {}, {}, r"falls on the scale of the warm-up, but train\.warmup_steps=0"),
    ("inverse_sqrt", {"timescale": 0}, {}, "must be a whole number of at least 1"),
    (WSD, {}, {}, "needs train.lr_scheduler_kwargs.num_decay_steps"),
    (WSD, {"num_decay_steps": 0.1}, {}, "must be a whole number of at least 1"),
    (WSD, {"num_decay_steps": 8}, {"max_steps": 10, "warmup_steps": 3}, "are 11 steps, more than the 10"),
    (WSD, {"num_decay_steps": 3, "num_stable_steps": 3}, {"max_steps": 8}, "are 6 steps, but the training has 8"),
    (WSD, {"num_decay_steps": 3, "num_stable_steps": 7}, {"max_steps": 8}, "would not fall to its minimum"),
    (WSD, {"num_decay_steps": 2, "warmup_type": "cosine"}, {}, "warmup_type=cosine has no effect"),
    (WSD, {"num_decay_steps": 2, "decay_type": "sqrt"}, {}, "must be one of linear, cosine, 1-sqrt"),
    (WSD, {"num_decay_steps": 2, "decay_type": "linear", "num_cycles": 1.0}, {}, "applies to decay_type=cosine"),
    ("reduce_lr_on_plateau", {}, {}, "needs validation rows, and there are none"),
]


@pytest.mark.parametrize(("kind", "kwargs", "train", "said"), REFUSED)
def test_what_transformers_would_take_wrongly_is_refused(
    kind: str, kwargs: dict[str, Any], train: dict[str, Any], said: str
) -> None:
    with pytest.raises(RecipeError, match=said) as caught:
        recipe(kind, kwargs, **train)
    assert len(caught.value.problems) == 1, caught.value


def test_numbers_that_yaml_reads_as_text_are_numbers() -> None:
    assert recipe("cosine_with_min_lr", {"min_lr": "1e-5"}).train.lr_scheduler_kwargs == {"min_lr": 1e-5}


def test_every_schedule_has_rules_and_every_entry_is_one_of_transformers() -> None:
    """All entries that transformers has, but for what qkit fills in itself."""
    from torch.optim.lr_scheduler import ReduceLROnPlateau
    from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION

    assert {*get_args(Schedule)} == _scheduler_kwargs.RULES.keys()
    filled_in = {"optimizer", "last_epoch", "num_warmup_steps", "num_training_steps", "kwargs", "self", "mode"}
    for kind, rules in _scheduler_kwargs.RULES.items():
        function = TYPE_TO_SCHEDULER_FUNCTION[kind]
        if kind == "reduce_lr_on_plateau":
            function = ReduceLROnPlateau.__init__
        assert {*inspect.signature(function).parameters} - filled_in == rules.keys(), kind
