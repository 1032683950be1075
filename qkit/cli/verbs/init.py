"""`qkit init`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qkit.cli import console
from qkit.cli.options import Json, Quiet, need_effect, verb_app
from qkit.core.errors import RecipeError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from qkit.commands.init.dataset import Dataset
    from qkit.commands.init.reading import Candidate
    from qkit.plugins.first_recipe import Base

app = verb_app()

Data = Annotated[
    str | None, typer.Argument(metavar="[DATA]", help="A file or a folder of examples, or a data set on the hub.")
]
Model = Annotated[
    str | None,
    typer.Option(
        "--model", metavar="M", help="The base model: a hub id, a folder or a .gguf file. Default: a small one."
    ),
]
Task = Annotated[str | None, typer.Option("--task", metavar="T", help="The task. Default: by the columns.")]
Out = Annotated[
    Path | None, typer.Option("--out", metavar="FILE", help="The recipe. Default: the data set's name, with .yaml.")
]
Force = Annotated[bool, typer.Option("--force", help="Overwrite the recipe if it exists.")]
Example = Annotated[
    str | None, typer.Option("--example", metavar="NAME", help="Instead of DATA: copy a recipe that ships with qkit.")
]


@app.command(epilog="Example: qkit init reviews.csv --model answerdotai/ModernBERT-base")
def init(
    context: typer.Context,
    data: Data = None,
    model: Model = None,
    task: Task = None,
    out: Out = None,
    force: Force = False,
    example: Example = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write a recipe for a file of examples, by its columns, lengths and labels and by this machine; every value has its reason."""
    from qkit.commands.init import init as starting
    from qkit.commands.init import screen

    if example is not None:
        need_effect(context, "with --example", {"out", "force", "example"})
        _copy(data, example, out, force, as_json)
        return
    if data is None:
        raise RecipeError(_no_data())
    file = starting.destination(data, out, force)
    terminal = console.stderr(keep=True)
    asks = sys.stdin.isatty() and terminal.is_terminal and not (as_json or quiet)
    progress = console.progress_on(terminal, quiet or as_json)
    with console.silence_stderr():
        dataset, candidate = _read(data, task, asks, terminal)
        base = _base(dataset, candidate, model, asks, terminal)
        proposal = starting.propose(dataset, candidate, base, progress=progress)
    starting.write(proposal, file)
    console.show(as_json, starting.to_dict(proposal, file), lambda: screen.screen(proposal, file))
    if proposal.checks or not proposal.composed.fits:
        raise typer.Exit(2)


def _no_data() -> str:
    from qkit.commands.init import examples

    shipped = "\n".join(f"  {name}: {examples.summary(file)}" for name, file in examples.examples().items())
    return (
        f"name a file of examples, such as `qkit init rows.jsonl`, or a recipe to copy with --example NAME:\n{shipped}"
    )


def _copy(data: str | None, name: str, out: Path | None, force: bool, as_json: bool) -> None:
    from qkit.commands.init import init as starting

    if data is not None:
        raise RecipeError(f"--example {name} copies a recipe, and {data} is to be given one: name one of the two")
    file = starting.copy_example(name, out, force)
    value = {"recipe": str(file), "next": [f"qkit inspect {file}", f"qkit run {file}"]}
    console.show(as_json, value, lambda: f"written   {file}\nnext      qkit run {file}")


def _read(data: str, task: str | None, asks: bool, terminal: Console) -> tuple[Dataset, Candidate]:
    """The data set, and the task that reads it: at a terminal the user says which, if several could."""
    from qkit.commands.init import reading
    from qkit.commands.init.dataset import open_dataset

    dataset = open_dataset(data)
    able = reading.candidates(dataset.table)
    first = reading.equally_sure(able)
    if asks and task is None and len(first) > 1:
        for one in first:
            terminal.print(f"{one.task}: {one.suggestion.why}", highlight=False)
        task = _asked("task", first[0].task, [one.task for one in first], terminal)
    return dataset, reading.choose(dataset, able, task)


def _base(dataset: Dataset, candidate: Candidate, model: str | None, asks: bool, terminal: Console) -> Base:
    """The model: as named, as answered at a terminal, or the default."""
    from qkit.commands.init import base
    from qkit.commands.init.init import default_base

    if model is not None:
        return base.named(model)
    default = default_base(dataset, candidate)
    if not asks:
        return default
    terminal.print(f"{default.source}: {default.why}", highlight=False, soft_wrap=True)
    answer = _asked("model", default.source, (), terminal)
    return default if answer == default.source else base.named(answer)


def _asked(what: str, default: str, choices: Sequence[str], terminal: Console) -> str:
    """An answer at the terminal; a blank one is the default."""
    listed = f" ({', '.join(choices)})" if choices else ""
    while True:
        terminal.print(f"{what}{listed} [{default}]: ", end="", highlight=False, soft_wrap=True)
        answer = sys.stdin.readline().strip() or default
        if not choices or answer in choices:
            return answer
