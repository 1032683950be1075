"""`qkit plan`."""

from __future__ import annotations

import gc
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qkit.cli import console
from qkit.cli.opening import open_recipe
from qkit.cli.options import Json, MaybeTarget, Quiet, Set, need_effect, verb_app
from qkit.core.errors import RecipeError, UserError

if TYPE_CHECKING:
    from qkit.plan.sheet import Options, Sheet
    from qkit.recipe.schema import Recipe

app = verb_app()

FOR_A_RECIPE = ("overrides", "memory", "card", "solve", "explain")
FOR_A_SCHEDULE = ("overrides", "schedule")

Memory = Annotated[str | None, typer.Option("--memory", metavar="24GiB", help="Plan for a device of this size.")]
Card = Annotated[str | None, typer.Option("--card", metavar="rtx-4090", help="Plan for a known card.")]
Model = Annotated[
    str | None,
    typer.Option("--model", metavar="M", help="Instead of a recipe: a config.json, its folder, or a model on the hub."),
]
Quantization = Annotated[
    str | None, typer.Option("--quantization", metavar="nf4", help="With --model: the quantization of the base model.")
]
Rank = Annotated[int | None, typer.Option("--rank", min=1, help="With --model: the adapter's rank.")]
Batch = Annotated[int | None, typer.Option("--batch", min=1, help="With --model: rows per batch.")]
RowLength = Annotated[int | None, typer.Option("--length", min=1, help="With --model: tokens per row.")]
Solve = Annotated[
    str | None,
    typer.Option(
        "--solve",
        metavar="WHAT",
        help="The largest max_length, batch or rank that fits, or the smallest card.",
    ),
]
Explain = Annotated[
    str | None,
    typer.Option("--explain", metavar="LINE", help="Show the formula of a line of the plan, with its numbers."),
]
Schedule = Annotated[
    bool, typer.Option("--schedule", help="Draw the learning rate of each step instead, for each group of parameters.")
]


@app.command(epilog="Example: qkit plan recipes/llama-3.1-8b-24gb.yaml --memory 24GiB")
def plan(
    context: typer.Context,
    target: MaybeTarget = None,
    overrides: Set = None,
    memory: Memory = None,
    card: Card = None,
    model: Model = None,
    quantization: Quantization = None,
    rank: Rank = None,
    batch: Batch = None,
    length: RowLength = None,
    solve: Solve = None,
    explain: Explain = None,
    schedule: Schedule = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Estimate memory, line by line, and time before anything is loaded. Exits with 2 if a stage does not fit."""
    _start_fast()
    from qkit.plan import plan as plan_plan
    from qkit.plan import sheet
    from qkit.plan import solve as plan_solve

    if schedule:
        need_effect(context, "with --schedule, which needs a recipe or a run", FOR_A_SCHEDULE)
        _show_schedule(_planned_recipe(target, overrides, sheet.Options("")), target, as_json)
        return
    if target is not None and not model:
        need_effect(context, "with a recipe or a run, only with --model", FOR_A_RECIPE)
    if explain and solve:
        raise UserError("--solve: no effect with --explain, which shows the lines of one plan; use one of the two")
    recipe = _planned_recipe(target, overrides, sheet.Options(model or "", quantization, rank, batch, length))
    device, question = plan_plan.device_for(card, memory), plan_solve.question(solve)
    rows = sheet.lengths_of(target), question, sheet.labels_of(target), sheet.validation_rows_of(target)
    if _show_sheet(sheet.sheet(recipe, device, *rows), explain, as_json) and not question:
        raise typer.Exit(2)  # with --solve, it already says what would fit


def _show_sheet(planned: Sheet, explain: str | None, as_json: bool) -> bool:
    """Print the plan, and return whether a stage does not fit; or print a line of it."""
    from qkit.plan import screen as plan_screen
    from qkit.plan import sheet

    if explain:
        items = sheet.explain(planned, explain)
        console.show(as_json, [item.to_dict() for item in items], lambda: plan_screen.explanation(items))
        return False
    console.show(as_json, sheet.to_dict(planned), lambda: plan_screen.screen(planned))
    return bool(planned.short)


def _show_schedule(recipe: Recipe, target: Path | None, as_json: bool) -> None:
    """Print how the learning rate goes."""
    from qkit.plan import _rates, _rates_screen, sheet

    with console.silence_stderr():
        course = _rates.course(recipe, sheet.lengths_of(target), sheet.labels_of(target))
    console.show(as_json, course.to_dict(), lambda: _rates_screen.screen(course))


def _start_fast() -> None:
    """Save start-up time: a plan ends before garbage matters, and does not use the pydantic plugins of installed packages."""
    gc.disable()
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")


def _planned_recipe(target: Path | None, overrides: list[str] | None, options: Options) -> Recipe:
    """The recipe of a file or a run, or the recipe that --model and its options describe."""
    from qkit.plan.sheet import recipe_for

    if bool(options.model) == (target is not None):
        raise RecipeError("name either a recipe or run directory, or --model; one of the two")
    return recipe_for(options, overrides or ()) if target is None else open_recipe(target, overrides)
