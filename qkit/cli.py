"""The verbs. The only file that prints, reads the command line, or exits."""

from __future__ import annotations

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
from qkit.errors import QkitError
from qkit.progress import Bar, Progress

if TYPE_CHECKING:
    from rich.console import Console

    from qkit.run import Run
    from qkit.runtimes.vllm import Server

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Fine-tune a quantized language model, deploy it, and measure what came of it.",
    epilog="Start with: qkit run recipes/quickstart.yaml",
)

Target = Annotated[Path, typer.Argument(metavar="RECIPE_OR_RUN", help="A recipe (.yaml) or a run directory.")]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.")]
Set = Annotated[list[str] | None, typer.Option("--set", metavar="A.B=C", help="Override a recipe value; repeatable.")]
Out = Annotated[
    Path | None, typer.Option("--out", metavar="RUN", help="The run directory; default: runs/ and the recipe's name.")
]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout, and nothing else there.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, only the result and errors.")]
Child = Annotated[bool, typer.Option("--child", hidden=True)]

# typer carries a click of its own, or uses the one that is installed: this is UsageError of whichever it is.
USAGE_ERROR: Any = typer.BadParameter.__mro__[1]

STAGE_EXAMPLE = "Example: qkit {name} runs/quickstart"


# --- looking ----------------------------------------------------------------------------------------------------------


@app.command(epilog="Example: qkit doctor --json")
def doctor(as_json: Json = False, quiet: Quiet = False) -> None:
    """What this machine is, what works on it, what is missing and the command that installs it."""
    from dataclasses import asdict

    from qkit import doctor

    report = doctor.examine()
    _show(as_json, asdict(report), lambda: doctor.screen(report))


