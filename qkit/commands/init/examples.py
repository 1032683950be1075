"""The recipes that ship with qkit: beside the package in a checkout, inside it when it is installed."""

from __future__ import annotations

from pathlib import Path

import qkit
from qkit.core.errors import RecipeError, nearest, short

PACKAGE = Path(qkit.__file__).parent
PLACES = (PACKAGE / "recipe" / "examples", PACKAGE.parent / "recipes")  # installed; in a checkout


def examples() -> dict[str, Path]:
    """The file of each recipe by its name."""
    folder = next((place for place in PLACES if place.is_dir()), None)
    return {file.stem: file for file in sorted(folder.glob("*.yaml"))} if folder else {}


def example(name: str) -> Path:
    """The file of a recipe.

    Raises:
        RecipeError: there is none of that name.
    """
    known = examples()
    if name not in known:
        raise RecipeError(
            f"--example {short(name)}: no such recipe{nearest(name, list(known))}; there are {', '.join(known)}"
        )
    return known[name]


def summary(file: Path) -> str:
    """The first line of a recipe's comment: what it shows."""
    return file.read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ")
