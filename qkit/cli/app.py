"""The entry point: finds the verb, runs it, and turns every error into one message and an exit code."""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import Annotated, Any, NamedTuple, NoReturn

import typer
from typer.core import TyperGroup

from qkit import __version__
from qkit.cli.options import verb_app
from qkit.core.errors import QkitError

if hasattr(typer, "TyperException"):
    USAGE_PROBLEM: Any = typer.TyperException
else:  # earlier versions of typer use the click that is installed
    import click

    USAGE_PROBLEM = click.ClickException


class Verb(NamedTuple):
    """A verb's module in qkit.cli.verbs, and its line in `qkit --help`."""

    module: str
    summary: str


VERBS = {
    "init": Verb("init", "Write a recipe for a file of examples, with a reason for every value."),
    "doctor": Verb("doctor", "Check what works on this machine, what is missing and how to install it."),
    "plan": Verb("plan", "Estimate memory and time before anything is loaded."),
    "inspect": Verb("inspect", "Show what will be learned, row by row, and likely problems."),
    "run": Verb("run", "Run all stages in order; completed stages are skipped."),
    "show": Verb("run", "Summarize a run on one screen."),
    "data": Verb("stages", "Stage: read and tokenize the rows; write the ledger."),
    "train": Verb("stages", "Stage: fine-tune the adapter."),
    "evaluate": Verb("stages", "Stage: score the base model and the adapter."),
    "merge": Verb("merge", "Stage: merge the adapter, or any adapters, into a base model."),
    "export": Verb("stages", "Stage: export the merged model in the recipe's formats."),
    "serve": Verb("serve", "Serve a model with vLLM or ONNX Runtime until Ctrl-C."),
    "verify": Verb("verify", "Stage: compare artifacts, or a server, with the adapter."),
    "bench": Verb("bench", "Stage: measure latency, throughput, memory and cost of each runtime."),
    "report": Verb("stages", "Stage: write the run's HTML page and its model card."),
    "predict": Verb("predict", "Predict every record of a file with a run, an artifact or a server."),
    "chat": Verb("chat", "Talk to a run, a model's folder or a server in the terminal."),
    "push": Verb("push", "Upload a model folder to the Hugging Face hub."),
    "adapters": Verb("serve", "List, load and unload the adapters of a running server."),
    "ls": Verb("runs", "List the runs: state, score, size, age."),
    "rm": Verb("runs", "Delete runs, after showing what would go."),
    "gc": Verb("runs", "Delete what no result needs: checkpoints of finished trainings, leftovers, old cache."),
}


class LazyVerbs(Mapping[str, Any]):
    """The commands by name. A verb's module is imported, and its parser built, on lookup."""

    def __getitem__(self, verb: str) -> Any:
        return _commands_in(VERBS[verb].module)[verb]

    def __iter__(self) -> Iterator[str]:
        return iter(VERBS)

    def __len__(self) -> int:
        return len(VERBS)


@functools.cache
def _commands_in(module: str) -> Mapping[str, Any]:
    return typer.main.get_group(import_module(f"qkit.cli.verbs.{module}").app).commands


class LazyGroup(TyperGroup):
    """The group of all verbs; imports a verb's module only when it is used."""

    def __init__(self, **settings: Any):
        super().__init__(**settings)
        self.commands: Any = LazyVerbs()

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """List the verbs without importing any of their modules."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, verb.summary) for name, verb in VERBS.items()])


app = verb_app(
    cls=LazyGroup,
    no_args_is_help=True,
    help="Fine-tune a quantized language model, deploy it, and measure the result.",
    epilog="Start with: qkit init rows.jsonl",
)


def _version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit


@app.callback()
def _global_options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def main() -> NoReturn:
    """Run the command line of this process, and turn every error into one message and an exit code."""
    bypass_proxy_for_localhost()
    try:
        code = app(standalone_mode=False) or 0
    except QkitError as error:
        code = report_error(error)
    except USAGE_PROBLEM as error:
        error.show()
        code = 2
    except (KeyboardInterrupt, typer.Abort):
        if "--child" not in sys.argv:
            sys.stderr.write("interrupted; run the same command again to continue\n")
        code = 130
    sys.stdout.flush()
    sys.exit(code)


def bypass_proxy_for_localhost() -> None:
    """Send requests to servers on this machine directly, here and in child processes, even if http_proxy is set."""
    hosts = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
    os.environ["no_proxy"] = os.environ["NO_PROXY"] = ",".join(filter(None, (hosts, "127.0.0.1,localhost,::1")))


def report_error(error: QkitError) -> int:
    """Write the message to stderr and, with --json, as a JSON document to stdout as well; returns the exit code."""
    if str(error):
        sys.stderr.write(f"error: {error}\n")
        if "--json" in sys.argv:
            print(json.dumps({"error": {"type": type(error).__name__, "message": str(error)}}))
    return error.exit_code
