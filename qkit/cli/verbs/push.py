"""`qkit push`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qkit.cli import console
from qkit.cli.options import Json, Quiet, verb_app

app = verb_app()

Folder = Annotated[Path, typer.Argument(metavar="FOLDER", help="The folder of an export, or a run's merge folder.")]
Repo = Annotated[str, typer.Argument(metavar="OWNER/NAME", help="The repository on the Hugging Face hub.")]
Private = Annotated[bool, typer.Option("--private", help="Create a private repository.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Only show what would be uploaded.")]
Force = Annotated[bool, typer.Option("--force", help="Upload even if the folder has no provenance or failed its gate.")]


@app.command(epilog="Example: qkit push runs/quickstart/export/vllm me/my-model --private --dry-run")
def push(
    folder: Folder,
    repo: Repo,
    private: Private = False,
    dry_run: DryRun = False,
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Upload a model folder to the Hugging Face hub."""
    from qkit.report import push as pushing

    upload = pushing.planned(folder, repo, private, force)
    url = None if dry_run else pushing.push(upload)
    console.show(as_json, {**pushing.to_dict(upload), "url": url}, lambda: url or pushing.screen(upload))
