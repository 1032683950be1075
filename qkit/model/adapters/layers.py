"""The layers of a model with a new head: which of them are trained, from which step on, and at what rate (section `layers` of a recipe).

A parameter's depth is 0 in the embeddings, 1 to N in the N layers, and N + 1 in what comes after them: norms, pooler, head.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qkit.core.errors import ModelError
from qkit.recipe.labels import Layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel, TrainerCallback

EMBEDDINGS = "embed"  # in the names of most embeddings of transformers, and of the norms and projections behind them


def depths(model: PreTrainedModel) -> dict[str, int]:
    """The depth of each parameter, by name.

    Raises:
        ModelError: the model has no stack of as many layers as its configuration says, or several.
    """
    from torch import nn

    stack, count = _stack(model)
    tables = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Embedding)}
    start = f"{stack}."

    def depth(name: str) -> int:
        if name.startswith(start):
            return int(name[len(start) :].split(".", 1)[0]) + 1
        return 0 if EMBEDDINGS in name or name in tables else count + 1

    return {name: depth(name) for name, _ in model.named_parameters()}


def _stack(model: PreTrainedModel) -> tuple[str, int]:
    """The name of the list of layers, and how many there are."""
    from torch import nn

    count = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    stacks = [
        name for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module) == count
    ]
    outer = [name for name in stacks if not any(name.startswith(f"{other}.") for other in stacks if other != name)]
    if len(outer) != 1 or count is None:
        raise ModelError(
            f"{type(model).__name__}: its layers cannot be told apart ({len(outer)} lists of {count} modules); remove the section `layers`"
        )
    return outer[0], count


def freeze(model: PreTrainedModel, frozen: int) -> None:
    """Freeze the embeddings and the lowest layers; with `frozen` 0, nothing.

    Raises:
        ModelError: the model has fewer layers.
    """
    if not frozen:
        return
    by_name = depths(model)
    count = max(by_name.values()) - 1
    if frozen > count:
        raise ModelError(f"layers.frozen={frozen}: {type(model).__name__} has {count} layers")
    for name, parameter in model.named_parameters():
        if by_name[name] <= frozen:
            parameter.requires_grad_(False)


def unfreezing(model: PreTrainedModel, section: Layers) -> TrainerCallback:
    """A callback that trains the head alone at first, and one more layer, from the top, every `section.unfreeze_steps` steps.

    The embeddings join one such span after the last layer; what `section.frozen` freezes never does.
    """
    from transformers import TrainerCallback

    assert section.unfreeze_steps is not None
    every, by_name = section.unfreeze_steps, depths(model)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    top = max(by_name[name] for name in trained)

    class Unfreezing(TrainerCallback):
        """Sets what is trained before each step."""

        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            lowest = top - state.global_step // every
            for name, parameter in trained.items():
                parameter.requires_grad_(by_name[name] >= lowest)

        def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            for parameter in trained.values():
                parameter.requires_grad_(True)

    return Unfreezing()
