"""The table of stages: what each one needs, reads and does in the pipeline. pipeline.py runs them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from qkit.recipe import validation
from qkit.recipe.registry import is_unmerged
from qkit.recipe.schema import Recipe


@dataclass(frozen=True)
class Stage:
    """A stage: the stages whose folders it reads, the recipe sections it depends on, and what the pipeline has to do for it."""

    name: str
    needs: tuple[str, ...]
    sections: tuple[str, ...]
    resumes: bool = False  # continues from what a killed attempt left
    reads_sources: bool = False  # reads the local files that the recipe names
    needs_test_rows: bool = False  # is not worth starting without rows to score the result on
    can_shrink: bool = False  # with `run --fit`: continues with a smaller recipe after running out of memory
    is_server: bool = False  # a process that stays up for the stages that use it
    uses_server: bool = False  # asks the server of a run, if the recipe has one
    reads_server: bool = False  # needs the server's own record, so the server must have stopped
    extends_card: bool = False  # adds to the model card


BEFORE_REPORT = ("data", "train", "evaluate", "merge", "export", "serve", "verify", "bench")
TRAINING = (
    "seed",
    "model",
    "quantization",
    "method",
    "lora",
    "bottleneck",
    "peft",
    "head",
    "layers",
    "loss",
    "preference",
    "feedback",
    "data",
    "ledger",
    "train",
    "micro_batches",
)
MERGING = ("task", "seed", "model", "quantization", "evaluate", "merge")
VERIFYING = ("task", "evaluate", "export", "verify", "serve")

STAGES: Mapping[str, Stage] = {
    stage.name: stage
    for stage in (
        Stage("data", (), ("task", "seed", "model", "data"), reads_sources=True),
        Stage("train", ("data",), TRAINING, resumes=True, needs_test_rows=True, can_shrink=True),
        Stage("evaluate", ("data", "train"), ("task", "model", "quantization", "evaluate")),
        Stage("merge", ("data", "train", "evaluate"), MERGING, extends_card=True),
        Stage("export", ("data", "train", "merge"), ("model", "quantization", "merge", "export"), extends_card=True),
        Stage("serve", ("export",), ("serve",), is_server=True),
        Stage(
            "verify",
            ("data", "train", "evaluate", "merge", "export"),
            VERIFYING,
            uses_server=True,
            extends_card=True,
        ),
        Stage("bench", ("data", "merge", "export"), ("bench", "serve"), uses_server=True, extends_card=True),
        Stage("report", BEFORE_REPORT, tuple(Recipe.model_fields), reads_server=True, extends_card=True),
    )
}


def sections_of(stage: Stage, recipe: Recipe) -> tuple[str, ...]:
    """The recipe sections that a stage depends on: training on `evaluate` as well, where the task's metric decides what is trained."""
    by_metric = stage.name == "train" and validation.depends_on_metric(recipe.train)
    return (*stage.sections, "evaluate") if by_metric else stage.sections


def stages_of(recipe: Recipe) -> list[Stage]:
    """The stages of a recipe, in order: without a vLLM export there is nothing to serve, and no weight can take up a bottleneck adapter."""
    left_out = {name for name, stage in STAGES.items() if stage.is_server and "vllm" not in recipe.export.formats}
    left_out |= {"merge"} if is_unmerged(recipe) else set()
    return [stage for name, stage in STAGES.items() if name not in left_out]
