"""The verbs that only run one stage: data, train, evaluate, export and report."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qkit.cli import console
from qkit.cli.opening import open_run
from qkit.cli.options import Child, Json, Out, Quiet, Set, Target, verb_app
from qkit.cli.verbs.run import show_summary

app = verb_app()


@dataclass(frozen=True)
class StageOptions:
    """The options of every stage's verb. `child`: `qkit run` started this process and reports the result itself."""

    target: Path
    overrides: Sequence[str] | None = None
    out: Path | None = None
    as_json: bool = False
    quiet: bool = False
    child: bool = False


def run_stage(name: str, options: StageOptions) -> None:
    """Run one stage in this process; the output of libraries goes to the stage's log."""
    from qkit import pipeline
    from qkit.core.process import die_with_parent
    from qkit.measure import gates

    if options.child:
        die_with_parent(reads_stdin=name == "serve")
    terminal, stdout = console.stderr(keep=True), console.duplicate(1)
    run = open_run(options.target, options.overrides, options.out, console.progress_on(terminal, options.quiet))
    begin = time.perf_counter()
    run.progress.notify(f"{name} ...")
    with pipeline.captured(run, name):
        console.quiet_libraries()
        pipeline.execute(run, name)
    if not (options.as_json or options.quiet):
        terminal.print(f"{name}: done in {time.perf_counter() - begin:.1f} s", highlight=False)
        if not options.child:
            show_summary(run, as_json=False)
    if name == "verify" and not options.child:  # `qkit run` first makes the report, and then reports the failure
        gates.check(run)
    if options.as_json:
        print(json.dumps(run.manifest()["stages"][name]), file=stdout, flush=True)


def _add_stage_verb(name: str, help: str) -> None:
    def command(
        target: Target,
        overrides: Set = None,
        out: Out = None,
        as_json: Json = False,
        quiet: Quiet = False,
        child: Child = False,
    ) -> None:
        run_stage(name, StageOptions(target, overrides, out, as_json, quiet, child))

    app.command(name, help=f"Stage: {help}.", epilog=f"Example: qkit {name} runs/quickstart")(command)


_add_stage_verb("data", "read and tokenize the rows; write the ledger")
_add_stage_verb("train", "fine-tune the adapter")
_add_stage_verb("evaluate", "score the base model and the adapter on held-out rows")
_add_stage_verb("export", "export the merged model in the formats of the recipe")
_add_stage_verb("report", "write the run's HTML page and its model card")
