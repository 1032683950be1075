"""Arguments and options that several verbs share, and the check that every given option has an effect."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Any

import typer

from qkit.core.errors import UserError

LOCAL = "http://127.0.0.1:8000"

Target = Annotated[Path, typer.Argument(metavar="RECIPE_OR_RUN", help="A recipe (.yaml) or a run directory.")]
MaybeTarget = Annotated[
    Path | None, typer.Argument(metavar="[RECIPE_OR_RUN]", help="A recipe (.yaml) or a run directory.")
]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.")]
Set = Annotated[list[str] | None, typer.Option("--set", metavar="A.B=C", help="Override a recipe value. Repeatable.")]
Out = Annotated[
    Path | None,
    typer.Option("--out", metavar="RUN", help="The run directory. Default: runs/ followed by the recipe's name."),
]
Json = Annotated[bool, typer.Option("--json", help="Print only one JSON document on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print only the result and errors, no progress.")]
Child = Annotated[bool, typer.Option("--child", hidden=True)]
KeyFile = Annotated[
    Path | None,
    typer.Option(
        "--api-key-file",
        metavar="FILE",
        help="A file with the API key. Default: the environment variable VLLM_API_KEY.",
    ),
]

COMMON = frozenset({"as_json", "quiet", "child", "help"})  # options that every verb accepts in every form


def verb_app(**settings: Any) -> typer.Typer:
    """A Typer application with the settings that all verbs share."""
    return typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None, **settings)


def need_effect(context: typer.Context, form: str, used: Collection[str]) -> None:
    """Check that this form of the verb uses every option given. `form`: describes it in the message; `used`: parameter names.

    Raises:
        UserError: an option would have no effect.
    """
    unused = [
        param.opts[0]
        for param in context.command.params
        if param.param_type_name == "option"
        and param.name not in COMMON | {*used}
        and getattr(context.get_parameter_source(param.name or ""), "name", "") == "COMMANDLINE"
    ]
    if unused:
        raise UserError(f"{', '.join(unused)}: no effect {form}; see `qkit {_verb_of(context)} --help`")


def _verb_of(context: typer.Context) -> str:
    """The command without the program name, such as `plan` or `bench url`."""
    names = []
    current: Any = context
    while current.parent is not None:
        names.append(str(current.info_name))
        current = current.parent
    return " ".join(reversed(names))
