"""`qkit bench`: benchmarks a run, any server, or training; compares records; draws charts.

`qkit bench RUN` is short for `qkit bench run RUN`. The old spellings without a command (`--url`, `--compare`, `--charts`) are translated, with
a note; the next release removes them.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from qkit.cli import console
from qkit.cli.opening import open_recipe
from qkit.cli.options import Child, Json, Out, Quiet, RunFolder, Set, Target, need_effect, verb_app
from qkit.cli.verbs.stages import StageOptions, run_stage

if TYPE_CHECKING:
    from qkit.core.errors import QkitError

COMMANDS = ("run", "url", "compare", "train", "charts")
VALUE_COUNTS = {"--compare": 2}  # of options that take another number of values than one
FLAGS = ("--sweep", "--chat", "--anyway", "--png", "--json", "--quiet", "-q", "--child", "--help")


def with_command(arguments: Sequence[str]) -> tuple[list[str], str]:
    """The arguments with a command in front, and the old spelling that they use (empty: none)."""
    positional, options = _split(arguments)
    if not positional and {*options} <= {("--help",)}:
        return [*arguments], ""
    if positional and positional[0] in COMMANDS:
        return [positional[0], *_flatten(options), *positional[1:]], ""
    chosen = {option[0]: option[1:] for option in options}
    for name, command in (("--compare", "compare"), ("--url", "url"), ("--charts", "charts")):
        if name in chosen:
            rest = _flatten(option for option in options if option[0] != name)
            return [command, *_renamed(name, chosen[name], positional), *rest], name
    return ["run", *arguments], ""


def _renamed(name: str, values: Sequence[str], positional: Sequence[str]) -> list[str]:
    """The arguments of the new command that replace an old option and its targets."""
    if name == "--url":
        return [*values, *(part for target in positional for part in ("--run", target))]
    if name == "--charts":
        return [*positional, *(part for value in values for part in ("--out", value))]
    return [*values, *positional]


def _flatten(options: Any) -> list[str]:
    return [part for option in options for part in option]


def _split(arguments: Sequence[str]) -> tuple[list[str], list[tuple[str, ...]]]:
    """Split arguments into positional ones and options with their values."""
    positional: list[str] = []
    options: list[tuple[str, ...]] = []
    rest = [*arguments]
    while rest:
        name = rest.pop(0)
        if not name.startswith("-"):
            positional.append(name)
            continue
        name, equals, value = name.partition("=")
        count = 0 if equals or name in FLAGS else VALUE_COUNTS.get(name, 1)
        options.append((name, *([value] if equals else rest[:count])))
        del rest[:count]
    return positional, options


class BenchGroup(TyperGroup):
    """Adds the command if the arguments have none."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        arguments, old = with_command(args)
        if old:
            sys.stderr.write(
                f"note: `qkit bench {old} ...` is now `qkit bench {arguments[0]} ...`; the next release removes the old spelling\n"
            )
        return super().parse_args(ctx, arguments)


app = verb_app()
bench = verb_app(
    cls=BenchGroup,
    no_args_is_help=True,
    help="Stage: measure latency, throughput, memory and cost of every runtime. Or measure any server or training, or compare records.\n\n"
    "`qkit bench RUN` is short for `qkit bench run RUN`.",
    epilog="Example: qkit bench runs/quickstart --sweep",
)
app.add_typer(bench, name="bench")

Sweep = Annotated[
    bool,
    typer.Option(
        "--sweep", help="1, 2, 4, ... concurrent requests until throughput stops growing, then Poisson arrivals."
    ),
]
Price = Annotated[
    float | None, typer.Option("--price-per-hour", help="The price of the machine, for the cost per million tokens.")
]
ServerUrl = Annotated[
    str, typer.Argument(metavar="URL", help="An OpenAI-compatible server. OPENAI_API_KEY holds its API key.")
]
PromptsOf = Annotated[
    Path | None,
    typer.Option("--run", metavar="RUN", help="Send the held-out prompts of this run. Default: random prompts."),
]
Model = Annotated[
    str | None, typer.Option("--model", metavar="NAME", help="The model to bench. Default: the server's only model.")
]
Tokenizer = Annotated[
    str | None,
    typer.Option("--tokenizer", metavar="DIR", help="The tokenizer for random prompts. Default: that of --run."),
]
PromptTokens = Annotated[
    int, typer.Option("--prompt-tokens", min=1, help="Without --run: the mean length of random prompts.")
]
Chat = Annotated[bool, typer.Option("--chat", help="Without --run: send chat requests.")]
Threshold = Annotated[str, typer.Option("--threshold", help="The smallest change for the worse that is a regression.")]
IgnoreMismatch = Annotated[
    bool, typer.Option("--anyway", help="Compare records even if their environments or loads differ.")
]
Charts = Annotated[Path | None, typer.Option("--charts", metavar="DIR", help="Also write charts as SVG files.")]
Png = Annotated[bool, typer.Option("--png", help="Write PNG files as well.")]
RecordA = Annotated[Path, typer.Argument(metavar="A", help="A record, or a folder of records.")]
RecordB = Annotated[Path, typer.Argument(metavar="B", help="The record or folder to compare with A.")]
Recipe = Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe (.yaml) or a run directory.")]
BatchTokens = Annotated[list[int] | None, typer.Option("--batch-tokens", min=1, help="data.batch_tokens. Repeatable.")]
Length = Annotated[list[int] | None, typer.Option("--length", min=1, help="data.max_length. Repeatable.")]
Steps = Annotated[int, typer.Option("--steps", min=1, help="The number of timed steps.")]
Folder = Annotated[Path | None, typer.Option("--out", metavar="DIR", help="The folder for the records.")]
ChartFolder = Annotated[Path, typer.Option("--out", metavar="DIR", help="The folder for the charts.")]


