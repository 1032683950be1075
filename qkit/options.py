"""The arguments and options of the command line: those that several verbs share, then those of one verb."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

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
