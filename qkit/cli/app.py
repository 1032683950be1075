"""The verbs. The only file that prints, reads the command line, or exits."""

from __future__ import annotations

import copy
import gc
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from qkit import __version__
from qkit.cli.options import (
    LOCAL,
    Anyway,
    ArtifactName,
    Batch,
    BatchTokens,
    BenchUrl,
    Beside,
    Card,
    Charts,
    Chat,
    Child,
    Combine,
    Compare,
    Compared,
    CompareRows,
    Density,
    DryRun,
    Explain,
    Force,
    ForeignAdapters,
    ForeignBase,
    Form,
    Format,
    Html,
    InspectedData,
    Json,
    KeyFile,
    Length,
    Loading,
    MaxKl,
    MaybeTarget,
    Memory,
    MergedOut,
    MergeRows,
    Model,
    NoContract,
    Out,
    PlannedModel,
    Png,
    Price,
    Private,
    PromptTokens,
    PushedFolder,
    PushForce,
    Quantization,
    Quiet,
    Rank,
    Repo,
    Rest,
    Restart,
    RowLength,
    RowNumber,
    RunFolder,
    RuntimeName,
    Served,
    ServedName,
    ServerUrl,
    Set,
    Solve,
    Split,
    Steps,
    Sweep,
    Target,
    Threshold,
    TokenizedModel,
    Tokenizer,
    Url,
    Weights,
    Where,
    Words,
    need_effect,
)
from qkit.core.errors import ParityFailed, QkitError, UserError
from qkit.core.progress import Progress

if TYPE_CHECKING:
    from rich.console import Console

    from qkit.run.directory import Run
    from qkit.server.process import Server


app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Fine-tune a quantized language model, deploy it, and measure what came of it.",
    epilog="Start with: qkit run recipes/quickstart.yaml",
)


# typer carries a click of its own, or uses the one that is installed: this is UsageError of whichever it is.
USAGE_ERROR: Any = typer.BadParameter.__mro__[1]


# Options that take effect in some ways of using a verb, and not in others.
SHOWN_PLAN = ("overrides", "memory", "card", "solve", "explain")
SPARSE = ("ties", "dare", "magnitude")  # ways to combine that keep a share of the values
BENCH_URL = {"url", "model", "tokenizer", "overrides", "out", "sweep", "price", "charts"}


STAGE_EXAMPLE = "Example: qkit {name} runs/quickstart"


# --- looking ----------------------------------------------------------------------------------------------------------


