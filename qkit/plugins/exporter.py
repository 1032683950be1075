"""The contract of an exporter. A format `onnx-int4` is the module `qkit/export/formats/onnx.py` and its variant `int4`."""

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
    """What an exporter works from.

    `merged`: the merged model in 16 bits, with tokenizer, chat template and generation config; the base's folder for an adapter that no
    weight can take up, which formats of models with labels are made from together with it. `base`, `adapter`: what it was merged from.
    `rows`: data/train.parquet to calibrate with, columns input_ids and labels (-100: no loss). `log`: receives the output of programs that
    the exporter runs. `notify`: shows the user a message.
    """

    merged: Path
    base: Path
    adapter: Path
    rows: Path
    recipe: Recipe
    log: Path
    notify: Callable[[str], None] = lambda _: None


class Exporter(Protocol):
    """The names that a module in export/formats/ defines."""

    VARIANTS: Mapping[str, str]  # variant ("" for none) -> one line of description
    # Variants with weights of 8 bits or fewer: for each of them, every merge is exported and measured
    QUANTIZED: frozenset[str]
    RUNTIME: str  # the runtime that opens the export: a file in runtimes/
    # Optional. LABELLED: variants that models with a new head have, too (frozenset).
    # EXACT: variants that keep every bit and compute in fp32 (frozenset); REMARKS: variant -> a remark on its measured distance;
    # BY_HAND: longer spellings that name how a variant is made.

    def export(self, job: Job, out: Path, variant: str) -> None:
        """Make the folder `out`: complete, or not at all."""

    def unsupported(self, variant: str, recipe: Recipe, config: Mapping[str, Any]) -> str | None:
        """Return why the variant cannot be made of, or loaded for, the model with this config.json; None if no reason is known."""


def remark(name: str) -> str | None:
    """Return a format's note on its measured distance (REMARKS of the exporter); None if the figure needs no note."""
    kind, variant = split(name)
    if kind not in names(FORMATS):
        return None
    remarks: Mapping[str, str] = getattr(exporter(name), "REMARKS", {})
    return remarks.get(variant)


def exporter(name: str) -> Exporter:
    """Return the exporter of a format, given the format's name."""
    module: Any = importlib.import_module(f"qkit.{FORMATS}.{split(name)[0]}")
    exporter_module: Exporter = module
    return exporter_module


def is_quantized(artifact: str) -> bool:
    """Return whether an artifact's weights have 8 bits or fewer."""
    kind, variant = split(artifact)
    return artifact != MERGED and variant in exporter(kind).QUANTIZED


def is_exact(artifact: str) -> bool:
    """Return whether an artifact keeps every bit of the merged model's weights and computes in fp32."""
    kind, variant = split(artifact)
    return artifact != MERGED and variant in getattr(exporter(kind), "EXACT", ())
