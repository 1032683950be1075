"""Functions of one's own, which a recipe names as `module:function`."""

from __future__ import annotations

import importlib
from typing import Any

from qkit.core.errors import RecipeError, short


def imported(name: str, key: str) -> Any:
    """The function that `key` of a recipe names.

    Raises:
        RecipeError: the module cannot be imported, or has no such function.
    """
    module, _, function = name.partition(":")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise RecipeError(
            f"{key}={short(name)}: {error}; the module must be importable, for example from PYTHONPATH"
        ) from error
