"""`qkit merge`: the stage, or any LoRA adapters into any base model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qkit.cli import console
from qkit.cli.options import Child, Json, MaybeTarget, Quiet, Set, need_effect, verb_app
from qkit.cli.verbs.stages import StageOptions, run_stage

app = verb_app()

SPARSE = ("ties", "dare", "magnitude")  # methods that keep only a share of the values

Out = Annotated[
    Path | None,
    typer.Option("--out", metavar="D", help="The run directory. With --base: the folder of the merged model."),
]
Base = Annotated[
    str | None, typer.Option("--base", metavar="B", help="Instead of a recipe: a model, as in model.source.")
]
Adapters = Annotated[
    list[Path] | None, typer.Option("--adapter", metavar="A", help="With --base: a PEFT LoRA folder. Repeatable.")
]
Weights = Annotated[
    list[float] | None, typer.Option("--weight", help="One per --adapter, in the same order. Default: 1.")
]
Combine = Annotated[
    str,
    typer.Option(
        "--combine",
        help="How several adapters are combined: sum adds weight * delta of each, exactly; linear, cat, svd, ties, dare_linear, "
        "magnitude_prune and others as in PEFT.",
    ),
]
Density = Annotated[
    float,
    typer.Option("--density", min=0, max=1, help="The share of values that ties and dare keep."),
]
Rows = Annotated[
    str | None,
    typer.Option("--data", metavar="ROWS", help="With --base: a data set of conversations to measure the merge on."),
]


@app.command(
    epilog="Example: qkit merge --base Qwen/Qwen2.5-7B-Instruct --adapter my-adapter --out merged --data rows.jsonl"
)
def merge(
    context: typer.Context,
    target: MaybeTarget = None,
    overrides: Set = None,
    out: Out = None,
    base: Base = None,
    adapter: Adapters = None,
    weight: Weights = None,
    combine: Combine = "sum",
    density: Density = 0.5,
    data: Rows = None,
    as_json: Json = False,
    quiet: Quiet = False,
    child: Child = False,
) -> None:
    """Stage: merge the adapter into the base model. With --base and --adapter: merge any adapter into any base."""
    from qkit.core.errors import RecipeError

    if (target is None) == (base is None) or (base is not None and not (adapter and out)):
        raise RecipeError("name either a recipe or run directory, or --base, --adapter and --out; one of the two")
    if target is not None:
        need_effect(context, "with a recipe or a run", {"overrides", "out"})
        run_stage("merge", StageOptions(target, overrides, out, as_json, quiet, child))
        return
    from qkit.commands import merge_any, merge_screen
    from qkit.commands.combine import MergeRequest

    assert base and adapter and out
    _check_combine(context, len(adapter), combine)
    request = MergeRequest(base, adapter, out, weight or (), combine, density, data, overrides or ())
    terminal = console.stderr(keep=True)
    with console.silence_stderr():
        merged = merge_any.merge(request, console.progress_on(terminal, quiet))
    console.show(as_json, merged, lambda: merge_screen.screen(merged))


def _check_combine(context: typer.Context, adapters: int, combine: str) -> None:
    """Refuse --combine for one adapter, and --density for methods that keep every value."""
    used = {"base", "adapter", "out", "weight", "data", "overrides"}
    if adapters == 1:
        need_effect(context, "with one --adapter", used)
    elif combine.startswith(SPARSE):
        need_effect(context, "with this --combine", used | {"combine", "density"})
    else:
        need_effect(context, "with this --combine", used | {"combine"})
