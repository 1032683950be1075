"""`qkit inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from qkit.cli import console
from qkit.cli.opening import open_recipe
from qkit.cli.options import Json, MaybeTarget, Quiet, Set, need_effect, verb_app

if TYPE_CHECKING:
    from qkit.core.progress import Progress

app = verb_app()

Model = Annotated[
    str | None, typer.Option("--model", metavar="M", help="Instead of a recipe: the model whose tokenizer is used.")
]
Data = Annotated[str | None, typer.Option("--data", metavar="F", help="Instead of a recipe: the data set.")]
RowFormat = Annotated[
    str, typer.Option("--format", help="The row format of --data. Default: recognized by its columns.")
]
RowNumber = Annotated[int | None, typer.Option("--row", help="Show this row token by token.")]
Split = Annotated[str, typer.Option("--split", help="With --row: train, validation or test.")]
Html = Annotated[Path | None, typer.Option("--html", metavar="FILE", help="Also write an HTML page.")]


class Dataset(NamedTuple):
    """A model and a data set given instead of a recipe."""

    model: str | None
    data: str | None
    row_format: str


@app.command(epilog="Example: qkit inspect recipes/quickstart.yaml --row 3")
def inspect(
    context: typer.Context,
    target: MaybeTarget = None,
    overrides: Set = None,
    model: Model = None,
    data: Data = None,
    format: RowFormat = "auto",
    row: RowNumber = None,
    split: Split = "train",
    html: Html = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Show what will be learned, row by row and token by token, and likely problems. Exits with 2 if a check fails."""
    from qkit.data.checks import failures, refusal
    from qkit.data.inspection import page
    from qkit.data.inspection import screen as inspection_screen
    from qkit.data.inspection import view as inspection_view

    if target is not None:
        need_effect(context, "with a recipe or a run", {"overrides", "row", "split", "html"})
    if row is None:
        need_effect(context, "without --row", {"overrides", "model", "data", "format", "html"})
    terminal = console.stderr(keep=True)
    with console.silence_stderr():
        inspection, losses = _inspected(
            target, overrides, Dataset(model, data, format), console.progress_on(terminal, quiet)
        )
        view = inspection_view.row(inspection, split, row) if row is not None else None
        if html:
            page.write(inspection, html)
    drawn = inspection_screen.row_screen(view) if view else inspection_screen.screen(inspection, losses)
    console.show(as_json, inspection_screen.to_dict(inspection, view, losses), lambda: drawn)
    if failed := failures(inspection.summary["checks"]):
        if view:  # the screen of all rows already names them
            terminal.print(refusal(failed), highlight=False, soft_wrap=True)
        raise typer.Exit(2)


def _inspected(
    target: Path | None, overrides: list[str] | None, dataset: Dataset, progress: Progress
) -> tuple[Any, Any]:
    """The inspection of a recipe, of a run, or of a model and a data set; and the row losses if a run has kept them, else None."""
    from qkit.core.errors import RecipeError
    from qkit.data.inspection import view as inspection_view
    from qkit.run.directory import Run

    if target is None:
        if not (dataset.model and dataset.data):
            raise RecipeError("name a recipe or a run directory, or both --model and --data")
        recipe = inspection_view.recipe_for(dataset.model, dataset.data, dataset.row_format, overrides or ())
        return inspection_view.inspect(recipe, progress), None
    if target.is_dir() and not overrides and (target / "data" / "summary.json").is_file():
        run = Run.open(target)
        return inspection_view.of_run(run), inspection_view.losses(run)
    return inspection_view.inspect(open_recipe(target, overrides), progress), None
