"""Which parameters are trained where no adapter is: all of a model, those that train.trainable names, or its new head alone."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from qkit.core.errors import RecipeError, short
from qkit.model.adapters import layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from qkit.recipe.schema import Recipe

NEAR = 3  # names in a message


def choose(base: PreTrainedModel, new: Sequence[str], recipe: Recipe) -> None:
    """Set what method=full or head trains, and freeze the rest. `new`: the model's new modules.

    Raises:
        RecipeError: a pattern of train.trainable matches no parameter, or what it names lies in layers that layers.frozen freezes.
        ModelError: the model has fewer layers than layers.frozen.
    """
    starts = tuple(f"{part}." for part in new)
    for name, parameter in base.named_parameters():
        parameter.requires_grad_(recipe.method == "full" or name.startswith(starts))
    if recipe.method == "full" and recipe.train.trainable:
        _only(base, recipe.train.trainable, starts)
    layers.freeze(base, recipe.layers.frozen)
    if not any(parameter.requires_grad for parameter in base.parameters()):
        raise RecipeError(
            f"layers.frozen={recipe.layers.frozen} freezes everything that train.trainable names ({', '.join(recipe.train.trainable)}): "
            "nothing would be trained; remove one of the two"
        )


def _only(base: PreTrainedModel, patterns: Sequence[str], new: tuple[str, ...]) -> None:
    """Freeze every parameter of whose names no pattern is found in any, but for new modules. A tied weight has two names, and is trained if
    one matches."""
    by_name = dict(base.named_parameters(remove_duplicate=False))
    chosen = {id(parameter) for name, parameter in by_name.items() if name.startswith(new)}
    for pattern in patterns:
        matches = [id(parameter) for name, parameter in by_name.items() if re.search(pattern, name)]
        if not matches:
            raise RecipeError(_unknown(base, pattern, list(by_name)))
        chosen.update(matches)
    for parameter in base.parameters():
        parameter.requires_grad_(id(parameter) in chosen)


def _unknown(base: PreTrainedModel, pattern: str, names: Sequence[str]) -> str:
    """The message for a pattern that matches nothing, with the names that are most like it."""
    plain = re.sub(r"\\(.)", r"\1", pattern)
    ends = {end: name for name in reversed(names) for end in _ends(name)}
    near = [ends[end] for end in difflib.get_close_matches(plain, ends, n=2 * NEAR, cutoff=0.5)]
    shown = list(dict.fromkeys([*near, *names]))[:NEAR]
    return (
        f"train.trainable: {short(repr(pattern))} is found in the name of no parameter of {type(base).__name__}; "
        f"{'near names' if near else 'its names begin with'}: {', '.join(shown)}"
    )


def _ends(name: str) -> list[str]:
    """A name, and what remains of it after each of its dots."""
    parts = name.split(".")
    return [".".join(parts[start:]) for start in range(len(parts))]
