"""Checks, before anything is trained, whether each export format of a recipe supports the model and loads in its runtime."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from qkit.core.errors import NotDeployable
from qkit.model import config as model_config
from qkit.model import prequantized
from qkit.plugins.exporter import exporter
from qkit.plugins.task import open_task
from qkit.recipe.registry import format_names, split
from qkit.recipe.schema import ALL, Recipe


@dataclass(frozen=True)
class Refusal:
    """An export format that does not work with this recipe, and why."""

    format: str
    reason: str


def refusals(recipe: Recipe) -> tuple[Refusal, ...]:
    """The formats of `export.formats` that are known not to work.

    Raises:
        ModelError: config.json of the model is not available, has a quantization that qkit cannot dequantize, or is not of a text model.
    """
    return tuple(_refused(recipe, [name for name in recipe.export.formats if name != ALL]))


def check(recipe: Recipe) -> None:
    """Check the formats of a recipe.

    Raises:
        NotDeployable: with all reasons, if a format that the recipe names is known not to work.
    """
    if refused := refusals(recipe):
        lines = "\n".join(f"{refusal.format}: {refusal.reason}" for refusal in refused)
        kept = [name for name in recipe.export.formats if name not in {refusal.format for refusal in refused}]
        raise NotDeployable(f"{lines}\nto export only the other formats: --set export.formats=[{','.join(kept)}]")


def resolved(recipe: Recipe) -> tuple[Recipe, tuple[Refusal, ...]]:
    """The recipe with `export.formats=all` replaced by the formats that work, and the formats that do not.

    Raises:
        ModelError: config.json of the model is not available.
    """
    if ALL not in recipe.export.formats:
        return recipe, ()
    names = list(format_names())
    refused = tuple(_refused(recipe, names))
    kept = tuple(name for name in names if name not in {refusal.format for refusal in refused})
    return recipe.model_copy(update={"export": recipe.export.model_copy(update={"formats": kept})}), refused


def _refused(recipe: Recipe, names: Iterable[str]) -> Iterator[Refusal]:
    config = model_config.config_of(recipe.model)
    prequantized.check(config, recipe.model.source)
    model_config.need_text_model(config, recipe.model.source)
    labelled = not open_task(recipe.task).HEAD.generates
    for name in names:
        if labelled and split(name)[1] not in getattr(exporter(name), "LABELLED", ()):
            formats = [known for known in format_names() if split(known)[1] in getattr(exporter(known), "LABELLED", ())]
            yield Refusal(name, f"models for task={recipe.task} have no such format; they have {', '.join(formats)}")
        elif reason := exporter(name).unsupported(split(name)[1], recipe, config):
            yield Refusal(name, reason)