@app.command(epilog="Example: qkit plan recipes/llama-3.1-8b-24gb.yaml --memory 24GiB")
def plan(
    target: Annotated[
        Path | None, typer.Argument(metavar="[RECIPE_OR_RUN]", help="A recipe (.yaml) or a run directory.")
    ] = None,
    overrides: Set = None,
    memory: Annotated[
        str | None, typer.Option("--memory", metavar="24GiB", help="Plan for a device of this size.")
    ] = None,
    card: Annotated[str | None, typer.Option("--card", metavar="rtx-4090", help="Plan for a known card.")] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", metavar="M", help="In place of a recipe: config.json, its folder, or a name."),
    ] = None,
    quantization: Annotated[str | None, typer.Option("--quantization", metavar="nf4", help="Of --model.")] = None,
    rank: Annotated[int | None, typer.Option("--rank", min=1, help="Of --model's adapter.")] = None,
    batch: Annotated[int | None, typer.Option("--batch", min=1, help="Rows at once, with --model.")] = None,
    length: Annotated[int | None, typer.Option("--length", min=1, help="Tokens of a row, with --model.")] = None,
    solve: Annotated[
        str | None,
        typer.Option("--solve", metavar="WHAT", help="The most that fits: max_length, batch, rank; or card."),
    ] = None,
    explain: Annotated[
        str | None, typer.Option("--explain", metavar="LINE", help="The formula of a line, with its numbers.")
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Does it fit? Memory, line by line, and time, before anything is loaded."""
    from qkit import plan as planning
    from qkit import plan_screen, plan_sheet

    how = _planned(target, overrides, plan_sheet.Options(model or "", quantization, rank, batch, length))
    device, ask = planning.device_for(card, memory), planning.question(solve)
    found = plan_sheet.sheet(how, device, plan_sheet.lengths_of(target), ask)
    if explain:
        items = plan_sheet.explain(found, explain)
        _show(as_json, [item.to_dict() for item in items], lambda: plan_screen.explanation(items))
        return
    _show(as_json, plan_sheet.to_dict(found), lambda: plan_screen.screen(found))


def _planned(target: Path | None, overrides: list[str] | None, options: Any) -> Any:
    """The recipe of a file or a run, or the one that --model and its companions describe."""
    from qkit.errors import RecipeError
    from qkit.plan_sheet import recipe_for

    if bool(options.model) == (target is not None):
        raise RecipeError("name a recipe or a run directory, or --model; one of the two")
    return recipe_for(options, overrides or ()) if target is None else _recipe(target, overrides)


@app.command(epilog="Example: qkit inspect recipes/quickstart.yaml --row 3")
def inspect(
    target: Annotated[
        Path | None, typer.Argument(metavar="[RECIPE_OR_RUN]", help="A recipe (.yaml) or a run directory.")
    ] = None,
    overrides: Set = None,
    model: Annotated[
        str | None, typer.Option("--model", metavar="M", help="In place of a recipe: the model, for its tokenizer.")
    ] = None,
    data: Annotated[str | None, typer.Option("--data", metavar="F", help="In place of a recipe: the data set.")] = None,
    format: Annotated[str, typer.Option("--format", help="Of --data, when its columns do not tell.")] = "auto",
    row: Annotated[int | None, typer.Option("--row", help="Show this row token by token.")] = None,
    split: Annotated[str, typer.Option("--split", help="Of --row: train, validation or test.")] = "train",
    html: Annotated[Path | None, typer.Option("--html", metavar="FILE", help="Write it all to a page as well.")] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """What will be learnt, row by row and token by token, and what is likely wrong. Exits with 2 when a check fails."""
    from qkit import inspection, inspection_page, inspection_screen
    from qkit.checks import failures

    console = _stderr(keep=True)
    with _errors_only():
        seen, losses = _inspected(target, overrides, (model, data, format), _progress(console, quiet))
        view = inspection.row(seen, split, row) if row is not None else None
        if html:
            inspection_page.write(seen, html)
    shown = inspection_screen.row_screen(view) if view else inspection_screen.screen(seen, losses)
    _show(as_json, inspection_screen.to_dict(seen, view, losses), lambda: shown)
    if failures(seen.summary["checks"]):
        raise typer.Exit(2)


def _inspected(
    target: Path | None, overrides: list[str] | None, foreign: tuple[str | None, str | None, str], progress: Progress
) -> Any:
    """The inspection of a recipe, of a run, or of a model and a data set; and the losses that a run has kept."""
    from qkit import inspection
    from qkit.errors import RecipeError
    from qkit.run import Run

    model, data, format = foreign
    if target is None:
        if not (model and data):
            raise RecipeError("name a recipe or a run directory, or both --model and --data")
        return inspection.inspect(inspection.recipe_for(model, data, format, overrides or ()), progress), None
    if target.is_dir() and not overrides and (target / "data" / "summary.json").is_file():
        opened = Run.open(target)
        return inspection.of_run(opened), inspection.losses(opened)
    return inspection.inspect(_recipe(target, overrides), progress), None


@app.command(epilog="Example: qkit show runs/quickstart --json")
def show(run: RunFolder, as_json: Json = False, quiet: Quiet = False) -> None:
    """What happened in a run, on one screen."""
    from qkit import pipeline
    from qkit import show as showing
    from qkit.run import Run

    opened = Run.open(run)
    summary = showing.summary(opened, pipeline.statuses(opened))
    _show(as_json, summary, lambda: showing.screen(summary))


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
    from qkit import fitting, pipeline
    from qkit import show as showing

    opened = _open(target, overrides, out, _progress(_stderr(), quiet) if fit else Progress())
    if fit:
        opened = fitting.fitted(opened)
    begin = time.perf_counter()
    done = pipeline.run_all(opened, ["--quiet"] if quiet else [])
    summary = showing.summary(opened, pipeline.statuses(opened))
    _show(as_json, summary, lambda: showing.screen(summary))
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
    from qkit.child import die_with_parent

    if child:
        die_with_parent(reads_stdin=name == "serve")
    console, stdout = _stderr(keep=True), os.fdopen(os.dup(1), "w")
    opened = _open(target, overrides, out, _progress(console, quiet))
    begin = time.perf_counter()
    opened.progress.say(f"{name} ...")
    with pipeline.captured(opened, name):
        _tame_libraries()
        pipeline.execute(opened, name)
    if as_json:
        print(json.dumps(opened.manifest()["stages"][name]), file=stdout, flush=True)
    elif not quiet:
        console.print(f"{name}: done in {time.perf_counter() - begin:.1f} s", highlight=False)
    if not (as_json or quiet or child):
        from qkit import show as showing

        summary = showing.summary(opened, pipeline.statuses(opened))
        _show(False, summary, lambda: showing.screen(summary))


for _name, _help in (
    ("data", "read and tokenize the rows; write the ledger"),
    ("train", "fine-tune the adapter"),
    ("evaluate", "score the base model and the adapter on held-out rows"),
    ("merge", "merge the adapter into the base model"),
    ("export", "export the merged model to ONNX and for vLLM"),
    ("verify", "compare every artifact with the adapter as trained"),
    ("report", "write the run's HTML page and its model card"),
):
    _stage_command(_name, _help)


Words = Annotated[
    list[str] | None,
    typer.Argument(metavar="[train] [RECIPE_OR_RUN]", help="What to bench; with `train`, its training."),
]
Sweep = Annotated[
    bool, typer.Option("--sweep", help="1, 2, 4 ... at once until throughput stops growing, then Poisson arrivals.")
]
Price = Annotated[
    float | None, typer.Option("--price-per-hour", help="Of the machine, for what a million tokens cost.")
]
Url = Annotated[
    str | None, typer.Option("--url", help="Bench this OpenAI-compatible server; OPENAI_API_KEY is its key.")
]
Model = Annotated[str | None, typer.Option("--model", metavar="NAME", help="Of --url: the model to ask.")]
Tokenizer = Annotated[str | None, typer.Option("--tokenizer", metavar="DIR", help="Of --url, without a run.")]
PromptTokens = Annotated[int, typer.Option("--prompt-tokens", min=1, help="Of --url, without a run: random prompts.")]
Chat = Annotated[bool, typer.Option("--chat", help="Of --url, without a run: ask /v1/chat/completions.")]
Compare = Annotated[
    tuple[Path, Path] | None,
    typer.Option("--compare", metavar="A B", help="Two records, or two folders of them; exits with 1 on a regression."),
]
Threshold = Annotated[str, typer.Option("--threshold", help="Of --compare: how much worse is a regression.")]
Anyway = Annotated[bool, typer.Option("--anyway", help="Of --compare: also from different environments and loads.")]
Charts = Annotated[
    Path | None, typer.Option("--charts", metavar="DIR", help="Write the run's bench charts as SVG files.")
]
Png = Annotated[bool, typer.Option("--png", help="Of --charts: PNG files as well.")]
BatchTokens = Annotated[list[int] | None, typer.Option("--batch-tokens", min=1, help="Of train; repeatable.")]
Length = Annotated[list[int] | None, typer.Option("--length", min=1, help="Of train: data.max_length; repeatable.")]
Steps = Annotated[int, typer.Option("--steps", min=1, help="Of train: steps that are timed.")]


@app.command(
    epilog="Example: qkit bench runs/quickstart --sweep\n\n"
    "Example: qkit bench --url http://127.0.0.1:8000 --model NAME --tokenizer DIR\n\n"
    "Example: qkit bench --compare before/bench/vllm-c8.json after/bench/vllm-c8.json --threshold 5%\n\n"
    "Example: qkit bench train recipes/quickstart.yaml"
)
def bench(
    words: Words = None,
    overrides: Set = None,
    out: Out = None,
    sweep: Sweep = False,
    price: Price = None,
    url: Url = None,
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
    settings += [f"bench.price_per_hour={price}"] if price else []
    if compare:
        return _bench_compare(*compare, threshold, anyway, as_json)
    if url:
        return _bench_url(words, settings, out, (url, model, tokenizer), (prompt_tokens, chat), as_json, quiet)
    if words and words[0] == "train":
        return _bench_train(words[1:], settings, out, (batch_tokens or [], length or [], steps), as_json, quiet)
    target = _one(words, "qkit bench RECIPE_OR_RUN, --url URL, or --compare A B")
    if charts:
        return _bench_charts(target, charts, png, as_json)
    return _stage("bench", target, settings, out, as_json, quiet, child)


def _one(words: list[str] | None, usage: str) -> Path:
    from qkit.errors import UserError

    if not words or len(words) > 1:
        raise UserError(f"{len(words or ())} targets given where one is needed: {usage}")
    return Path(words[0])


def _bench_compare(before: Path, after: Path, threshold: str, anyway: bool, as_json: bool) -> None:
    from dataclasses import asdict

    from qkit import bench_compare, bench_screen

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
    as_json: bool,
    quiet: bool,
) -> None:
    """Any server: with the held-out prompts of a run, or with random ones and a tokenizer."""
    from qkit import bench_screen, bench_url

    target = _one(words, "qkit bench [RUN] --url URL --model NAME") if words else None
    asked = bench_url.Asked(*server, *prompts, target, settings)
    found = bench_url.run(asked, out or Path("bench"), _progress(_stderr(), quiet))
    _show(as_json, found, lambda: bench_screen.records(found))


def _bench_train(
    words: list[str],
    settings: list[str],
    out: Path | None,
    sweep: tuple[list[int], list[int], int],
    as_json: bool,
    quiet: bool,
) -> None:
    from qkit import bench_screen, bench_train

    target = _one(words, "qkit bench train RECIPE")
    how = _recipe(target, settings)
    points = bench_train.points(how, sweep[0], sweep[1])
    folder = out or Path("runs") / f"{target.stem}-bench-train"
    record = bench_train.bench(how, points, sweep[2], folder, _progress(_stderr(), quiet))
    _show(as_json, record, lambda: bench_screen.training(record["points"]))


def _bench_charts(run: Path, folder: Path, png: bool, as_json: bool) -> None:
    from qkit import bench_charts
    from qkit.run import Run

    written = [str(path) for path in bench_charts.write(Run.open(run), folder, png)]
    _show(as_json, written, lambda: "\n".join(written))


@app.command(epilog="Example: qkit serve runs/quickstart --set serve.port=8080")
def serve(
    target: Target,
    overrides: Set = None,
    out: Out = None,
    as_json: Json = False,
    quiet: Quiet = False,
    child: Child = False,
) -> None:
    """Serve the run's model through vLLM's OpenAI-compatible server, until Ctrl-C."""
    from qkit import serve as serving

    if child:
        return _stage("serve", target, overrides, out, as_json, quiet, child)
    opened = _open(target, overrides, out, Progress())
    console = _stderr()

    def ready(server: Server) -> None:
        _show(
            as_json,
            serving.describe(server),
            lambda: f"serving {server.name} at {server.url}\n\n{serving.curl(server)}\n",
        )
        console.print(
            f"ready after {server.startup_seconds:.0f} s; log: {server.child.log}; Ctrl-C stops it", highlight=False
        )

    with _stoppable():
        if not quiet:
            console.print("starting vLLM ...", highlight=False)
        serving.serve(opened, ready, _until_it_ends)
    console.print("stopped", highlight=False)
    return None


def _until_it_ends(server: Server) -> None:
    """Raises UserError when vLLM ends by itself; Ctrl-C and SIGTERM arrive as KeyboardInterrupt."""
    from qkit.errors import ServerError
    from qkit.runtimes.vllm import explain

    while server.child.running():
        time.sleep(0.2)
    raise ServerError(f"vLLM ended by itself: {explain(server.child.tail(200))}\nlog: {server.child.log}")


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
    from qkit.recipe import load

    return load(target / "recipe.yaml" if target.is_dir() else target, overrides or ())


def _open(target: Path, overrides: list[str] | None, out: Path | None, progress: Progress) -> Run:
    """The run of a recipe (made when it is new), or the run directory itself."""
    from qkit.run import Run

    if target.is_dir():
        Run.open(target)
        return Run(target, _recipe(target, overrides), progress)
    return Run.create(out or Path("runs") / target.stem, _recipe(target, overrides), progress)


# --- saying -----------------------------------------------------------------------------------------------------------


def _stderr(keep: bool = False) -> Console:
    """A console on stderr; with `keep` on a copy that still leads to the terminal when fd 2 goes to a log."""
    from rich.console import Console

    return Console(file=os.fdopen(os.dup(2), "w") if keep else sys.stderr)


def _show(as_json: bool, value: Any, screen: Any) -> None:
    """The result on stdout: as one JSON document, or drawn."""
    if as_json:
        print(json.dumps(value, indent=1))
        return
    from rich.console import Console

    Console().print(screen(), highlight=False, soft_wrap=isinstance(screen(), str))


def _progress(console: Console, quiet: bool) -> Progress:
    if quiet:
        return Progress()
    return _Bars(console) if console.is_terminal else _Lines(console)


class _Bars(Progress):
    """Bars on a terminal."""

    def __init__(self, console: Console):
        self.console = console

    def say(self, text: str) -> None:
        self.console.print(text, highlight=False)

    @contextmanager
    def bar(self, name: str, total: float | None, start: float = 0) -> Iterator[Bar]:
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Rich

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[figures]}"),
        )
        with Rich(*columns, console=self.console, transient=True) as rich:
            task = rich.add_task(name, total=total, completed=int(start), figures="")

            class Drawn:
                def advance(self, steps: float = 1, **figures: float) -> None:
                    rich.update(task, advance=steps, figures=_figures(figures))

            yield Drawn()


class _Lines(Progress):
    """Plain lines where stderr is no terminal: at most one every few seconds."""

    EVERY_SECONDS = 5.0

    def __init__(self, console: Console):
        self.console = console

    def say(self, text: str) -> None:
        self.console.print(text, highlight=False, soft_wrap=True)

    @contextmanager
    def bar(self, name: str, total: float | None, start: float = 0) -> Iterator[Bar]:
        say, every = self.say, self.EVERY_SECONDS

        class Said:
            done = start
            begin = last = time.monotonic()

            def advance(self, steps: float = 1, **figures: float) -> None:
                self.done += steps
                now = time.monotonic()
                if now - self.last >= every:
                    self.last = now
                    say(
                        f"{name}: {_progress_words(self.done - start, start, total, now - self.begin)}  {_figures(figures)}"
                    )

        yield Said()


def _progress_words(steps: float, start: float, total: float | None, seconds: float) -> str:
    """How far it is, and how long it will take where that can be known."""
    if total is None:
        return f"{start + steps:,.0f}"
    return f"{start + steps:g}/{total:g}  {seconds / steps * (total - start - steps):.0f} s left"


def _figures(figures: dict[str, float]) -> str:
    return "  ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in figures.items())


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
    try:
        code = app(standalone_mode=False) or 0
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


def _complain(error: QkitError) -> int:
    """One message on stderr; with --json the same as a document on stdout."""
    if str(error):
        sys.stderr.write(f"error: {error}\n")
        if "--json" in sys.argv:
            print(json.dumps({"error": {"type": type(error).__name__, "message": str(error)}}))
    return error.exit_code
