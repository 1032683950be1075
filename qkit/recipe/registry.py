"""The names of tasks, export formats and runtimes: the folders are the registry, and a file adds its name."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from qkit.recipe.schema import BOTTLENECKS

PACKAGE = Path(__file__).parent.parent
TASKS, FORMATS, RUNTIMES = "tasks", "export.formats", "runtimes"  # the folders, as Python imports them
BASELINES = (
    "base",
    "majority",
)  # what a trained model is compared with: its base, or a constant answer where the head is new
TRAINED = ("adapter", "trained")  # what training makes: an adapter, or all weights
MERGED = "merged"  # the artifact of the stage `merge`, where the name of an export format could stand


def format_names() -> Iterator[str]:
    """Every export format: the exporter's name, and the variant after a dash."""
    for kind in names(FORMATS):
        exporter: Any = importlib.import_module(f"qkit.{FORMATS}.{kind}")
        yield from ("-".join(filter(None, (kind, variant))) for variant in exporter.VARIANTS)


def names(folder: str) -> list[str]:
    """The names in a registry folder (TASKS, FORMATS or RUNTIMES)."""
    return sorted(p.stem for p in (PACKAGE / folder.replace(".", "/")).glob("*.py") if not p.stem.startswith("_"))


def task_defaults(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The sections of a recipe as written, with what its task sets where the recipe says nothing."""
    if raw.get("task") not in names(TASKS):
        return dict(raw)
    task: Any = importlib.import_module(f"qkit.{TASKS}.{raw['task']}").TASK
    filled = dict(raw)
    for section, values in task.defaults(raw).items():
        written = raw.get(section)
        if not isinstance(values, Mapping):
            filled.setdefault(section, values)
        elif written is None or isinstance(written, Mapping):
            filled[section] = {**values, **(written or {})}
    return filled


def task_clashes(recipe: Any) -> Iterator[tuple[tuple[str | int, ...], str]]:
    """Values of a valid recipe that its task does not have, as (key, message); none for an unknown task."""
    if recipe.task in names(TASKS):
        task: Any = importlib.import_module(f"qkit.{TASKS}.{recipe.task}").TASK
        yield from task.clashes(recipe)


def reads_validation(name: str) -> bool:
    """Whether a task of that name chooses settings on validation rows."""
    return name in names(TASKS) and bool(importlib.import_module(f"qkit.{TASKS}.{name}").TASK.READS_VALIDATION)


def figure_names(name: str) -> list[str]:
    """The figures beside the score of a task of that name."""
    task: Any = importlib.import_module(f"qkit.{TASKS}.{name}").TASK
    return [figure.name for figure in task.FIGURES]


def task_has_labels(name: str) -> bool:
    """Whether a task's model has a head for labels; False for an unknown task."""
    if name not in names(TASKS):
        return False
    task: Any = importlib.import_module(f"qkit.{TASKS}.{name}").TASK
    return not task.HEAD.generates


def is_unmerged(recipe: Any) -> bool:
    """Whether an adapter stays beside its base: no weight can take up a bottleneck, nor every kind of PEFT on a new head. The kinds that
    language models are trained with are merged."""
    return recipe.method in BOTTLENECKS or (recipe.method == "peft" and task_has_labels(recipe.task))


def split(name: str) -> tuple[str, str]:
    """Split an export format into the exporter's name and the variant."""
    kind, _, variant = name.partition("-")
    return kind, variant


def accepts(name: str) -> bool:
    """Whether an exporter makes this format: one of its VARIANTS, or a longer spelling (BY_HAND)."""
    kind, variant = split(name)
    if kind not in names(FORMATS):
        return False
    exporter: Any = importlib.import_module(f"qkit.{FORMATS}.{kind}")
    return variant in exporter.VARIANTS or variant in getattr(exporter, "BY_HAND", ())
