"""From a path on the command line to a recipe or a run."""

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
    """The recipe of a file or a run directory, with `export.formats=all` resolved to the formats it stands for."""
    from qkit.plan import deployable
    from qkit.recipe.load import load

    recipe, refusals = deployable.resolved(load(target / "recipe.yaml" if target.is_dir() else target, overrides or ()))
    for refusal in refusals:
        sys.stderr.write(f"left out of export.formats: {refusal.format}: {refusal.reason}\n")
    return recipe


def open_run(target: Path, overrides: Sequence[str] | None, out: Path | None, progress: Progress) -> Run:
    """The run in a directory, or the run of a recipe, which is created when it is new.

    Raises:
        RecipeError: `out` names another directory than the run that `target` is.
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
