"""What recipes of both tasks have in common that compare a model with a reference: defaults, and values without a meaning."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from qkit.recipe.schema import WHOLE, Recipe
from qkit.tasks._texts import preference_clashes

# TRL's rate is for all weights; an adapter needs a higher one to move a log-probability as far.
STARTS = (True, "gaussian", "orthogonal")  # of an adapter that leaves the base weights as they are
RATE_OF_ALL_WEIGHTS, RATE_OF_AN_ADAPTER = 1e-6, 1e-5


def rate(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """A rate for small changes of a trained model."""
    return {"train": {"learning_rate": RATE_OF_ALL_WEIGHTS if raw.get("method") in WHOLE else RATE_OF_AN_ADAPTER}}


def compared_clashes(recipe: Recipe, section: str) -> Iterator[tuple[tuple[str | int, ...], str]]:
    """Values that have no meaning where answers are compared under a model and its reference. `section`: the one that the task has."""
    data, where = recipe.data, f"task={recipe.task}"
    yield from preference_clashes(recipe, section)
    yield from _of_adapter(recipe)
    yield from _of_loss(recipe)
    if data.packing:
        yield ("data", "packing"), f"data.packing=true is not for {where}: the answers of a row attend apart; remove it"
    if data.loss != "completion":
        yield ("data", "loss"), f"data.loss={data.loss} is not for {where}: only its answers are compared; remove it"
    if recipe.lora.lora_dropout:
        yield (
            ("lora", "lora_dropout"),
            f"lora.lora_dropout={recipe.lora.lora_dropout:g}: {where} compares the model with a reference that has no dropout: remove it",
        )
    if recipe.train.activation_offloading:
        yield ("train", "activation_offloading"), f"train.activation_offloading=true is not for {where}: remove it"


def _of_adapter(recipe: Recipe) -> Iterator[tuple[tuple[str | int, ...], str]]:
    """Adapters whose base alone would not be the reference."""
    where = f"task={recipe.task}"
    if recipe.method != "lora":
        yield (
            ("method",),
            f"method={recipe.method} is not for {where}: its reference is the base with a LoRA adapter off; use method=lora",
        )
    if recipe.lora.init_from is not None:
        yield (
            ("lora", "init_from"),
            f"lora.init_from={recipe.lora.init_from} is not for {where}, whose reference would lack that adapter: merge it, and set "
            "model.source to the merged model",
        )
    if recipe.lora.init_lora_weights not in STARTS:
        yield (
            ("lora", "init_lora_weights"),
            f"lora.init_lora_weights={recipe.lora.init_lora_weights} is not for {where}: with the adapter off, the base must be the reference; "
            "use true, gaussian or orthogonal",
        )


def _of_loss(recipe: Recipe) -> Iterator[tuple[tuple[str | int, ...], str]]:
    """Settings of another loss."""
    data, where = recipe.data, f"task={recipe.task}"
    for key, value, default in (
        ("train.neftune_noise_alpha", recipe.train.neftune_noise_alpha, None),
        ("train.label_smoothing_factor", recipe.train.label_smoothing_factor, 0),
        ("train.loss_type", recipe.train.loss_type, "nll"),
        ("data.weight", data.weight, None),
    ):
        if value != default:
            yield (
                tuple(key.split(".")),
                f"{key}={value} changes the loss of supervised training, and {where} has another: remove it",
            )
