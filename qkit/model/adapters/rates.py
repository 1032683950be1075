"""Parameters whose learning rate differs from train.learning_rate: the groups of the optimizer, in training and in the plan.

By depth (layers.rate_decay), in embeddings and head (train.embedding_learning_rate), and in the second factor of LoRA (lora.loraplus_lr_ratio).
The last is the grouping of peft.optimizers.create_loraplus_optimizer, but for embeddings, for which that has a rate of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qkit.core.errors import RecipeError
from qkit.model.adapters import layers
from qkit.recipe.schema import Recipe

if TYPE_CHECKING:
    import torch
    from torch.optim import Optimizer
    from transformers import PreTrainedModel

LORA_B = "lora_B"  # in the names of PEFT's parameters; of an adapter on an embedding, lora_embedding_B
MAIN, SECOND, EMBEDDINGS = "main", "B of LoRA", "embeddings"


@dataclass(frozen=True)
class Group:
    """Parameters with one learning rate; `rate`: at its maximum."""

    name: str
    rate: float


@dataclass(frozen=True)
class Rates:
    """The learning rates of a recipe. None: no rate of their own."""

    main: float
    ratio: float | None = None
    embeddings: float | None = None
    decay: float = 1.0

    @property
    def differ(self) -> bool:
        """Whether some parameters may have another rate than the rest."""
        return self.ratio is not None or self.embeddings is not None or self.decay < 1

    def second(self) -> Group:
        """The group of the second factor of LoRA."""
        return self.group(SECOND if self.ratio is not None else MAIN, self.ratio or 1.0)

    def of_embeddings(self) -> Group:
        """The group of embeddings and head."""
        if self.embeddings is None:
            return self.group()
        return Group(EMBEDDINGS, self.embeddings)

    def group(self, name: str = MAIN, times: float = 1.0) -> Group:
        """A group whose rate is a multiple of the main one."""
        return Group(name, self.main * times)


def rates_of(recipe: Recipe) -> Rates:
    """The learning rates of a recipe, as far as its method has such parameters."""
    return Rates(
        recipe.train.learning_rate,
        recipe.lora.loraplus_lr_ratio if recipe.method == "lora" else None,
        recipe.train.embedding_learning_rate,
        recipe.layers.rate_decay if recipe.method == "full" else 1.0,
    )


def grouped(model: PreTrainedModel, rates: Rates) -> dict[str, Group]:
    """The group of each parameter that is trained, by name.

    Raises:
        RecipeError: an embedding is to have its own rate, and none is trained.
        ModelError: the layers of the model cannot be told apart (layers.rate_decay).
    """
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if rates.decay < 1:
        return dict(_by_depth(model, trained, rates))
    inside = set(_names_inside(model, _tables(model)))
    if rates.embeddings is not None and not inside & trained.keys():
        raise RecipeError(
            f"train.embedding_learning_rate={rates.embeddings:g}: no embedding and no language-model head is trained; remove it, or add tokens "
            "(model.add_tokens)"
        )

    def group(name: str, parameter: torch.Tensor) -> Group:
        if name in inside:
            return rates.of_embeddings()
        return rates.second() if LORA_B in name or parameter.ndim == 1 else rates.group()

    return {name: group(name, parameter) for name, parameter in trained.items()}


def in_order(groups: Iterable[Group], rates: Rates) -> list[Group]:
    """Each group once. One with train.learning_rate comes first: its rate is the one that is logged."""
    return sorted({*groups}, key=lambda group: (group.rate != rates.main, -group.rate, group.name))


def divide(optimizer: Optimizer, model: PreTrainedModel, rates: Rates) -> None:
    """Divide the optimizer's groups by their rate. Nothing else of them changes, so weight decay stays off norms and biases.

    Raises:
        RecipeError, ModelError: as `grouped`.
    """
    by_name = grouped(model, rates)
    by_parameter = {parameter: by_name.get(name) for name, parameter in model.named_parameters()}
    optimizer.param_groups = [
        {**group, "params": parameters, "lr": _like(group["lr"], each.rate)}
        for each in in_order(by_name.values(), rates)
        for group in optimizer.param_groups
        if (parameters := [one for one in group["params"] if by_parameter[one] == each])
    ]


def _like(held: Any, rate: float) -> Any:
    """A rate as the optimizer holds it: those of torchao have it in a tensor."""
    return held.new_tensor(rate) if hasattr(held, "new_tensor") else rate


def _by_depth(model: PreTrainedModel, trained: Mapping[str, Any], rates: Rates) -> Iterator[tuple[str, Group]]:
    """Each layer has the rate of the one above it times `rates.decay`."""
    depths = layers.depths(model)
    top = max(depths.values())
    named = {top: "head", 0: EMBEDDINGS}
    for name in trained:
        depth = depths[name]
        yield name, rates.group(named.get(depth, f"layer {depth}"), rates.decay ** (top - depth))


def _tables(model: PreTrainedModel) -> list[Any]:
    """The modules of embeddings, and the language-model head."""
    from torch import nn

    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    ends = [base.get_input_embeddings(), base.get_output_embeddings()]
    tables = (m for m in model.modules() if isinstance(getattr(m, "base_layer", m), nn.Embedding))
    return [*ends, *tables]


def _names_inside(model: PreTrainedModel, modules: Iterable[Any]) -> Iterator[str]:
    """The names of the parameters of these modules: of what PEFT has wrapped, also those beside the original."""
    within = {id(module) for module in modules if module is not None}
    for prefix, module in model.named_modules():
        if id(module) in within:
            yield from (f"{prefix}.{name}" for name, _ in module.named_parameters())
