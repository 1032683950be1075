"""The settings of bottleneck adapters, as a config class of PEFT: what adapter_config.json holds."""

from __future__ import annotations

import enum
import functools
from dataclasses import dataclass
from typing import Any

from qkit.core.errors import RecipeError, nearest

# The names that a config accepts, and torch's functions for them: all keep zero at zero
ACTIVATIONS = {"relu": "relu", "gelu": "gelu", "swish": "silu", "silu": "silu", "tanh": "tanh"}


class MethodName(enum.StrEnum):
    """The method's name in adapter_config.json. PEFT's own enumeration is closed; it compares and looks up names as strings."""

    BOTTLENECK = "BOTTLENECK"

    def __str__(self) -> str:
        return f"{type(self).__name__}.{self.name}"  # as PEFT's own, whose status reports take what follows the dot


@functools.cache
def config_class() -> type[Any]:
    """Return the class BottleneckConfig, a dataclass and a `peft.PeftConfig`.

    Creating a config raises RecipeError if a value is out of range.
    """
    from peft import PeftConfig

    @dataclass
    class BottleneckConfig(PeftConfig):
        """Settings of the adapters of one name; lists of modules may also be one regular expression for the full name."""

        reduction_factor: int = 16  # width of the module / width of the adapter's hidden layer
        non_linearity: str = "relu"
        dropout: float = 0.0  # on the hidden layer
        scaling: float = 1.0  # of what the adapter adds
        parallel: bool = False  # the adapter reads the module's input, not its output
        target_modules: list[str] | str | None = None
        exclude_modules: list[str] | str | None = None
        modules_to_save: list[str] | None = None  # trained in full, such as a head
        init_weights: bool = True  # the adapter adds zero until it is trained; False: random, for tests

        def __post_init__(self) -> None:
            super().__post_init__()
            self.peft_type = MethodName.BOTTLENECK
            check(self)
            for name in (
                "target_modules",
                "exclude_modules",
            ):  # as PEFT's own configs, which sets make faster to search
                if isinstance(value := getattr(self, name), list):
                    setattr(self, name, set(value))

    return BottleneckConfig


def check(config: Any) -> None:
    """Raise RecipeError if a setting is out of range."""
    if config.non_linearity not in ACTIVATIONS:
        raise RecipeError(
            f"non_linearity={config.non_linearity!r} is none of {', '.join(ACTIVATIONS)}"
            + nearest(str(config.non_linearity), list(ACTIVATIONS))
        )
    if config.reduction_factor < 1 or config.reduction_factor != int(config.reduction_factor):
        raise RecipeError(
            f"reduction_factor={config.reduction_factor}: it divides the width of a module; set a whole number >= 1"
        )
    if not 0 <= config.dropout < 1:
        raise RecipeError(f"dropout={config.dropout}: it is a probability; set a number >= 0 and < 1")
