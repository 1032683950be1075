"""`qkit adapters`: list, load and unload the adapters of a running server."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qkit.cli import console
from qkit.cli.options import LOCAL, Json, KeyFile, verb_app

if TYPE_CHECKING:
    from qkit.server.adapters import Endpoint

app = verb_app()
adapters_app = verb_app(no_args_is_help=True, help="List, load and unload the adapters of a running server.")
app.add_typer(adapters_app, name="adapters", epilog="Example: qkit adapters list --url http://127.0.0.1:8000")

Url = Annotated[str, typer.Option("--url", help="The URL of the server.")]
NamedRun = Annotated[str, typer.Argument(metavar="NAME=RUN")]
Name = Annotated[str, typer.Argument(metavar="NAME")]


@adapters_app.command("list", epilog="Example: qkit adapters list --url http://127.0.0.1:8000")
def adapters_list(url: Url = LOCAL, api_key_file: KeyFile = None, as_json: Json = False) -> None:
    """List the models and adapters that the server has."""
    models = _endpoint(url, api_key_file).list()
    console.show(as_json, models, lambda: "\n".join(f"{m['id']}  {m['parent'] or 'base'}  {m['root']}" for m in models))


@adapters_app.command("load", epilog="Example: qkit adapters load sql=runs/sql --url http://127.0.0.1:8000")
def adapters_load(adapter: NamedRun, url: Url = LOCAL, api_key_file: KeyFile = None, as_json: Json = False) -> None:
    """Load an adapter, after the same checks as `qkit serve --adapter`."""
    from qkit.server.adapters import parse

    loaded = _endpoint(url, api_key_file).load(*parse(adapter))
    document = {"name": loaded.name, "path": str(loaded.path)}
    console.show(as_json, document, lambda: f"{loaded.name}: loaded from {loaded.path}")


@adapters_app.command("unload", epilog="Example: qkit adapters unload sql --url http://127.0.0.1:8000")
def adapters_unload(name: Name, url: Url = LOCAL, api_key_file: KeyFile = None, as_json: Json = False) -> None:
    """Unload an adapter."""
    _endpoint(url, api_key_file).unload(name)
    console.show(as_json, {"name": name}, lambda: f"{name}: unloaded")


def _endpoint(url: str, key_file: Path | None) -> Endpoint:
    from qkit.server.adapters import Endpoint
    from qkit.server.process import api_key

    return Endpoint(url, api_key(key_file))
