"""`qkit serve`, and `qkit adapters` while it runs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qkit.cli import console
from qkit.cli.opening import open_run
from qkit.cli.options import LOCAL, Child, Json, KeyFile, Out, Quiet, Set, need_effect, verb_app
from qkit.cli.verbs.stages import StageOptions, run_stage
from qkit.core.errors import UserError
from qkit.core.progress import Progress

if TYPE_CHECKING:
    from rich.console import Console

    from qkit.serve.request import ServeOptions, Serving
    from qkit.server.adapters import Endpoint
    from qkit.server.process import Server

app = verb_app()

ServeTarget = Annotated[
    str, typer.Argument(metavar="TARGET", help="A run directory, a recipe, a model folder, or a hub id.")
]
EngineArgs = Annotated[
    list[str] | None, typer.Argument(metavar="[-- OPTIONS]", help="Passed to the runtime unchanged.")
]
RuntimeName = Annotated[
    str | None,
    typer.Option(
        "--runtime", help="vllm or onnxruntime. Default: vllm for models that generate text, onnxruntime for labels."
    ),
]
ArtifactName = Annotated[
    str | None,
    typer.Option("--artifact", metavar="NAME", help="The export to serve. Default: the best one that passed its gate."),
]
ServedName = Annotated[
    str | None,
    typer.Option("--name", metavar="NAME", help="The model's name in requests. Default: the folder's name."),
]
AdapterOption = Annotated[
    list[str] | None,
    typer.Option("--adapter", metavar="NAME=RUN", help="Also serve this adapter on the base model. Repeatable."),
]
RuntimeLoading = Annotated[
    bool,
    typer.Option(
        "--runtime-adapters",
        help="Let `qkit adapters` load and unload adapters; then every client with the API key can do so.",
    ),
]
Force = Annotated[bool, typer.Option("--force", help="Serve an artifact even if it failed its gate.")]
NoContract = Annotated[
    bool, typer.Option("--no-contract", help="Skip the check that the server treats requests as training did.")
]
Restart = Annotated[
    bool, typer.Option("--restart", help="Restart the server, with a growing delay, if it exits by itself.")
]
PrintFormat = Annotated[
    str | None,
    typer.Option("--print", metavar="FORM", help="Only print how to start the server: shell, compose or kubernetes."),
]


@app.command(epilog="Example: qkit serve runs/quickstart --set serve.port=8080 -- --max-num-batched-tokens 4096")
def serve(
    context: typer.Context,
    target: ServeTarget,
    rest: EngineArgs = None,
    overrides: Set = None,
    out: Out = None,
    runtime: RuntimeName = None,
    artifact: ArtifactName = None,
    name: ServedName = None,
    adapter: AdapterOption = None,
    runtime_adapters: RuntimeLoading = False,
    api_key_file: KeyFile = None,
    force: Force = False,
    no_contract: NoContract = False,
    restart: Restart = False,
    form: PrintFormat = None,
    as_json: Json = False,
    quiet: Quiet = False,
    child: Child = False,
) -> None:
    """Serve a model with vLLM's OpenAI-compatible server, or with ONNX Runtime, until Ctrl-C; a model with labels at /classify or the like."""
    from qkit.serve.request import ServeOptions
    from qkit.server.process import api_key

    if child:
        return run_stage("serve", StageOptions(Path(target), overrides, out, as_json, quiet, child))
    if form:
        _check_print(context, as_json)
    key, engine_args, adapters = api_key(api_key_file), tuple(_after_dashes(rest)), tuple(adapter or ())
    options = ServeOptions(
        runtime, artifact, name, adapters, runtime_adapters, key, engine_args, force, not no_contract
    )
    serving = _serving(target, overrides, out, options)
    if form:
        from qkit.serve import manifests

        print(manifests.rendered(form, serving))
        return None
    return _serve(serving, restart, as_json, quiet)


def _check_print(context: typer.Context, as_json: bool) -> None:
    """Refuse options that have no effect if nothing is started."""
    if as_json:
        raise typer.BadParameter("--json: no effect with --print, which prints the command as is")
    need_effect(context, "with --print", {p.name or "" for p in context.command.params} - {"restart", "no_contract"})


def _after_dashes(engine_args: list[str] | None) -> list[str]:
    """The arguments after the target, which are allowed only after `--`."""
    if engine_args and "--" not in sys.argv:
        raise typer.BadParameter(f"{' '.join(engine_args)}: options for the runtime must come after `--`")
    return engine_args or []