@bench.command("run", epilog="Example: qkit bench run runs/quickstart --sweep")
def bench_run(
    target: Target,
    overrides: Set = None,
    out: Out = None,
    sweep: Sweep = False,
    price: Price = None,
    as_json: Json = False,
    quiet: Quiet = False,
    child: Child = False,
) -> None:
    """Stage: measure latency, throughput, memory and cost of every runtime of a run."""
    settings = _settings(overrides, sweep, price)
    settings += _default_runtimes(target, settings) if not child else []
    run_stage("bench", StageOptions(target, settings, out, as_json, quiet, child))


@bench.command("url", epilog="Example: qkit bench url http://127.0.0.1:8000 --model NAME --tokenizer DIR")
def bench_url(
    context: typer.Context,
    url: ServerUrl,
    run: PromptsOf = None,
    model: Model = None,
    tokenizer: Tokenizer = None,
    prompt_tokens: PromptTokens = 128,
    chat: Chat = False,
    overrides: Set = None,
    out: Folder = None,
    sweep: Sweep = False,
    price: Price = None,
    charts: Charts = None,
    png: Png = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure latency and throughput of any OpenAI-compatible server."""
    from qkit.bench import any_server
    from qkit.bench import screen as bench_screen
    from qkit.report import bench_charts

    options = {param.name or "" for param in context.command.params}
    if run:
        need_effect(context, "with --run", options - {"prompt_tokens"})
    if not charts:
        need_effect(context, "without --charts", options - {"png"})
    settings = _settings(overrides, sweep, price)
    target = any_server.BenchTarget(url, model, tokenizer, prompt_tokens, chat, run, settings)
    records = any_server.run(target, out or Path("bench"), console.progress_on(console.stderr(), quiet))
    if charts:
        bench_charts.draw(bench_charts.of_records(records), charts, png)
    console.show(as_json, records, lambda: bench_screen.records(records))


@bench.command("compare", epilog="Example: qkit bench compare before/bench/vllm-c8.json after/bench/vllm-c8.json")
def bench_compare(
    before: RecordA,
    after: RecordB,
    threshold: Threshold = "5%",
    anyway: IgnoreMismatch = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Compare two records, or two folders of records. Exits with 1 on a regression."""
    from dataclasses import asdict

    from qkit.bench import compare
    from qkit.bench import screen as bench_screen

    worse_by = compare.parse_threshold(threshold)
    comparisons = compare.compare(before, after, worse_by, anyway)
    console.show(
        as_json, [asdict(comparison) for comparison in comparisons], lambda: bench_screen.comparisons(comparisons)
    )
    regressed: QkitError | None = compare.regression(comparisons, worse_by)
    if regressed:  # the comparison has been printed: with --json it stays the one document
        sys.stderr.write(f"error: {regressed}\n")
        raise typer.Exit(regressed.exit_code)


@bench.command("train", epilog="Example: qkit bench train recipes/quickstart.yaml")
def bench_train(
    recipe: Recipe,
    overrides: Set = None,
    out: Folder = None,
    batch_tokens: BatchTokens = None,
    length: Length = None,
    steps: Steps = 4,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure speed and peak memory of training at several batch sizes."""
    from qkit.bench import screen as bench_screen
    from qkit.commands import bench_training

    opened = open_recipe(recipe, overrides)
    points = bench_training.points(opened, batch_tokens or (), length or ())
    folder = out or Path("runs") / f"{recipe.stem}-bench-train"
    record = bench_training.bench(opened, points, steps, folder, console.progress_on(console.stderr(), quiet))
    console.show(as_json, record, lambda: bench_screen.training(record))


@bench.command("charts", epilog="Example: qkit bench charts runs/quickstart --out charts --png")
def bench_charts(
    run: RunFolder,
    out: ChartFolder = Path("charts"),
    png: Png = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Draw the charts of a run's bench as SVG files."""
    from qkit.report import bench_charts as charts
    from qkit.run.directory import Run

    written = [str(path) for path in charts.write(Run.open(run), out, png)]
    console.show(as_json, written, lambda: "\n".join(written))


def _default_runtimes(target: Path, settings: Sequence[str]) -> list[str]:
    """The runtimes of a model with labels whose recipe names none: its runs are benched only where somebody asks for it."""
    from qkit.recipe.load import load
    from qkit.recipe.registry import task_has_labels

    read = load(target / "recipe.yaml" if target.is_dir() else target, settings)
    if read.bench.runtimes or not task_has_labels(read.task):
        return []
    from qkit.bench.labelled import default_runtimes

    recipe = open_recipe(target, settings)
    return [f"bench.runtimes=[{','.join(default_runtimes(recipe))}]"]


def _settings(overrides: Sequence[str] | None, sweep: bool, price: float | None) -> list[str]:
    """Overrides of the recipe, including those from --sweep and --price-per-hour."""
    settings = [*(overrides or ())]
    if sweep:
        settings.append("bench.sweep=true")
    if price is not None:
        settings.append(f"bench.price_per_hour={price}")
    return settings
