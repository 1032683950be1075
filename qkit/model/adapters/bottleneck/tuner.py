"""Bottleneck adapters in PEFT: once `register()` has been called, PEFT trains, saves, loads and switches them as its own methods."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn

from qkit.core.errors import MissingExtra, ModelError
from qkit.model.adapters.bottleneck import layer
from qkit.model.adapters.bottleneck.config import MethodName, config_class

if TYPE_CHECKING:
    from torch import nn

PREFIX = "bottleneck_"  # of the names of adapters' weights within a module


def register() -> type[Any]:
    """Make the method known to PEFT, and return its config class. Loading a saved adapter needs this call too; a second one does nothing.

    Raises:
        MissingExtra: the installed PEFT saves its own methods only.
    """
    from peft import __version__, mapping

    if not hasattr(tuner_class(), "_get_adapter_state_dict"):
        raise MissingExtra(
            f"bottleneck adapters need peft>=0.21, and {__version__} is installed: pip install 'peft>=0.21'",
            package="peft",
        )
    # Not by peft.utils.register_peft_method, which accepts only members of PEFT's enumeration.
    mapping.PEFT_TYPE_TO_CONFIG_MAPPING[MethodName.BOTTLENECK] = config_class()
    mapping.PEFT_TYPE_TO_TUNER_MAPPING[MethodName.BOTTLENECK] = tuner_class()
    mapping.PEFT_TYPE_TO_PREFIX_MAPPING[MethodName.BOTTLENECK] = PREFIX
    return config_class()


@functools.cache
def tuner_class() -> type[Any]:
    """Return the class BottleneckModel, a tuner of PEFT."""
    from peft.tuners.tuners_utils import BaseTuner

    class BottleneckModel(Injects, BaseTuner):
        """A model with bottleneck adapters."""

        prefix = PREFIX
        tuner_layer_cls = layer.layer_class()
        target_module_mapping: ClassVar[
            dict[str, list[str]]
        ] = {}  # PEFT's defaults by architecture; places.py says more

    return BottleneckModel


class Injects:
    """The methods of BottleneckModel, apart from its base class because that is imported late."""

    def _create_and_replace(
        self: Any,
        config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if isinstance(target, self.tuner_layer_cls):
            target.update_layer(adapter_name, config)
            return
        wrapped = self.tuner_layer_cls(target, *widths(target, self.model, current_key))
        wrapped.set_adapter(self.active_adapters)
        wrapped.update_layer(adapter_name, config)
        self._replace_module(parent, target_name, wrapped, target)

    def _check_merge_allowed(self) -> NoReturn:
        layer.refuse_to_merge()


def widths(module: nn.Module, model: nn.Module, name: str) -> tuple[int, int]:
    """Return the number of features that a module reads and returns.

    Raises:
        ModelError: the module does not say, and the model has no hidden size.
    """
    for inputs, outputs in (("in_features", "out_features"), ("nx", "nf")):  # torch's Linear; transformers' Conv1D
        if hasattr(module, outputs):
            return int(getattr(module, inputs)), int(getattr(module, outputs))
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    hidden = getattr(text, "hidden_size", None)
    if hidden is None:
        raise ModelError(
            f"{name}: the width of this module ({type(module).__name__}) is unknown, because the model's config has no hidden_size; "
            "name linear modules as targets"
        )
    return int(hidden), int(hidden)
