"""`qkit bench`: a run, any server, training; records compared, and charts.

`qkit bench RUN` is short for `qkit bench run RUN`. Other spellings without a command (`--url`, `--compare`, `--charts`) are translated, with
a note; they go away in the next release.
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
VALUES = {"--compare": 2}  # values that an option takes, where it is not one
FLAGS = ("--sweep", "--chat", "--anyway", "--png", "--json", "--quiet", "-q", "--child", "--help")


def with_command(arguments: Sequence[str]) -> tuple[list[str], str]:
    """The arguments with a command in front, and which old spelling they use (empty: none)."""
    words, options = _parted(arguments)
    if not words and {*options} <= {("--help",)}:
        return [*arguments], ""
    if words and words[0] in COMMANDS:
        return [words[0], *_joined(options), *words[1:]], ""
    chosen = {option[0]: option[1:] for option in options}
    for name, command in (("--compare", "compare"), ("--url", "url"), ("--charts", "charts")):
        if name in chosen:
            rest = _joined(option for option in options if option[0] != name)
            return [command, *_renamed(name, chosen[name], words), *rest], name
    return ["run", *arguments], ""


def _renamed(name: str, values: Sequence[str], words: Sequence[str]) -> list[str]:
    """What stands for an old option and its targets behind the new command."""
    if name == "--url":
        return [*values, *(part for word in words for part in ("--run", word))]
    if name == "--charts":
        return [*words, *(part for value in values for part in ("--out", value))]
    return [*values, *words]


def _joined(options: Any) -> list[str]:
    return [part for option in options for part in option]


def _parted(arguments: Sequence[str]) -> tuple[list[str], list[tuple[str, ...]]]:
    """Positional arguments, and options with their values."""
    words: list[str] = []
    options: list[tuple[str, ...]] = []
    rest = [*arguments]
    while rest:
        name = rest.pop(0)
        if not name.startswith("-"):
            words.append(name)
            continue
        name, equals, value = name.partition("=")
        count = 0 if equals or name in FLAGS else VALUES.get(name, 1)
        options.append((name, *([value] if equals else rest[:count])))
        del rest[:count]
    return words, options


class BenchGroup(TyperGroup):
    """Adds the command where an old spelling leaves it out."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        arguments, old = with_command(args)
        if old:
            sys.stderr.write(
                f"note: `qkit bench {old} ...` is now `qkit bench {arguments[0]} ...`; the old spelling goes away in the next release\n"
            )
        return super().parse_args(ctx, arguments)


app = verb_app()
bench = verb_app(
    cls=BenchGroup,
    no_args_is_help=True,
    help="Stage: latency, throughput, memory and cost of every runtime. Or of any server, of training; or compare records.\n\n"
    "`qkit bench RUN` is short for `qkit bench run RUN`.",
    epilog="Example: qkit bench runs/quickstart --sweep",
)
app.add_typer(bench, name="bench")

Sweep = Annotated[
    bool, typer.Option("--sweep", help="1, 2, 4 ... at once until throughput stops growing, then Poisson arrivals.")
]
Price = Annotated[
    float | None, typer.Option("--price-per-hour", help="Of the machine, to compute the cost of a million tokens.")
]
ServerUrl = Annotated[
    str, typer.Argument(metavar="URL", help="An OpenAI-compatible server; OPENAI_API_KEY is its key.")
]
PromptsOf = Annotated[
    Path | None,
    typer.Option("--run", metavar="RUN", help="Send the held-out prompts of this run; default: random ones."),
]
Model = Annotated[
    str | None, typer.Option("--model", metavar="NAME", help="The model to ask; default: the only one there is.")
]
Tokenizer = Annotated[
    str | None, typer.Option("--tokenizer", metavar="DIR", help="For random prompts; default: the one of --run.")
]
PromptTokens = Annotated[int, typer.Option("--prompt-tokens", min=1, help="Without --run: length of random prompts.")]
Chat = Annotated[bool, typer.Option("--chat", help="Without --run: ask /v1/chat/completions.")]
Threshold = Annotated[str, typer.Option("--threshold", help="How much worse counts as a regression.")]
IgnoreMismatch = Annotated[
    bool, typer.Option("--anyway", help="Compare even records of different environments and loads.")
]
Charts = Annotated[Path | None, typer.Option("--charts", metavar="DIR", help="Also write charts as SVG files.")]
Png = Annotated[bool, typer.Option("--png", help="Write PNG files as well.")]
RecordA = Annotated[Path, typer.Argument(metavar="A", help="A record, or a folder of records.")]
RecordB = Annotated[Path, typer.Argument(metavar="B", help="The one to judge against A.")]
Recipe = Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe (.yaml) or a run directory.")]
BatchTokens = Annotated[list[int] | None, typer.Option("--batch-tokens", min=1, help="Repeatable.")]
Length = Annotated[list[int] | None, typer.Option("--length", min=1, help="data.max_length; repeatable.")]
Steps = Annotated[int, typer.Option("--steps", min=1, help="How many steps are timed.")]
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
    """Stage: latency, throughput, memory and cost of every runtime of a run."""
    run_stage("bench", StageOptions(target, _settings(overrides, sweep, price), out, as_json, quiet, child))


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
    """Latency and throughput of any OpenAI-compatible server."""
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
    """Compare two records, or two folders of records; exits with 1 on a regression."""
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
    """Speed and peak memory of training, at several sizes of batch."""
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
    """Write the charts of a run's bench as SVG files."""
    from qkit.report import bench_charts as charts
    from qkit.run.directory import Run

    written = [str(path) for path in charts.write(Run.open(run), out, png)]
    console.show(as_json, written, lambda: "\n".join(written))


def _settings(overrides: Sequence[str] | None, sweep: bool, price: float | None) -> list[str]:
    """Overrides of the recipe, with those that have an option of their own."""
    settings = [*(overrides or ())]
    if sweep:
        settings.append("bench.sweep=true")
    if price is not None:
        settings.append(f"bench.price_per_hour={price}")
    return settings
