"""Which weights a model has that an adapter can be trained on: from its shape, from the model itself, or from its config alone.

`outline_of` serves configs of unknown families: transformers builds the model without weights, and its sizes are read from that. This is slow,
since it imports torch and transformers, and is used only where arithmetic on config.json would be a guess.
"""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qkit.model import shape
from qkit.model.shape import NEEDED, Linear, Outline, Shape

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Inventory:
    """The weights that an adapter can be trained on, by their full names.

    `linears`: modules of the layers. `others`: embeddings and head, which all-linear leaves out. `experts`, `routers`: parameters.
    `renamed`: names that PEFT takes for experts and routers -> their own names. `rest`: modules that cannot have an adapter; of a shape, only
    modules that contain others.
    """

    linears: tuple[Linear, ...]
    others: tuple[Linear, ...] = ()
    experts: tuple[Linear, ...] = ()
    routers: tuple[Linear, ...] = ()
    renamed: Mapping[str, str] | None = None
    rest: tuple[str, ...] = ()

    def kinds(self) -> list[str]:
        """The names that a recipe can use, the layers' modules first; without the head, whose adapter would never be trained."""
        every = (*self.linears, *self.experts, *self.routers, *(m for m in self.others if m.name != "lm_head"))
        return list(dict.fromkeys(kind_of(matrix) for matrix in every))


def kind_of(matrix: Linear) -> str:
    """The end of a name, which is the same in every layer: `q_proj`; of a router's weight `gate.weight`."""
    parts = matrix.name.split(".")
    return ".".join(parts[-2:]) if parts[-1] == "weight" else parts[-1]


@functools.lru_cache(maxsize=64)
def inventory(sizes: Shape) -> Inventory:
    """The inventory of a shape."""
    linears, others = shape.modules(sizes), shape.vocabulary_modules(sizes)
    names = [matrix.name.split(".") for matrix in (*linears, *others)]
    return Inventory(
        linears,
        others,
        shape.experts(sizes),
        shape.routers(sizes),
        dict(sizes.outline.renamed if sizes.outline else sizes.expert_names),
        tuple(dict.fromkeys(".".join(parts[:end]) for parts in names for end in range(1, len(parts)))),
    )


# --- from the model itself ----------------------------------------------------------------------------------------------


def inventory_of(model: PreTrainedModel) -> Inventory:
    """The inventory of a model, whether or not it is loaded, quantized or has weights."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    experts = tuple(_expert_parameters(model))
    experts_by_block = {matrix.name.rpartition(".")[0].rpartition(".")[0]: matrix.experts for matrix in experts}
    routers = tuple(_routers(model, experts_by_block))
    not_linear = {matrix.name.removesuffix(".weight") for matrix in routers}
    linears: list[Linear] = []
    others: list[Linear] = []
    rest: list[str] = []
    for name, module in model.named_modules():
        if (sizes := _sizes(module)) is None or name in not_linear:
            rest.append(name)
            continue
        matrix = Linear(name, *sizes, getattr(module, "bias", None) is not None)
        outside = module is head or module is embedding or not _is_linear(module)
        (others if outside else linears).append(matrix)
    return Inventory(tuple(linears), tuple(others), experts, routers, _renamed(model) if experts else {}, tuple(rest))


def _is_linear(module: Any) -> bool:
    import torch
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, (torch.nn.Linear, Conv1D))


def _sizes(module: Any) -> tuple[int, int] | None:
    """Inputs and outputs of a module that PEFT can put an adapter on: Linear, Conv1D or Embedding."""
    import torch
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, torch.nn.Linear):
        return module.in_features, module.out_features
    if isinstance(module, Conv1D):
        return module.nx, module.nf
    if isinstance(module, torch.nn.Embedding):
        return module.num_embeddings, module.embedding_dim
    return None


def _expert_parameters(model: PreTrainedModel) -> Iterator[Linear]:
    """Parameters with three dimensions: [experts, out, in], or [experts, in, out] if their module says so."""
    for name, module in model.named_modules():
        if type(module).__module__.startswith("torch.nn"):  # convolutions have three dimensions too
            continue
        for key, parameter in module.named_parameters(recurse=False):
            if parameter.ndim == 3:
                count, outputs, inputs = map(int, parameter.shape)
                if getattr(module, "is_transposed", False):
                    inputs, outputs = outputs, inputs
                yield Linear(f"{name}.{key}", inputs, outputs, hasattr(module, f"{key}_bias"), count)


def _routers(model: PreTrainedModel, experts_by_block: Mapping[str, int]) -> Iterator[Linear]:
    """Weights in the same block as the experts with one row for each expert."""
    for name, module in model.named_modules():
        count, weight = experts_by_block.get(name.rpartition(".")[0]), getattr(module, "weight", None)
        if count and weight is not None and weight.ndim == 2 and int(weight.shape[0]) == count:
            yield Linear(f"{name}.weight", int(weight.shape[1]), count, getattr(module, "bias", None) is not None)


def _renamed(model: PreTrainedModel) -> dict[str, str]:
    """PEFT's own table for this model."""
    from peft.utils import transformers_weight_conversion as tables

    kind = tables._MODEL_TO_CONVERSION_PATTERN.get(model.config.model_type)
    return dict(tables._MOE_TARGET_MODULE_MAPPING.get(kind, {}))


# --- from the config alone ----------------------------------------------------------------------------------------------


def outline_of(config: Mapping[str, Any]) -> Outline | None:
    """The outline of a config.json; None if transformers is not installed or does not know it, as with remote code."""
    return _outline(json.dumps(config, sort_keys=True))


@functools.lru_cache(maxsize=8)
def _outline(text: str) -> Outline | None:
    config = json.loads(text)
    try:
        from transformers import AutoConfig

        known = AutoConfig.for_model(config.pop("model_type", ""), **config)
        model = _without_weights(known)
    except Exception as error:  # a config that its class cannot read raises anything
        log.debug("no outline: %s", error)
        return None
    weights = inventory_of(model)
    sizes = {key: getattr(known.get_text_config(), key, None) for key in (*NEEDED, "num_key_value_heads")}
    return Outline(
        weights.linears,
        weights.others,
        weights.experts,
        weights.routers,
        tuple((weights.renamed or {}).items()),
        model.num_parameters(),
        not getattr(model, "_supports_sdpa", True),
        tuple((key, size) for key, size in sizes.items() if isinstance(size, int)),
    )


def _without_weights(config: Any) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)
