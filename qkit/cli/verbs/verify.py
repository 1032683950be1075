"""`qkit verify`: the stage, two artifacts compared, or a running server checked."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qkit.cli import console
from qkit.cli.options import Child, Json, Out, Quiet, Set, need_effect, verb_app
from qkit.cli.verbs.stages import StageOptions, run_stage

app = verb_app()

Compared = Annotated[
    list[str],
    typer.Argument(
        metavar="RECIPE_OR_RUN | A B",
        help="A recipe or a run: run the stage. Or two artifacts to compare, each a run (its reference model), a model folder, an export or "
        "the http:// URL of a server.",
    ),
]
Rows = Annotated[
    Path | None,
    typer.Option(
        "--data", metavar="ROWS", help="The rows to compare A and B on: JSON lines, or RUN/data/test.parquet."
    ),
]
LocateDivergence = Annotated[bool, typer.Option("--where", help="Find the first layer at which A and B diverge.")]
MaxKl = Annotated[
    float | None,
    typer.Option("--max-kl", metavar="NATS", help="Exit with 2 if the mean KL divergence of A and B is higher."),
]
ServerUrl = Annotated[
    str | None,
    typer.Option("--server", metavar="URL", help="Check that a running server treats RUN's rows as training did."),
]


@app.command(epilog="Example: qkit verify runs/quickstart runs/quickstart/export/onnx-int4 --max-kl 0.1")
def verify(
    context: typer.Context,
    targets: Compared,
    data: Rows = None,
    where: LocateDivergence = False,
    max_kl: MaxKl = None,
    server: ServerUrl = None,
    overrides: Set = None,
    out: Out = None,
    as_json: Json = False,
    quiet: Quiet = False,
    child: Child = False,
) -> None:
    """Stage: compare every artifact with the reference model. Or compare any two artifacts, or a running server with a run."""
    from qkit.core.errors import RecipeError

    if len(targets) > 2 or (len(targets) == 2 and server):
        raise RecipeError("name a run, two artifacts to compare, or a run and its --server")
    if server:
        need_effect(context, "with --server", {"server"})
        _check_server(Path(targets[0]), server, as_json)
    elif len(targets) == 1:
        need_effect(context, "with a recipe or a run, only with two artifacts", {"overrides", "out"})
        run_stage("verify", StageOptions(Path(targets[0]), overrides, out, as_json, quiet, child))
    else:
        need_effect(context, "with two artifacts", {"data", "where", "max_kl"})
        _compare(targets[0], targets[1], data, where, max_kl, as_json, quiet)


def _check_server(run: Path, url: str, as_json: bool) -> None:
    """Check a server against a run; exits with 2 if it differs."""
    from dataclasses import asdict

    from qkit.measure import contract, label_contract
    from qkit.run.directory import Run

    result = label_contract.check_server(Run.open(run), url)
    console.show(as_json, asdict(result), lambda: contract.screen(result))
    if result.broken:
        raise typer.Exit(2)


def _compare(a: str, b: str, data: Path | None, where: bool, max_kl: float | None, as_json: bool, quiet: bool) -> None:
    """Compare two artifacts on the same rows; fail if their mean KL is above `max_kl`."""
    from qkit.commands import compare, compare_screen, where_layers_part

    terminal = console.stderr(keep=True)
    progress = console.progress_on(terminal, quiet)
    one, other = compare.side(a), compare.side(b)
    if where:
        where_layers_part.need_torch(one, other)
    with console.silence_stderr():
        questions = compare.comparison_rows(one, other, data, progress)
        comparison = compare.compare(one, other, questions, progress)
        layers = where_layers_part.walk(one, other, questions.held_out.rows, progress) if where else None
    document = {**comparison.to_dict(), **({"where": layers.to_dict()} if layers else {})}
    too_far = max_kl is not None and not comparison.kl_mean <= max_kl
    if not (as_json and too_far):  # with --json the error is the one document
        console.show(as_json, document, lambda: compare_screen.screen(comparison, one, other))
        if layers and not as_json:
            console.show(False, document, lambda: where_layers_part.screen(layers))
    if max_kl is not None:
        comparison.enforce(max_kl)
