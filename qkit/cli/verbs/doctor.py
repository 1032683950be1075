"""`qkit doctor`."""

from __future__ import annotations

from typing import Annotated

import typer

from qkit.cli import console
from qkit.cli.options import Json, Quiet, verb_app

app = verb_app()

Make = Annotated[
    str | None,
    typer.Option("--make", metavar="NAME", help="Create a separate environment; NAME must be llmcompressor."),
]


@app.command(epilog="Example: qkit doctor --json")
def doctor(make: Make = None, as_json: Json = False, quiet: Quiet = False) -> None:
    """Check what this machine has, what works on it, what is missing, and how to install it."""
    from dataclasses import asdict

    from qkit.setup import doctor as setup_doctor
    from qkit.setup import screen as setup_screen
    from qkit.setup import side_environments

    if make:
        folder = side_environments.make(make, console.progress_on(console.stderr(), quiet).notify)
        console.show(as_json, {"name": make, "folder": str(folder)}, lambda: f"{make}: {folder}")
        return
    report = setup_doctor.examine()
    console.show(as_json, asdict(report), lambda: setup_screen.screen(report))
