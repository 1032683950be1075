"""What a recipe would make, asked of the exporters before anything is trained: can it be made of this model, and loaded where it goes?"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from qkit.core.errors import NotDeployable
from qkit.model import config as model_config
from qkit.model import prequantized
from qkit.plugins.exporter import exporter
from qkit.recipe.registry import format_names, split
from qkit.recipe.schema import ALL, Recipe


@dataclass(frozen=True)
class Refusal:
    """A format that this recipe cannot have, and why."""

    format: str
    reason: str


def refusals(how: Recipe) -> tuple[Refusal, ...]:
    """The formats of `export.formats` that are known not to work.

    Raises:
        ModelError: the model's config.json cannot be had, says that it is quantized in a way that is not dequantized here, or is not of
            text alone.
    """
    return tuple(_refused(how, [name for name in how.export.formats if name != ALL]))


def check(how: Recipe) -> None:
    """Raise NotDeployable when a format that the recipe names is known not to work, with the reasons for all of them."""
    if found := refusals(how):
        lines = "\n".join(f"{refusal.format}: {refusal.reason}" for refusal in found)
        kept = [name for name in how.export.formats if name not in {refusal.format for refusal in found}]
        raise NotDeployable(f"{lines}\nthe others: --set export.formats=[{','.join(kept)}]")


def resolved(how: Recipe) -> tuple[Recipe, tuple[Refusal, ...]]:
    """The recipe with the formats that `export.formats=all` stands for, and those left out because they are known not to work.

    Raises:
        ModelError: the model's config.json cannot be had.
    """
    if ALL not in how.export.formats:
        return how, ()
    every = list(format_names())
    left = tuple(_refused(how, every))
    kept = tuple(name for name in every if name not in {refusal.format for refusal in left})
    return how.model_copy(update={"export": how.export.model_copy(update={"formats": kept})}), left


def _refused(how: Recipe, names: Iterable[str]) -> Iterator[Refusal]:
    config = model_config.config_of(how.model)
    prequantized.check(config, how.model.source)
    model_config.need_text_model(config, how.model.source)
    for name in names:
        if reason := exporter(name).unsupported(split(name)[1], how, config):
            yield Refusal(name, reason)
