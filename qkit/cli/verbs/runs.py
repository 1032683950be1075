"""`qkit ls`, `qkit rm` and `qkit gc`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from qkit.cli import console
from qkit.cli.options import Json, Quiet, verb_app
from qkit.core.errors import UserError

app = verb_app()

Folders = Annotated[
    list[Path] | None, typer.Argument(metavar="FOLDER", help="Folders with runs, or runs. Default: runs/.")
]
Doomed = Annotated[list[Path], typer.Argument(metavar="RUN", help="Run directories.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Delete without asking.")]
Days = Annotated[
    float, typer.Option("--days", min=0, help="What in qkit's cache was used within so many days is kept.")
]


@app.command(epilog="Example: qkit ls runs --json")
def ls(folders: Folders = None, as_json: Json = False, quiet: Quiet = False) -> None:
    """List the runs below runs/, the one that changed last first: state, score of what was trained, size, age."""
    from qkit.commands.housekeeping import listing

    runs = listing.listed(folders or [])
    console.show(as_json, [run.to_dict() for run in runs], lambda: listing.table(runs))


@app.command(epilog="Example: qkit rm runs/first runs/second")
def rm(runs: Doomed, yes: Yes = False, as_json: Json = False, quiet: Quiet = False) -> None:
    """Delete run directories, after showing what would go. One that is running, or holds other files, is refused."""
    from qkit.commands.housekeeping import removal

    doomed = removal.doomed(runs)
    for run in doomed if not (yes and quiet) else ():
        console.stderr().print(run.text, highlight=False, soft_wrap=True)
    if not (yes or _agreed(f"Delete {'it' if len(doomed) == 1 else f'these {len(doomed)} runs'}?")):
        doomed = []
    for run in doomed:
        removal.remove(run)
    if as_json or not quiet:
        names = ", ".join(run.path for run in doomed)
        console.show(as_json, [run.to_dict() for run in doomed], lambda: f"deleted: {names or 'nothing'}")


def _agreed(question: str) -> bool:
    """The answer to a question at a terminal.

    Raises:
        UserError: there is none.
    """
    if not sys.stdin.isatty():
        raise UserError("nothing was deleted: there is no terminal to ask at; --yes deletes without asking")
    return typer.confirm(question, err=True)


@app.command(epilog="Example: qkit gc --days 30 --yes")
def gc(
    folders: Folders = None, yes: Yes = False, days: Days = 30.0, as_json: Json = False, quiet: Quiet = False
) -> None:
    """Show what no result needs: checkpoints of finished trainings, what killed stages left, what in the cache is old; --yes deletes it."""
    from qkit.commands.housekeeping import garbage

    leftovers = garbage.leftovers(folders or [], days)
    gone = [one for one in leftovers if garbage.delete(one)] if yes else []
    document = {"deleted": yes, "leftovers": [one.to_dict() for one in (gone if yes else leftovers)]}
    if as_json or not quiet:
        console.show(as_json, document, lambda: garbage.screen(gone if yes else leftovers, yes))
