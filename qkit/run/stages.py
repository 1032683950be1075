"""The stages, in their order: what each needs, reads and writes. pipeline.py runs them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from qkit.recipe.schema import Recipe


@dataclass(frozen=True)
class Stage:
    """A stage: whose folders it reads, and which sections of the recipe it depends on."""

    name: str
    needs: tuple[str, ...]
    sections: tuple[str, ...]
    resumes: bool = False  # goes on from what a killed attempt left
    reads_sources: bool = False  # the files on this machine that the recipe names


BEFORE_REPORT = ("data", "train", "evaluate", "merge", "export", "serve", "verify", "bench")
SECTIONS = tuple(name for name in Recipe.model_fields)


STAGES: Mapping[str, Stage] = {
    stage.name: stage
    for stage in (
        Stage("data", (), ("task", "seed", "model", "data"), reads_sources=True),
        Stage(
            "train",
            ("data",),
            ("seed", "model", "quantization", "lora", "data", "ledger", "train", "micro_batches"),
            resumes=True,
        ),
        Stage("evaluate", ("data", "train"), ("task", "model", "quantization", "evaluate")),
        Stage("merge", ("data", "train", "evaluate"), ("task", "seed", "model", "quantization", "evaluate", "merge")),
        Stage("export", ("data", "train", "merge"), ("model", "quantization", "merge", "export")),
        Stage("serve", ("export",), ("serve",)),
        Stage(
            "verify",
            ("data", "train", "evaluate", "merge", "export"),
            ("task", "evaluate", "export", "verify", "serve"),
        ),
        Stage("bench", ("data", "merge", "export"), ("bench", "serve")),
        Stage("report", BEFORE_REPORT, SECTIONS),
    )
}


def stages_of(recipe: Recipe) -> list[Stage]:
    """The stages that a recipe has: without a vllm export there is nothing to serve."""
    return [stage for name, stage in STAGES.items() if name != "serve" or "vllm" in recipe.export.formats]
