"""`qkit predict`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from qkit.cli import console
from qkit.cli.options import Json, KeyFile, Quiet, need_effect, verb_app
from qkit.core.errors import UserError

if TYPE_CHECKING:
    from qkit.commands.predict.predict import Result

app = verb_app()

Target = Annotated[
    str, typer.Argument(metavar="TARGET", help="A run, the folder of an artifact, or the URL of a server.")
]
File = Annotated[
    str,
    typer.Argument(metavar="FILE", help="Records: .jsonl, .json, .csv, .tsv, .parquet or .txt; - is standard input."),
]
Out = Annotated[
    str, typer.Option("--out", metavar="FILE", help=".jsonl, .csv or .tsv; - is JSON lines on standard output.")
]
Columns = Annotated[
    list[str] | None,
    typer.Option(
        "--column",
        metavar="NAME=COLUMN",
        help="Which column of the file is `text`, `pair` or `prompt`. Default: the run's data.columns. Repeatable.",
    ),
]
Keep = Annotated[
    list[str] | None,
    typer.Option(
        "--keep",
        metavar="COLUMN",
        help="Copy this column into the output; as input.COLUMN if the output has that name already. Repeatable.",
    ),
]
InputFormat = Annotated[
    str, typer.Option("--format", help="Of standard input: jsonl, csv, tsv or text (a text per line).")
]
TopK = Annotated[int, typer.Option("--top-k", min=-1, help="The number of labels that are named; -1: all.")]
MaxNewTokens = Annotated[
    int | None,
    typer.Option("--max-new-tokens", min=1, help="Of an answer. Default: the recipe's evaluate.max_new_tokens."),
]
ArtifactName = Annotated[
    str | None, typer.Option("--artifact", metavar="NAME", help="Of a run. Default: the best that passed its gate.")
]
ModelName = Annotated[str | None, typer.Option("--model", metavar="NAME", help="Of a server. Default: its first.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Begin anew where the output exists.")]


USED = frozenset({"out", "column", "keep", "top_k", "max_new_tokens", "overwrite"})


@app.command(
    epilog="Example: qkit predict runs/intents questions.csv --column text=question --keep id --out labels.jsonl"
)
def predict(
    context: typer.Context,
    target: Target,
    file: File,
    out: Out,
    column: Columns = None,
    keep: Keep = None,
    input_format: InputFormat = "jsonl",
    top_k: TopK = -1,
    max_new_tokens: MaxNewTokens = None,
    artifact: ArtifactName = None,
    model: ModelName = None,
    overwrite: Overwrite = False,
    api_key_file: KeyFile = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Predict every record of a file: labels with probabilities, or answers. Continues an output that exists."""
    from qkit.commands.predict import predict as predicting
    from qkit.commands.predict.job import Job
    from qkit.server.process import api_key

    is_server = target.startswith(("http://", "https://"))
    more = {"model", "api_key_file"} if is_server else {"artifact"}
    used = USED | more | ({"input_format"} if file == "-" else set())
    need_effect(context, f"with {'a server' if is_server else 'a run or a folder'} and this file", used)
    if as_json and out == "-":
        raise UserError("--json: the predictions are on standard output already; write them to a file")
    job = Job(
        target, file, out, _mapped(column), tuple(keep or ()), input_format, top_k or -1, max_new_tokens,
        artifact, model, overwrite, api_key(api_key_file),
    )  # fmt: skip
    progress = console.progress_on(console.stderr(keep=True), quiet)
    with console.silence_stderr():
        result = predicting.run(job, progress)
    if as_json or not quiet:
        _show(result, as_json, out == "-")


def _mapped(columns: list[str] | None) -> dict[str, str]:
    pairs = [text.partition("=") for text in columns or ()]
    for ours, equals, theirs in pairs:
        if not (ours and equals and theirs):
            raise UserError(f"--column {ours}{equals}{theirs}: must be NAME=COLUMN, such as text=question")
    return {ours: theirs for ours, _, theirs in pairs}


def _show(result: Result, as_json: bool, to_stdout: bool) -> None:
    values: dict[str, Any] = result.to_dict()
    before = f", after {result.skipped:,} of an earlier attempt" if result.skipped else ""
    failed = f"; {result.errors:,} have an error" if result.errors else ""
    line = f"{result.rows:,} rows in {result.seconds:.1f} s ({values['rows_per_second']:,.0f} per second){before}{failed}: {result.out}"
    if to_stdout:
        console.stderr().print(line, highlight=False, soft_wrap=True)
    else:
        console.show(as_json, values, lambda: line)