@app.command(epilog="Example: qkit doctor --json")
def doctor(
    make: Annotated[
        str | None, typer.Option("--make", metavar="NAME", help="Make an environment apart: llmcompressor.")
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """What this machine is, what works on it, what is missing and the command that installs it."""
    from dataclasses import asdict

    from qkit.setup import doctor as setup_doctor
    from qkit.setup import screen as setup_screen
    from qkit.setup import side_environments

    if make:
        folder = side_environments.make(make, _progress(_stderr(), quiet).say)
        _show(as_json, {"name": make, "folder": str(folder)}, lambda: f"{make}: {folder}")
        return
    report = setup_doctor.examine()
    _show(as_json, asdict(report), lambda: setup_screen.screen(report))


@app.command(epilog="Example: qkit plan recipes/llama-3.1-8b-24gb.yaml --memory 24GiB")
def plan(
    context: typer.Context,
    target: MaybeTarget = None,
    overrides: Set = None,
    memory: Memory = None,
    card: Card = None,
    model: PlannedModel = None,
    quantization: Quantization = None,
    rank: Rank = None,
    batch: Batch = None,
    length: RowLength = None,
    solve: Solve = None,
    explain: Explain = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Does it fit? Memory, line by line, and time, before anything is loaded. Exits with 2 when a stage does not fit."""
    from qkit.plan import plan as plan_plan
    from qkit.plan import screen as plan_screen
    from qkit.plan import sheet
    from qkit.plan import solve as plan_solve

    if target is not None and not model:
        need_effect(context, "beside a recipe or a run: it is for --model", SHOWN_PLAN)
    if explain and solve:
        raise UserError("--solve: no effect with --explain, which shows the lines of one plan; ask one at a time")
    how = _planned(target, overrides, sheet.Options(model or "", quantization, rank, batch, length))
    device, ask = plan_plan.device_for(card, memory), plan_solve.question(solve)
    found = sheet.sheet(how, device, sheet.lengths_of(target), ask)
    if explain:
        items = sheet.explain(found, explain)
        _show(as_json, [item.to_dict() for item in items], lambda: plan_screen.explanation(items))
        return
    _show(as_json, sheet.to_dict(found), lambda: plan_screen.screen(found))
    if found.short and not ask:  # who asks what would fit has been answered
        raise typer.Exit(2)


def _planned(target: Path | None, overrides: list[str] | None, options: Any) -> Any:
    """The recipe of a file or a run, or the one that --model and its companions describe."""
    from qkit.core.errors import RecipeError
    from qkit.plan.sheet import recipe_for

    if bool(options.model) == (target is not None):
        raise RecipeError("name a recipe or a run directory, or --model; one of the two")
    return recipe_for(options, overrides or ()) if target is None else _recipe(target, overrides)


@app.command(epilog="Example: qkit inspect recipes/quickstart.yaml --row 3")
def inspect(
    context: typer.Context,
    target: MaybeTarget = None,
    overrides: Set = None,
    model: TokenizedModel = None,
    data: InspectedData = None,
    format: Format = "auto",
    row: RowNumber = None,
    split: Split = "train",
    html: Html = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """What will be learnt, row by row and token by token, and what is likely wrong. Exits with 2 when a check fails."""
    from qkit.data.checks import failures, refusal
    from qkit.data.inspection import page
    from qkit.data.inspection import screen as inspection_screen
    from qkit.data.inspection import view as inspection_view

    if target is not None:
        need_effect(context, "beside a recipe or a run", {"overrides", "row", "split", "html"})
    if row is None:
        need_effect(context, "without --row", {"overrides", "model", "data", "format", "html"})
    console = _stderr(keep=True)
    with _errors_only():
        seen, losses = _inspected(target, overrides, (model, data, format), _progress(console, quiet))
        view = inspection_view.row(seen, split, row) if row is not None else None
        if html:
            page.write(seen, html)
    shown = inspection_screen.row_screen(view) if view else inspection_screen.screen(seen, losses)
    _show(as_json, inspection_screen.to_dict(seen, view, losses), lambda: shown)
    if failed := failures(seen.summary["checks"]):
        if view:  # the screen of all rows names them
            console.print(refusal(failed), highlight=False, soft_wrap=True)
        raise typer.Exit(2)


def _inspected(
    target: Path | None, overrides: list[str] | None, foreign: tuple[str | None, str | None, str], progress: Progress
) -> Any:
    """The inspection of a recipe, of a run, or of a model and a data set; and the losses that a run has kept."""
    from qkit.core.errors import RecipeError
    from qkit.data.inspection import view as inspection_view
    from qkit.run.directory import Run

    model, data, format = foreign
    if target is None:
        if not (model and data):
            raise RecipeError("name a recipe or a run directory, or both --model and --data")
        return inspection_view.inspect(inspection_view.recipe_for(model, data, format, overrides or ()), progress), None
    if target.is_dir() and not overrides and (target / "data" / "summary.json").is_file():
        opened = Run.open(target)
        return inspection_view.of_run(opened), inspection_view.losses(opened)
    return inspection_view.inspect(_recipe(target, overrides), progress), None


@app.command(epilog="Example: qkit show runs/quickstart --json")
def show(run: RunFolder, as_json: Json = False, quiet: Quiet = False) -> None:
    """What happened in a run, on one screen."""
    from qkit import pipeline
    from qkit.report import screen as report_screen
    from qkit.report import summary as report_summary
    from qkit.run.directory import Run

    opened = Run.open(run)
    summary = report_summary.summary(opened, pipeline.statuses(opened))
    _show(as_json, summary, lambda: report_screen.screen(summary))


# --- doing ------------------------------------------------------------------------------------------------------------


@app.command(epilog="Example: qkit run recipes/quickstart.yaml --out runs/first")
def run(
    target: Target,
    overrides: Set = None,
    out: Out = None,
    fit: Annotated[
        bool, typer.Option("--fit", help="Change the recipe until training fits, as `qkit plan` advises.")
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """All stages in order; does only what is not done yet."""
    from qkit import pipeline
    from qkit.plan import fit as plan_fit
    from qkit.report import screen as report_screen
    from qkit.report import summary as report_summary
    from qkit.run.directory import Run

    opened = _open(target, overrides, out, _progress(_stderr(), quiet) if fit else Progress())
    if fit:
        opened = plan_fit.fitted(opened)
    begin = time.perf_counter()
    try:
        done = pipeline.run_all(opened, ["--quiet"] if quiet else [], fit)
    except ParityFailed:
        if not as_json:  # the error is the one document then
            summary = report_summary.summary(opened, pipeline.statuses(opened))
            _show(False, summary, lambda: report_screen.screen(summary))
        raise
    opened = Run.open(opened.root)  # with the recipe that held
    summary = report_summary.summary(opened, pipeline.statuses(opened))
    _show(as_json, summary, lambda: report_screen.screen(summary))
    if not quiet:
        what = (
            f"{', '.join(done)} in {time.perf_counter() - begin:.0f} s"
            if done
            else "nothing to do: every stage is done"
        )
        _stderr().print(f"{what}\nreport: {opened.folder('report') / 'index.html'}", highlight=False, soft_wrap=True)


def _stage_command(name: str, help: str) -> None:
    """One verb per stage, all alike."""

    def command(
        target: Target,
        overrides: Set = None,
        out: Out = None,
        as_json: Json = False,
        quiet: Quiet = False,
        child: Child = False,
    ) -> None:
        _stage(name, target, overrides, out, as_json, quiet, child)

    app.command(name, help=f"Stage: {help}.", epilog=STAGE_EXAMPLE.format(name=name))(command)


def _stage(
    name: str, target: Path, overrides: list[str] | None, out: Path | None, as_json: bool, quiet: bool, child: bool
) -> None:
    """Run one stage in this process; what libraries print goes to its log."""
    from qkit import pipeline
    from qkit.core.process import die_with_parent
    from qkit.measure import gates

    if child:
        die_with_parent(reads_stdin=name == "serve")
    console, stdout = _stderr(keep=True), os.fdopen(os.dup(1), "w")
    opened = _open(target, overrides, out, _progress(console, quiet))
    begin = time.perf_counter()
    opened.progress.say(f"{name} ...")
    with pipeline.captured(opened, name):
        _tame_libraries()
        pipeline.execute(opened, name)
    if not (as_json or quiet):
        console.print(f"{name}: done in {time.perf_counter() - begin:.1f} s", highlight=False)
    if not (as_json or quiet or child):
        from qkit.report import screen as report_screen
        from qkit.report import summary as report_summary

        summary = report_summary.summary(opened, pipeline.statuses(opened))
        _show(False, summary, lambda: report_screen.screen(summary))
    if name == "verify" and not child:  # `qkit run` goes on to the report, and then says what failed
        gates.check(opened)
    if as_json:
        print(json.dumps(opened.manifest()["stages"][name]), file=stdout, flush=True)


for _name, _help in (
    ("data", "read and tokenize the rows; write the ledger"),
    ("train", "fine-tune the adapter"),
    ("evaluate", "score the base model and the adapter on held-out rows"),
    ("export", "export the merged model in the formats of the recipe"),
    ("report", "write the run's HTML page and its model card"),
):
    _stage_command(_name, _help)


@app.command(
    epilog="Example: qkit merge --base Qwen/Qwen2.5-7B-Instruct --adapter my-adapter --out merged --data rows.jsonl"
)
def merge(
    context: typer.Context,
    target: MaybeTarget = None,
    overrides: Set = None,
    out: MergedOut = None,
    base: ForeignBase = None,
    adapter: ForeignAdapters = None,
    weight: Weights = None,
    combine: Combine = "sum",
    density: Density = 0.5,
    data: MergeRows = None,
    as_json: Json = False,
    quiet: Quiet = False,
    child: Child = False,
) -> None:
    """Stage: merge the adapter into the base model. With --base and --adapter: any adapter into any base."""
    from qkit.core.errors import RecipeError

    if (target is None) == (base is None) or (base is not None and not (adapter and out)):
        raise RecipeError("name a recipe or a run directory, or --base, --adapter and --out; one of the two")
    if target is not None:
        need_effect(context, "on a recipe or a run", {"overrides", "out"})
        return _stage("merge", target, overrides, out, as_json, quiet, child)
    from qkit.commands import combine as commands_combine
    from qkit.commands import merge_any, merge_screen

    assert base and adapter and out
    several = {"combine", *({"density"} if combine.startswith(SPARSE) else ())} if len(adapter) > 1 else ()
    alone = "with this --combine" if several else "with one --adapter"
    need_effect(context, alone, {"base", "adapter", "out", "weight", "data", "overrides", *several})
    wish = commands_combine.Wish(base, adapter, out, weight or (), combine, density, data, overrides or ())
    console = _stderr(keep=True)
    with _errors_only():
        made = merge_any.merge(wish, _progress(console, quiet))
    return _show(as_json, made, lambda: merge_screen.screen(made))


@app.command(epilog="Example: qkit verify runs/quickstart runs/quickstart/export/onnx-int4 --max-kl 0.1")
def verify(
    context: typer.Context,
    targets: Compared,
    data: CompareRows = None,
    where: Where = False,
    max_kl: MaxKl = None,
    server: ServerUrl = None,
    overrides: Set = None,
    out: Out = None,
    as_json: Json = False,
    quiet: Quiet = False,
    child: Child = False,
) -> None:
    """Stage: compare every artifact with the adapter as trained. Or compare any two artifacts, or a running server with a run."""
    from qkit.core.errors import RecipeError

    if len(targets) > 2 or (len(targets) == 2 and server):
        raise RecipeError("name a run, or two artifacts to compare, or a run and its --server")
    if server:
        need_effect(context, "with --server", {"server"})
        _check_server(Path(targets[0]), server, as_json)
    elif len(targets) == 1:
        need_effect(context, "on a recipe or a run: it is for two artifacts", {"overrides", "out"})
        _stage("verify", Path(targets[0]), overrides, out, as_json, quiet, child)
    else:
        need_effect(context, "on two artifacts", {"data", "where", "max_kl"})
        _compare(targets[0], targets[1], data, where, max_kl, as_json, quiet)


def _check_server(run: Path, url: str, as_json: bool) -> None:
    """Exit code 2 when the server differs."""
    from dataclasses import asdict

    from qkit.measure import contract
    from qkit.run.directory import Run

    found = contract.check(Run.open(run), url)
    _show(as_json, asdict(found), lambda: contract.screen(found))
    if found.broken:
        raise typer.Exit(2)


def _compare(a: str, b: str, data: Path | None, where: bool, max_kl: float | None, as_json: bool, quiet: bool) -> None:
    from qkit.commands import compare as commands_compare
    from qkit.commands import compare_screen, where_layers_part

    console = _stderr(keep=True)
    progress = _progress(console, quiet)
    one, other = commands_compare.side(a), commands_compare.side(b)
    if where:
        where_layers_part.need_torch(one, other)
    with _errors_only():
        asked = commands_compare.questions(one, other, data, progress)
        found = commands_compare.compare(one, other, asked, progress)
        parted = where_layers_part.walk(one, other, asked.held_out.rows, progress) if where else None
    shown = {**found.to_dict(), **({"where": parted.to_dict()} if parted else {})}
    if not (as_json and max_kl is not None and not found.kl_mean <= max_kl):
        _show(as_json, shown, lambda: compare_screen.screen(found, one, other))
        if parted and not as_json:
            _show(False, shown, lambda: where_layers_part.screen(parted))
    if max_kl is not None:
        found.enforce(max_kl)


@app.command(
    epilog="Example: qkit bench runs/quickstart --sweep\n\n"
    "Example: qkit bench --url http://127.0.0.1:8000 --model NAME --tokenizer DIR\n\n"
    "Example: qkit bench --compare before/bench/vllm-c8.json after/bench/vllm-c8.json --threshold 5%\n\n"
    "Example: qkit bench train recipes/quickstart.yaml"
)
def bench(
    context: typer.Context,
    words: Words = None,
    overrides: Set = None,
    out: Out = None,
    sweep: Sweep = False,
    price: Price = None,
    url: BenchUrl = None,
    model: Model = None,
    tokenizer: Tokenizer = None,
    prompt_tokens: PromptTokens = 128,
    chat: Chat = False,
    compare: Compare = None,
    threshold: Threshold = "5%",
    anyway: Anyway = False,
    charts: Charts = None,
    png: Png = False,
    batch_tokens: BatchTokens = None,
    length: Length = None,
    steps: Steps = 4,
    as_json: Json = False,
    quiet: Quiet = False,
    child: Child = False,
) -> None:
    """Stage: latency, throughput, memory and cost of every runtime; of any server; of training; and records compared."""
    settings = [*(overrides or ()), *(["bench.sweep=true"] if sweep else ())]
    settings += [f"bench.price_per_hour={price}"] if price is not None else []
    if compare:
        need_effect(context, "with --compare", {"compare", "threshold", "anyway"})
        _none(words, "--compare A B")
        return _bench_compare(*compare, threshold, anyway, as_json)
    if url:
        asked = {"chat"} if words else {"chat", "prompt_tokens"}
        need_effect(
            context, "with --url" + (" and a run" if words else ""), asked | BENCH_URL | ({"png"} if charts else set())
        )
        drawn = (charts, png) if charts else None
        return _bench_url(words, settings, out, (url, model, tokenizer), (prompt_tokens, chat), drawn, as_json, quiet)
    if words and words[0] == "train":
        need_effect(context, "on training", {"overrides", "out", "batch_tokens", "length", "steps"})
        return _bench_train(words[1:], settings, out, (batch_tokens or [], length or [], steps), as_json, quiet)
    target = _one(words, "qkit bench RECIPE_OR_RUN, --url URL, or --compare A B")
    if charts:
        need_effect(context, "with --charts, which draws what a run has", {"charts", "png"})
        return _bench_charts(target, charts, png, as_json)
    need_effect(context, "on a recipe or a run", {"overrides", "out", "sweep", "price"})
    return _stage("bench", target, settings, out, as_json, quiet, child)


def _none(words: list[str] | None, beside: str) -> None:
    if words:
        raise UserError(f"{' '.join(words)}: no effect beside {beside}; leave it out")


def _one(words: list[str] | None, usage: str) -> Path:
    if not words or len(words) > 1:
        raise UserError(f"{len(words or ())} targets given where one is needed: {usage}")
    return Path(words[0])


def _bench_compare(before: Path, after: Path, threshold: str, anyway: bool, as_json: bool) -> None:
    from dataclasses import asdict

    from qkit.bench import compare as bench_compare
    from qkit.bench import screen as bench_screen

    worse_by = bench_compare.share(threshold)
    found = bench_compare.compare(before, after, worse_by, anyway)
    _show(as_json, [asdict(comparison) for comparison in found], lambda: bench_screen.comparisons(found))
    if regressed := bench_compare.regression(found, worse_by):
        sys.stderr.write(f"error: {regressed}\n")
        raise typer.Exit(regressed.exit_code)


def _bench_url(
    words: list[str] | None,
    settings: list[str],
    out: Path | None,
    server: tuple[str, str | None, str | None],
    prompts: tuple[int, bool],
    charts: tuple[Path, bool] | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Any server: with the held-out prompts of a run, or with random ones and a tokenizer. `charts`: where to, and whether as PNG too."""
    from qkit.bench import any_server
    from qkit.bench import screen as bench_screen
    from qkit.report import bench_charts

    target = _one(words, "qkit bench [RUN] --url URL --model NAME") if words else None
    asked = any_server.Asked(*server, *prompts, target, settings)
    found = any_server.run(asked, out or Path("bench"), _progress(_stderr(), quiet))
    if charts:
        bench_charts.draw(bench_charts.of_records(found), *charts)
    _show(as_json, found, lambda: bench_screen.records(found))


def _bench_train(
    words: list[str],
    settings: list[str],
    out: Path | None,
    sweep: tuple[list[int], list[int], int],
    as_json: bool,
    quiet: bool,
) -> None:
    from qkit.bench import screen as bench_screen
    from qkit.commands import bench_training

    target = _one(words, "qkit bench train RECIPE")
    how = _recipe(target, settings)
    points = bench_training.points(how, sweep[0], sweep[1])
    folder = out or Path("runs") / f"{target.stem}-bench-train"
    record = bench_training.bench(how, points, sweep[2], folder, _progress(_stderr(), quiet))
    _show(as_json, record, lambda: bench_screen.training(record))


def _bench_charts(run: Path, folder: Path, png: bool, as_json: bool) -> None:
    from qkit.report import bench_charts
    from qkit.run.directory import Run

    written = [str(path) for path in bench_charts.write(Run.open(run), folder, png)]
    _show(as_json, written, lambda: "\n".join(written))


@app.command(epilog="Example: qkit push runs/quickstart/export/vllm me/my-model --private --dry-run")
def push(
    folder: PushedFolder,
    repo: Repo,
    private: Private = False,
    dry_run: DryRun = False,
    force: PushForce = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Upload a model folder to the Hugging Face hub."""
    from qkit.report import push as pushing

    upload = pushing.planned(folder, repo, private, force)
    url = None if dry_run else pushing.push(upload)
    _show(as_json, {**pushing.to_dict(upload), "url": url}, lambda: url or pushing.screen(upload))


@app.command(epilog="Example: qkit serve runs/quickstart --set serve.port=8080 -- --max-num-batched-tokens 4096")
def serve(
    context: typer.Context,
    target: Served,
    rest: Rest = None,
    overrides: Set = None,
    out: Out = None,
    runtime: RuntimeName = "vllm",
    artifact: ArtifactName = None,
    name: ServedName = None,
    adapter: Beside = None,
    runtime_adapters: Loading = False,
    api_key_file: KeyFile = None,
    force: Force = False,
    no_contract: NoContract = False,
    restart: Restart = False,
    form: Form = None,
    as_json: Json = False,
    quiet: Quiet = False,
    child: Child = False,
) -> None:
    """Serve a model through vLLM's OpenAI-compatible server, or ONNX Runtime, until Ctrl-C."""
    from qkit.serve.request import ServeOptions
    from qkit.server.process import api_key

    if child:
        return _stage("serve", Path(target), overrides, out, as_json, quiet, child)
    if form:
        if as_json:
            raise typer.BadParameter("--json: no effect with --print, which prints what is asked for as it is")
        need_effect(context, "with --print", {p.name for p in context.command.params} - {"restart", "no_contract"})
    key, options, beside = api_key(api_key_file), tuple(_after_dashes(rest)), tuple(adapter or ())
    asked = ServeOptions(runtime, artifact, name, beside, runtime_adapters, key, options, force, not no_contract)
    chosen = _serving(target, overrides, out, asked)
    if form:
        from qkit.serve import manifests

        print(manifests.rendered(form, chosen))
        return None
    return _serve(chosen, restart, as_json, quiet)


def _serve(chosen: Any, restart: bool, as_json: bool, quiet: bool) -> None:
    """Plan, start, say where it is, and wait for the end."""
    from qkit.serve import fits, lifecycle

    console, made = _stderr(), fits.planned(chosen)
    if not quiet:
        _say_start(console, chosen, made)

    def again(why: str, pause: float) -> None:
        console.print(f"{why}\nstarting again in {pause:g} s", highlight=False, soft_wrap=True)

    told: list[Server] = []

    def ready(running: Server) -> None:
        if not (as_json and told):  # one document, however often it is started again
            _say_ready(chosen, running, as_json)
        told.append(running)
        ends = f"ready after {running.startup_seconds:.0f} s; log: {running.child.log}; Ctrl-C stops it"
        console.print(ends, highlight=False, soft_wrap=True)

    with _stoppable():
        lifecycle.serve(chosen, ready, lifecycle.watch, again if restart else None)
    console.print("stopped", highlight=False)


def _after_dashes(rest: list[str] | None) -> list[str]:
    """Arguments beyond the target count only after `--`: a word too many is a mistake."""
    if rest and "--" not in sys.argv:
        raise typer.BadParameter(f"{' '.join(rest)}: options for the runtime come after `--`")
    return rest or []


def _serving(target: str, overrides: list[str] | None, out: Path | None, asked: Any) -> Any:
    """What is to be served: of a run, when it is one or its recipe, else a model."""
    from qkit.plan.sheet import Options, recipe_for
    from qkit.serve import serving

    if asked.runtime not in serving.RUNTIMES:
        raise UserError(f"--runtime {asked.runtime}: there are {', '.join(serving.RUNTIMES)}")
    path = Path(target)
    if (path / "recipe.yaml").is_file() or path.suffix in (".yaml", ".yml"):
        return serving.of_run(_open(path, overrides, out, Progress()), asked)
    for option, given in {"--out": out, "--artifact": asked.artifact}.items():
        if given:
            raise UserError(f"{option} {given}: {target} is no run, and has neither a run directory nor exports")
    return serving.of_model(target, recipe_for(Options(target), overrides or ()), asked)


def _say_start(console: Console, chosen: Any, made: Any) -> None:
    if chosen.chosen:
        console.print(f"serving {chosen.chosen}", highlight=False)
    needs = (
        f"{made.peak_bytes / 2**30:.1f} of {made.device_bytes / 2**30:.1f} GiB"
        if made
        else "not planned: unknown shape"
    )
    console.print(f"memory: {needs}; starting {chosen.runtime} ...", highlight=False, soft_wrap=True)


def _say_ready(chosen: Any, running: Server, as_json: bool) -> None:
    from qkit.serve import snippets

    lines = [f"serving {', '.join(chosen.names)} at {running.url}/v1", snippets.curl(running), snippets.python(running)]
    _show(as_json, snippets.describe(running, chosen.names), lambda: "\n\n".join(lines) + "\n")
    sys.stdout.flush()


adapters_app = typer.Typer(no_args_is_help=True, help="The adapters of a running server: list, load, unload.")
app.add_typer(adapters_app, name="adapters", epilog="Example: qkit adapters list --url http://127.0.0.1:8000")


def _endpoint(url: str, key_file: Path | None) -> Any:
    from qkit.server.adapters import Endpoint
    from qkit.server.process import api_key

    return Endpoint(url, api_key(key_file))


@adapters_app.command("list", epilog="Example: qkit adapters list --url http://127.0.0.1:8000")
def adapters_list(url: Url = LOCAL, api_key_file: KeyFile = None, as_json: Json = False) -> None:
    """Models and adapters by name."""
    models = _endpoint(url, api_key_file).list()
    _show(as_json, models, lambda: "\n".join(f"{m['id']}  {m['parent'] or 'base'}  {m['root']}" for m in models))


@adapters_app.command("load", epilog="Example: qkit adapters load sql=runs/sql --url http://127.0.0.1:8000")
def adapters_load(
    adapter: Annotated[str, typer.Argument(metavar="NAME=RUN")],
    url: Url = LOCAL,
    api_key_file: KeyFile = None,
    as_json: Json = False,
) -> None:
    """Load an adapter, after the checks of `qkit serve --adapter`."""
    from qkit.server.adapters import parse

    loaded = _endpoint(url, api_key_file).load(*parse(adapter))
    _show(as_json, {"name": loaded.name, "path": str(loaded.path)}, lambda: f"{loaded.name}: loaded from {loaded.path}")


@adapters_app.command("unload", epilog="Example: qkit adapters unload sql --url http://127.0.0.1:8000")
def adapters_unload(
    name: Annotated[str, typer.Argument(metavar="NAME")],
    url: Url = LOCAL,
    api_key_file: KeyFile = None,
    as_json: Json = False,
) -> None:
    """Take an adapter out."""
    _endpoint(url, api_key_file).unload(name)
    _show(as_json, {"name": name}, lambda: f"{name}: unloaded")


@contextmanager
def _stoppable() -> Iterator[None]:
    """SIGTERM is treated like Ctrl-C, and either is a clean end; also below a shell that starts its jobs with SIGINT ignored."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    except KeyboardInterrupt:
        pass
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# --- opening ----------------------------------------------------------------------------------------------------------


def _recipe(target: Path, overrides: list[str] | None) -> Any:
    """The recipe, with the formats that `export.formats=all` stands for."""
    from qkit.plan import deployable
    from qkit.recipe.load import load

    how, left = deployable.resolved(load(target / "recipe.yaml" if target.is_dir() else target, overrides or ()))
    for refusal in left:
        sys.stderr.write(f"left out of export.formats: {refusal.format}: {refusal.reason}\n")
    return how


def _open(target: Path, overrides: list[str] | None, out: Path | None, progress: Progress) -> Run:
    """The run of a recipe (made when it is new), or the run directory itself.

    Raises:
        RecipeError: `out` is given for a run directory, whose stages write into it and nowhere else.
    """
    from qkit.core.errors import RecipeError
    from qkit.run.directory import Run

    if target.is_dir():
        if out is not None and out.resolve() != target.resolve():
            raise RecipeError(
                f"--out {out}: names the directory of a new run, and {target} is a run already, whose stages write into it (its merged model "
                f"is {target / 'merge'}); leave --out out, copy what you want from there, or give a recipe in the run's place"
            )
        Run.open(target)
        return Run(target, _recipe(target, overrides), progress)
    return Run.create(out or Path("runs") / target.stem, _recipe(target, overrides), progress)


# --- saying -----------------------------------------------------------------------------------------------------------


def _stderr(keep: bool = False) -> Console:
    """A console on stderr; with `keep` on a copy that still leads to the terminal when fd 2 goes to a log. A `[` in a text is a `[`."""
    from rich.console import Console

    return Console(file=os.fdopen(os.dup(2), "w") if keep else sys.stderr, markup=False)


def _show(as_json: bool, value: Any, screen: Any) -> None:
    """The result on stdout: as one JSON document, or drawn."""
    if as_json:
        print(json.dumps(value, indent=1))
        return
    from rich.console import Console

    drawn = screen()
    Console(markup=False).print(drawn, highlight=False, soft_wrap=isinstance(drawn, str))


def _progress(console: Console, quiet: bool) -> Progress:
    from qkit.cli.progress_bars import Bars, Lines

    if quiet:
        return Progress()
    return Bars(console) if console.is_terminal else Lines(console)


def _tame_libraries() -> None:
    """Their own bars would fill the log."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "warning")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("DATASETS_DISABLE_PROGRESS_BARS", "1")
    import logging

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)


@contextmanager
def _errors_only() -> Iterator[None]:
    """Keep libraries' chatter off the terminal while something short runs; what is raised still gets through."""
    _tame_libraries()
    saved, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    sys.stderr.flush()
    try:
        os.dup2(null, 2)
        yield
    finally:
        sys.stderr.flush()
        os.dup2(saved, 2)
        os.close(saved)
        os.close(null)


# --- ending -----------------------------------------------------------------------------------------------------------


def _version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def main() -> NoReturn:
    """Entry point: every error becomes one message and an exit code."""
    if sys.argv[1:2] == ["plan"]:
        gc.disable()  # it ends before there is garbage worth a search through all that was imported
        os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")  # else every installed package is asked for one
    _ask_this_machine_directly()
    try:
        code = _asked(sys.argv[1:2])(standalone_mode=False) or 0
    except QkitError as error:
        code = _complain(error)
    except USAGE_ERROR as error:
        error.show()
        code = 2
    except (KeyboardInterrupt, typer.Abort):
        if "--child" not in sys.argv:
            sys.stderr.write("interrupted; the same command goes on from here\n")
        code = 130
    sys.stdout.flush()
    sys.exit(code)


def _ask_this_machine_directly() -> None:
    """Servers on this machine are asked by us, by the stages and by the load tool; where http_proxy is set, a proxy would be asked for them."""
    known = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
    os.environ["no_proxy"] = os.environ["NO_PROXY"] = ",".join(filter(None, (known, "127.0.0.1,localhost,::1")))


def _asked(verb: list[str]) -> typer.Typer:
    """The application with this verb alone, where it is one: making the parsers of all the others takes as long as a plan."""
    if not (found := [command for command in app.registered_commands if [_verb(command)] == verb]):
        return app
    alone = copy.copy(app)
    alone.registered_commands, alone.registered_groups = found, []
    return alone


def _verb(command: Any) -> str:
    return str(command.name or command.callback.__name__)


def _complain(error: QkitError) -> int:
    """One message on stderr; with --json the same as a document on stdout."""
    if str(error):
        sys.stderr.write(f"error: {error}\n")
        if "--json" in sys.argv:
            print(json.dumps({"error": {"type": type(error).__name__, "message": str(error)}}))
    return error.exit_code
