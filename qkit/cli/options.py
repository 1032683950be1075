"""The arguments and options of the command line: those that several verbs share, then those of one verb."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Annotated

import typer

from qkit.core.errors import UserError

Target = Annotated[Path, typer.Argument(metavar="RECIPE_OR_RUN", help="A recipe (.yaml) or a run directory.")]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.")]
Set = Annotated[list[str] | None, typer.Option("--set", metavar="A.B=C", help="Override a recipe value; repeatable.")]
Out = Annotated[
    Path | None, typer.Option("--out", metavar="RUN", help="The run directory; default: runs/ and the recipe's name.")
]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout, and nothing else there.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, only the result and errors.")]
Served = Annotated[
    str, typer.Argument(metavar="TARGET", help="A run directory, a recipe, a model folder, or a hub id.")
]
Rest = Annotated[list[str] | None, typer.Argument(metavar="[-- OPTIONS]", help="Handed on to the runtime as they are.")]
RuntimeName = Annotated[str, typer.Option("--runtime", help="vllm or onnxruntime.")]
ArtifactName = Annotated[
    str | None, typer.Option("--artifact", metavar="NAME", help="Which export; default: the best that passed its gate.")
]
ServedName = Annotated[
    str | None, typer.Option("--name", metavar="NAME", help="What requests give as model; default: the folder's name.")
]
Beside = Annotated[
    list[str] | None, typer.Option("--adapter", metavar="NAME=RUN", help="An adapter beside the base; repeatable.")
]
Loading = Annotated[
    bool, typer.Option("--runtime-adapters", help="Let `qkit adapters` load and unload; any client with the key can.")
]
Force = Annotated[bool, typer.Option("--force", help="Serve also what failed its gate.")]
NoContract = Annotated[bool, typer.Option("--no-contract", help="Do not check that the server does what training did.")]
Restart = Annotated[bool, typer.Option("--restart", help="Start it again, with back-off, when it ends by itself.")]
Form = Annotated[
    str | None, typer.Option("--print", metavar="FORM", help="Only print it: shell, compose or kubernetes.")
]
KeyFile = Annotated[
    Path | None, typer.Option("--api-key-file", metavar="FILE", help="Holds the API key; default: VLLM_API_KEY.")
]
LOCAL = "http://127.0.0.1:8000"
Url = Annotated[str, typer.Option("--url", help="Where the server is.")]
Child = Annotated[bool, typer.Option("--child", hidden=True)]


COMMON = frozenset({"as_json", "quiet", "child", "help"})  # of every verb, in whatever way it is used


def need_effect(context: typer.Context, how: str, used: Collection[str]) -> None:
    """See that what was given on the command line is `used` when a verb is used like this (`how`, for the message).

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
        raise UserError(f"{', '.join(idle)}: no effect {how}; `qkit {context.info_name} --help` says what it is for")


# --- of `qkit bench` --------------------------------------------------------------------------------------------------

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
BenchUrl = Annotated[
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


# --- of `qkit plan` ---

MaybeTarget = Annotated[
    Path | None, typer.Argument(metavar="[RECIPE_OR_RUN]", help="A recipe (.yaml) or a run directory.")
]
Memory = Annotated[str | None, typer.Option("--memory", metavar="24GiB", help="Plan for a device of this size.")]
Card = Annotated[str | None, typer.Option("--card", metavar="rtx-4090", help="Plan for a known card.")]
PlannedModel = Annotated[
    str | None,
    typer.Option("--model", metavar="M", help="In place of a recipe: config.json, its folder, or a name."),
]
Quantization = Annotated[str | None, typer.Option("--quantization", metavar="nf4", help="Of --model.")]
Rank = Annotated[int | None, typer.Option("--rank", min=1, help="Of --model's adapter.")]
Batch = Annotated[int | None, typer.Option("--batch", min=1, help="Rows at once, with --model.")]
RowLength = Annotated[int | None, typer.Option("--length", min=1, help="Tokens of a row, with --model.")]
Solve = Annotated[
    str | None,
    typer.Option("--solve", metavar="WHAT", help="The most that fits: max_length, batch, rank; or card."),
]
Explain = Annotated[
    str | None, typer.Option("--explain", metavar="LINE", help="The formula of a line, with its numbers.")
]


# --- of `qkit inspect` ---

TokenizedModel = Annotated[
    str | None, typer.Option("--model", metavar="M", help="In place of a recipe: the model, for its tokenizer.")
]
InspectedData = Annotated[str | None, typer.Option("--data", metavar="F", help="In place of a recipe: the data set.")]
Format = Annotated[str, typer.Option("--format", help="Of --data, when its columns do not tell.")]
RowNumber = Annotated[int | None, typer.Option("--row", help="Show this row token by token.")]
Split = Annotated[str, typer.Option("--split", help="Of --row: train, validation or test.")]
Html = Annotated[Path | None, typer.Option("--html", metavar="FILE", help="Write it all to a page as well.")]


# --- of `qkit merge` ---

MergedOut = Annotated[
    Path | None,
    typer.Option("--out", metavar="D", help="The run directory; with --base the merged model's folder."),
]
ForeignBase = Annotated[
    str | None, typer.Option("--base", metavar="B", help="In place of a recipe: a model as model.source names it.")
]
ForeignAdapters = Annotated[
    list[Path] | None, typer.Option("--adapter", metavar="A", help="With --base: a PEFT LoRA folder; repeatable.")
]
Weights = Annotated[list[float] | None, typer.Option("--weight", help="Of each --adapter, in their order; default: 1.")]
Combine = Annotated[
    str,
    typer.Option(
        "--combine",
        help="Several adapters: sum adds weight * delta of each, exactly; linear, cat, svd, ties, dare_linear, magnitude_prune ... as "
        "PEFT has it.",
    ),
]
Density = Annotated[float, typer.Option("--density", min=0, max=1, help="Share of values that ties and dare keep.")]
MergeRows = Annotated[
    str | None, typer.Option("--data", metavar="ROWS", help="With --base: conversations to measure the merge on.")
]


# --- of `qkit verify` ---

Compared = Annotated[
    list[str],
    typer.Argument(
        metavar="RECIPE_OR_RUN | A B",
        help="A recipe or a run: the stage. Two of: a run (its live adapter), a model folder, an export, a server's http:// address.",
    ),
]
CompareRows = Annotated[
    Path | None,
    typer.Option("--data", metavar="ROWS", help="Compare A and B on these: JSON lines, or RUN/data/test.parquet."),
]
Where = Annotated[bool, typer.Option("--where", help="Name the first layer at which A and B part.")]
MaxKl = Annotated[
    float | None, typer.Option("--max-kl", metavar="NATS", help="Exit with 2 when the mean KL of A and B is above.")
]
ServerUrl = Annotated[
    str | None,
    typer.Option("--server", metavar="URL", help="Check that a running server does with RUN's rows what training did."),
]


# --- of `qkit push` ---

PushedFolder = Annotated[Path, typer.Argument(metavar="FOLDER", help="An export, or a run's merge folder.")]
Repo = Annotated[str, typer.Argument(metavar="OWNER/NAME", help="The repository on the hub.")]
Private = Annotated[bool, typer.Option("--private", help="Make it private, when it is new.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Only say what would be uploaded.")]
PushForce = Annotated[bool, typer.Option("--force", help="Also without provenance, or when its gate has failed.")]
