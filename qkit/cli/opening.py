"""Opens the recipe or the run that a path on the command line names."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qkit.core.progress import Progress

if TYPE_CHECKING:
    from qkit.recipe.schema import Recipe
    from qkit.run.directory import Run


def open_recipe(target: Path, overrides: Sequence[str] | None) -> Recipe:
    """Load the recipe of a file or a run directory; `export.formats=all` is replaced by the formats that it stands for."""
    from qkit.plan import deployable
    from qkit.recipe.load import load

    recipe, refusals = deployable.resolved(load(target / "recipe.yaml" if target.is_dir() else target, overrides or ()))
    for refusal in refusals:
        sys.stderr.write(f"left out of export.formats: {refusal.format}: {refusal.reason}\n")
    return recipe


def open_run(target: Path, overrides: Sequence[str] | None, out: Path | None, progress: Progress) -> Run:
    """Open the run in a directory, or the run of a recipe, which is created if it does not exist.

    Raises:
        RecipeError: `target` is a run, and `out` names another directory.
    """
    from qkit.core.errors import RecipeError
    from qkit.run.directory import Run

    if target.is_dir():
        if out is not None and out.resolve() != target.resolve():
            raise RecipeError(
                f"--out {out}: --out names the directory of a new run, but {target} is an existing run, and its stages write into it (its "
                f"merged model is {target / 'merge'}); omit --out and copy what you need, or pass a recipe instead of the run"
            )
        Run.open(target)
        return Run(target, open_recipe(target, overrides), progress)
    return Run.create(out or Path("runs") / target.stem, open_recipe(target, overrides), progress)
