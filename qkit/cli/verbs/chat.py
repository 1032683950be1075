"""`qkit chat`."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from qkit.cli import console
from qkit.cli.options import KeyFile, Quiet, need_effect, verb_app

app = verb_app()

Target = Annotated[
    str, typer.Argument(metavar="TARGET", help="A run, the folder of a model or an export, or the URL of a server.")
]
System = Annotated[
    str | None, typer.Option("--system", metavar="TEXT", help="The system turn. Default: the run's data.system.")
]
ArtifactName = Annotated[
    str | None, typer.Option("--artifact", metavar="NAME", help="Of a run. Default: the best that passed its gate.")
]
ModelName = Annotated[str | None, typer.Option("--model", metavar="NAME", help="Of a server. Default: its first.")]
Beside = Annotated[
    str | None,
    typer.Option(
        "--beside", metavar="base", help="Show the base model's answer too; of a server, that of any of its models."
    ),
]
DEFAULT = "Default: the model's generation_config.json, as `qkit serve` has it"
Temperature = Annotated[
    float | None, typer.Option("--temperature", min=0, max=2, help=f"0 is greedy. {DEFAULT}; else 1.")
]
TopP = Annotated[float | None, typer.Option("--top-p", min=0, max=1, help=f"{DEFAULT}; else 1.")]
TopK = Annotated[int | None, typer.Option("--top-k", min=-1, help=f"-1: all tokens. {DEFAULT}; else -1.")]
MaxTokens = Annotated[
    int | None, typer.Option("--max-tokens", min=1, help="Of an answer. Default: as many as there is room for.")
]
Seed = Annotated[int | None, typer.Option("--seed", min=0, help="The same questions get the same answers.")]
JsonLines = Annotated[bool, typer.Option("--json", help="Print one JSON object for each answer on stdout.")]

USED = frozenset({"system", "beside", "temperature", "top_p", "top_k", "max_tokens", "seed"})


@app.command(epilog="Example: qkit chat runs/quickstart --beside base --temperature 0")
def chat(
    context: typer.Context,
    target: Target,
    system: System = None,
    artifact: ArtifactName = None,
    model: ModelName = None,
    beside: Beside = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    max_tokens: MaxTokens = None,
    seed: Seed = None,
    api_key_file: KeyFile = None,
    as_json: JsonLines = False,
    quiet: Quiet = False,
) -> None:
    """Talk to a model in the terminal; /help lists the commands. Without a terminal, each line of stdin is a question."""
    from qkit.commands.talk.job import Job
    from qkit.server.process import api_key

    is_server = target.startswith(("http://", "https://"))
    more = {"model", "api_key_file"} if is_server else {"artifact"}
    need_effect(context, f"with {'a server' if is_server else 'a run or a folder'}", USED | more)
    given = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "max_tokens": max_tokens, "seed": seed}
    sampling = {name: value for name, value in given.items() if value is not None}
    _talk(Job(target, artifact, model, api_key(api_key_file), system, beside, sampling), as_json, quiet)


def _talk(job: Any, as_json: bool, quiet: bool) -> None:
    """Open the model, and talk until the input ends. What libraries print is discarded."""
    from qkit.cli import talking
    from qkit.commands.talk import targets
    from qkit.commands.talk.dialogue import Dialogue

    is_terminal, notes = sys.stdin.isatty(), console.stderr(keep=True)
    with console.silence_stderr():
        talk = targets.opened(job)
        try:
            screen = talking.Screen(Dialogue(talk.speakers, talk.system), notes, is_terminal, as_json, quiet)
            if not quiet:
                screen.note(f"{talk.title}{'; /help lists the commands' if is_terminal else ''}")
            if is_terminal:
                talking.edit_lines()
            screen.run()
        finally:
            talk.close()
