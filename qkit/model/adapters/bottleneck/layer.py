"""A module with bottleneck adapters, in the place of the module itself.

An adapter computes scaling * up(dropout(activation(down(x)))), where down and up are linear with a bias, and down is narrow. It adds that

- to the module's output, with the output itself as x: the sequential form;
- to the module's output, with the module's input as x: the parallel form;
- in the parallel form, if the module takes its block's input as `input_tensor` and adds it itself, as the last module of a BERT layer does:
  to `input_tensor`, with `input_tensor` as x. What is added reaches the block's LayerNorm as it does in the other cases.

Of several active adapters, each adds its own to the same sum, so their order does not matter.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

from qkit.core.errors import ModelError
from qkit.model.adapters.bottleneck.config import ACTIVATIONS

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

RESIDUAL = "input_tensor"  # transformers' name for the input of a block, where a module adds it


@dataclass(frozen=True)
class Settings:
    """What one adapter computes beyond its weights, as in BottleneckConfig."""

    activation: str  # of torch.nn.functional
    dropout: float
    scaling: float
    parallel: bool


def bottleneck_width(width: int, reduction_factor: int) -> int:
    """Return the width of an adapter's hidden layer on a module of this width."""
    return max(1, width // reduction_factor)


@functools.cache
def layer_class() -> type[Any]:
    """Return the class BottleneckLayer, a torch module and a tuner layer of PEFT."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from torch import nn

    class BottleneckLayer(Wrapped, nn.Module, BaseTunerLayer):
        """A module with adapters by name."""

        # For PEFT. A name may stand only before the last part of a weight's name: `bottleneck_up.NAME.weight`.
        adapter_layer_names = ("bottleneck_down", "bottleneck_up")
        other_param_names = ("settings",)

    return BottleneckLayer


class Wrapped:
    """The methods of BottleneckLayer, apart from its base classes because those are imported late."""

    base_layer: nn.Module
    bottleneck_down: nn.ModuleDict
    bottleneck_up: nn.ModuleDict
    settings: dict[str, Settings]
    training: bool
    disable_adapters: bool
    active_adapters: Sequence[str]
    _cast_input_dtype: Callable[..., Tensor]

    def __init__(self, base_layer: nn.Module, inputs: int, outputs: int):
        """Wrap a module that reads `inputs` features of each token and returns `outputs` features."""
        from torch import nn

        super().__init__()
        self.base_layer = base_layer
        self.inputs, self.outputs = inputs, outputs
        self.adds_residual = RESIDUAL in inspect.signature(base_layer.forward).parameters
        self.bottleneck_down, self.bottleneck_up = nn.ModuleDict(), nn.ModuleDict()
        self.settings = {}

    def update_layer(self: Any, adapter_name: str, config: Any) -> None:
        """Add an adapter, or replace the one of that name. `config`: a BottleneckConfig."""
        from torch import nn

        inputs = self.inputs if config.parallel else self.outputs
        width = bottleneck_width(self.outputs, config.reduction_factor)
        self.bottleneck_down[adapter_name] = nn.Linear(inputs, width)
        self.bottleneck_up[adapter_name] = nn.Linear(width, self.outputs)
        self.settings[adapter_name] = Settings(
            ACTIVATIONS[config.non_linearity], config.dropout, config.scaling, config.parallel
        )
        if config.init_weights:
            self._initialize(adapter_name)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _initialize(self, name: str) -> None:
        """Set the weights so that the adapter adds exactly zero, and its up projection has a gradient at once."""
        from torch import nn

        down, up = self.bottleneck_down[name], self.bottleneck_up[name]
        nn.init.kaiming_uniform_(down.weight, a=math.sqrt(5))
        for tensor in (down.bias, up.weight, up.bias):
            nn.init.zeros_(tensor)

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """Return the module's output with what the active adapters add; of a tuple, to its first tensor [..., outputs]."""
        names = [] if self.disable_adapters else [name for name in self.active_adapters if name in self.settings]
        parallel = [name for name in names if self.settings[name].parallel]
        sequential = [name for name in names if not self.settings[name].parallel]
        if parallel and self.adds_residual:
            hidden, residual, *rest = inputs
            inputs = (hidden, self._plus(residual, residual, parallel), *rest)
            parallel = []
        output = self.base_layer(*inputs, **named)
        if not parallel and not sequential:
            return output
        first, *rest = output if isinstance(output, tuple) else (output,)
        result = first
        if parallel:
            result = self._plus(result, inputs[0] if inputs else named["hidden_states"], parallel)
        if sequential:
            result = self._plus(result, first, sequential)
        return (result, *rest) if isinstance(output, tuple) else result

    def _plus(self, onto: Tensor, read: Tensor, names: Sequence[str]) -> Tensor:
        """Return `onto` plus what these adapters compute from `read`, in the dtype of `onto`: adapters in fp32 are added in fp32."""
        result = onto
        for name in names:
            result = result + self._change(name, read)
        return result.to(onto.dtype)

    def _change(self, name: str, read: Tensor) -> Tensor:
        from torch.nn import functional

        down, up, settings = self.bottleneck_down[name], self.bottleneck_up[name], self.settings[name]
        hidden = getattr(functional, settings.activation)(down(self._cast_input_dtype(read, down.weight.dtype)))
        added: Tensor = up(functional.dropout(hidden, settings.dropout, self.training)) * settings.scaling
        return added

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[torch.device | None, torch.dtype | None]:
        """Return where the adapters belong, and their dtype: PEFT knows it of modules that have a weight themselves."""
        device = None
        for module in base_layer.modules():
            its_device, dtype = super()._get_base_layer_device_and_dtype(module)  # type: ignore[misc]
            device = its_device if device is None else device
            if dtype is not None and dtype.is_floating_point:
                return device, dtype
        return device, None

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> NoReturn:
        """Raise ModelError."""
        refuse_to_merge()

    def unmerge(self) -> None:
        """Do nothing: nothing can have been merged."""


def refuse_to_merge() -> NoReturn:
    """Raise ModelError."""
    raise ModelError(
        "a bottleneck adapter cannot be merged into the weights, because it has an activation between its two matrices: load it "
        "beside the base model, or train a LoRA adapter, which can be merged"
    )