def _serving(target: str, overrides: list[str] | None, out: Path | None, options: ServeOptions) -> Serving:
    """What to serve: an artifact if the target is a run or a recipe, else a model."""
    from qkit.plan.sheet import Options, recipe_for
    from qkit.serve import serving

    if options.runtime not in (None, *serving.RUNTIMES):
        raise UserError(f"--runtime {options.runtime}: must be one of {', '.join(serving.RUNTIMES)}")
    path = Path(target)
    if (path / "recipe.yaml").is_file() or path.suffix in (".yaml", ".yml"):
        return serving.of_run(open_run(path, overrides, out, Progress()), options)
    for option, value in {"--out": out, "--artifact": options.artifact}.items():
        if value:
            raise UserError(f"{option} {value}: {target} is not a run, so it has no run directory and no exports")
    return serving.of_model(target, recipe_for(Options(target), overrides or ()), options)


def _serve(serving: Serving, restart: bool, as_json: bool, quiet: bool) -> None:
    """Plan, start the server, print its address, and wait until it ends."""
    from qkit.serve import fits, lifecycle

    terminal, planned = console.stderr(), fits.planned(serving)
    if not quiet:
        _print_start(terminal, serving, planned)

    def on_restart(reason: str, pause: float) -> None:
        terminal.print(f"{reason}\nrestarting in {pause:g} s", highlight=False, soft_wrap=True)

    described = False

    def on_ready(server: Server) -> None:
        nonlocal described
        if not (as_json and described):  # one document, even after restarts
            _print_ready(serving, server, as_json)
        described = True
        status = f"ready after {server.startup_seconds:.0f} s; log: {server.child.log}; Ctrl-C stops it"
        terminal.print(status, highlight=False, soft_wrap=True)

    with console.until_interrupted():
        lifecycle.serve(serving, on_ready, lifecycle.watch, on_restart if restart else None)
    terminal.print("stopped", highlight=False)


def _print_start(terminal: Console, serving: Serving, planned: Any) -> None:
    if serving.chosen:
        terminal.print(f"serving {serving.chosen}", highlight=False)
    memory = (
        f"{planned.peak_bytes / 2**30:.1f} of {planned.device_bytes / 2**30:.1f} GiB"
        if planned
        else "not estimated: the model's shape is unknown"
    )
    terminal.print(f"memory: {memory}; starting {serving.runtime} ...", highlight=False, soft_wrap=True)


def _print_ready(serving: Serving, server: Server, as_json: bool) -> None:
    from qkit.plugins.task import open_task
    from qkit.serve import snippets

    purpose = serving.purpose
    place = server.url + (open_task(purpose.task).ENDPOINT if purpose else "/v1")
    snippet = [snippets.curl(server, purpose), snippets.python(server, purpose)]
    lines = [f"serving {', '.join(serving.names)} at {place}", *snippet]
    console.show(as_json, snippets.describe(server, serving.names, purpose), lambda: "\n\n".join(lines) + "\n")
    sys.stdout.flush()


# --- qkit adapters ----------------------------------------------------------------------------------------------------

adapters_app = verb_app(no_args_is_help=True, help="List, load and unload the adapters of a running server.")
app.add_typer(adapters_app, name="adapters", epilog="Example: qkit adapters list --url http://127.0.0.1:8000")

Url = Annotated[str, typer.Option("--url", help="The URL of the server.")]
NamedRun = Annotated[str, typer.Argument(metavar="NAME=RUN")]
Name = Annotated[str, typer.Argument(metavar="NAME")]


@adapters_app.command("list", epilog="Example: qkit adapters list --url http://127.0.0.1:8000")
def adapters_list(url: Url = LOCAL, api_key_file: KeyFile = None, as_json: Json = False) -> None:
    """List the models and adapters that the server has."""
    models = _endpoint(url, api_key_file).list()
    console.show(as_json, models, lambda: "\n".join(f"{m['id']}  {m['parent'] or 'base'}  {m['root']}" for m in models))


@adapters_app.command("load", epilog="Example: qkit adapters load sql=runs/sql --url http://127.0.0.1:8000")
def adapters_load(adapter: NamedRun, url: Url = LOCAL, api_key_file: KeyFile = None, as_json: Json = False) -> None:
    """Load an adapter, after the same checks as `qkit serve --adapter`."""
    from qkit.server.adapters import parse

    loaded = _endpoint(url, api_key_file).load(*parse(adapter))
    document = {"name": loaded.name, "path": str(loaded.path)}
    console.show(as_json, document, lambda: f"{loaded.name}: loaded from {loaded.path}")


@adapters_app.command("unload", epilog="Example: qkit adapters unload sql --url http://127.0.0.1:8000")
def adapters_unload(name: Name, url: Url = LOCAL, api_key_file: KeyFile = None, as_json: Json = False) -> None:
    """Unload an adapter."""
    _endpoint(url, api_key_file).unload(name)
    console.show(as_json, {"name": name}, lambda: f"{name}: unloaded")


def _endpoint(url: str, key_file: Path | None) -> Endpoint:
    from qkit.server.adapters import Endpoint
    from qkit.server.process import api_key

    return Endpoint(url, api_key(key_file))
