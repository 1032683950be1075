"""Arguments and options that several verbs share, and how an option that would have no effect is refused."""

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
Set = Annotated[list[str] | None, typer.Option("--set", metavar="A.B=C", help="Override a recipe value; repeatable.")]
Out = Annotated[
    Path | None, typer.Option("--out", metavar="RUN", help="The run directory; default: runs/ and the recipe's name.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout and nothing else.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, only the result and errors.")]
Child = Annotated[bool, typer.Option("--child", hidden=True)]
KeyFile = Annotated[
    Path | None, typer.Option("--api-key-file", metavar="FILE", help="File with the API key; default: VLLM_API_KEY.")
]

COMMON = frozenset({"as_json", "quiet", "child", "help"})  # every verb takes these in every form


def verb_app(**settings: Any) -> typer.Typer:
    """A Typer application with the settings that all of qkit's have."""
    return typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None, **settings)


def need_effect(context: typer.Context, form: str, used: Collection[str]) -> None:
    """Check that every option given is `used` in this form of the verb (`form`: how the message describes it).

    Raises:
        UserError: an option would have no effect.
    """
    idle = [
        param.opts[0]
        for param in context.command.params
        if param.param_type_name == "option"
        and param.name not in COMMON | {*used}
        and getattr(context.get_parameter_source(param.name or ""), "name", "") == "COMMANDLINE"
    ]
    if idle:
        raise UserError(f"{', '.join(idle)}: no effect {form}; see `qkit {_verb_of(context)} --help`")


def _verb_of(context: typer.Context) -> str:
    """`plan`, or `bench url`."""
    names = []
    step: Any = context
    while step.parent is not None:
        names.append(str(step.info_name))
        step = step.parent
    return " ".join(reversed(names))
