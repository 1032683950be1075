"""`qkit run` and `qkit show`."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated

import typer

from qkit.cli import console
from qkit.cli.opening import open_run
from qkit.cli.options import Json, Out, Quiet, RunFolder, Set, Target, verb_app
from qkit.core.errors import ParityFailed
from qkit.core.progress import Progress

if TYPE_CHECKING:
    from qkit.run.directory import Run

app = verb_app()

Fit = Annotated[bool, typer.Option("--fit", help="Change the recipe as `qkit plan` suggests until training fits.")]


@app.command(epilog="Example: qkit run recipes/quickstart.yaml --out runs/first")
def run(
    target: Target,
    overrides: Set = None,
    out: Out = None,
    fit: Fit = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Run all stages in order; completed stages are skipped."""
    from qkit import pipeline
    from qkit.plan import fit as plan_fit
    from qkit.run.directory import Run

    opened = open_run(target, overrides, out, console.progress_on(console.stderr(), quiet) if fit else Progress())
    if fit:
        opened = plan_fit.fitted(opened)
    begin = time.perf_counter()
    try:
        done = pipeline.run_all(opened, ["--quiet"] if quiet else [], fit)
    except ParityFailed:
        if not as_json:  # with --json the error is the one document
            show_summary(opened, as_json=False)
        raise
    opened = Run.open(opened.root)  # --fit may have changed the recipe
    show_summary(opened, as_json)
    if not quiet:
        seconds = time.perf_counter() - begin
        status = f"{', '.join(done)} in {seconds:.0f} s" if done else "nothing to do: every stage is done"
        console.stderr().print(
            f"{status}\nreport: {opened.folder('report') / 'index.html'}", highlight=False, soft_wrap=True
        )


@app.command(epilog="Example: qkit show runs/quickstart --json")
def show(run: RunFolder, as_json: Json = False, quiet: Quiet = False) -> None:
    """Summarize a run on one screen."""
    from qkit.run.directory import Run

    show_summary(Run.open(run), as_json)


def show_summary(run: Run, as_json: bool) -> None:
    """Print a run's summary: the state of its stages, and their figures."""
    from qkit import pipeline
    from qkit.report import screen as report_screen
    from qkit.report import summary as report_summary

    summary = report_summary.summary(run, pipeline.statuses(run))
    console.show(as_json, summary, lambda: report_screen.screen(summary))
