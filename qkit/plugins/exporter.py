"""What an exporter is given, and what its module offers. One file per format beside this one; the file's name is the format's name."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from qkit.recipe.registry import FORMATS, MERGED, names, split
from qkit.recipe.schema import Recipe


@dataclass(frozen=True)
class Job:
    """What an exporter works from: folders of a run, and where its programs' output goes.

    `merged`: the merged model in 16 bit, with tokenizer, template and generation config. `base`, `adapter`: what it was merged from.
    `rows`: data/train.parquet, columns input_ids and labels (-100: no loss), to calibrate with.
    `say`: tells the user something worth knowing.
    """

    merged: Path
    base: Path
    adapter: Path
    rows: Path
    recipe: Recipe
    log: Path
    say: Callable[[str], None] = lambda _: None


class Exporter(Protocol):
    """What a module in export/ holds. A format `onnx-int4` is the module onnx, its variant `int4`."""

    VARIANTS: Mapping[str, str]  # variant, "" for none -> a line on what it is
    QUANTIZED: frozenset[str]  # variants with weights of 8 bits and fewer: the base to merge onto is measured for each
    RUNTIME: str  # the runtime that opens them

    def export(self, job: Job, out: Path, variant: str) -> None:
        """Make the folder `out`, complete and whole."""

    def unsupported(self, variant: str, recipe: Recipe, config: Mapping[str, Any]) -> str | None:
        """Why it cannot be made, or not be loaded where it goes, as far as recipe and config.json tell; None if nothing is known."""


def remark(name: str) -> str | None:
    """What its exporter has to say on a format's measured distance (REMARKS); None where that is what a server will show."""
    kind, variant = split(name)
    found: str | None = getattr(exporter(name), "REMARKS", {}).get(variant) if kind in names(FORMATS) else None
    return found


def exporter(name: str) -> Exporter:
    """The exporter of a format."""
    module: Any = importlib.import_module(f"qkit.{FORMATS}.{split(name)[0]}")
    found: Exporter = module
    return found


def is_quantized(artifact: str) -> bool:
    """Whether an artifact's weights have 8 bits or fewer."""
    kind, variant = split(artifact)
    return artifact != MERGED and variant in exporter(kind).QUANTIZED
