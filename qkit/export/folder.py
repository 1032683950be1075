"""What every export folder holds besides its weights, and the checks that exporters share."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qkit.core.errors import NotDeployable
from qkit.core.files import link_or_copy
from qkit.model import older_forms
from qkit.model.provenance import NOTE
from qkit.tensors.companions import copy_companions

FLOAT16_MAX = 65504.0


def create(out: Path, kind: str, variant: str, variants: Mapping[str, str]) -> None:
    """Create the folder of an export.

    Raises:
        NotDeployable: the exporter `kind` has no such variant.
    """
    if variant not in variants:
        names = ", ".join("-".join(filter(None, (kind, known))) for known in variants)
        name = "-".join(filter(None, (kind, variant)))
        raise NotDeployable(f"unknown export format {name}; the formats are {names}", export_format=name)
    out.mkdir(parents=True)


def write_companions(merged: Path, out: Path, **config: Any) -> None:
    """Copy tokenizer, template, generation config and config.json of the merged model; the last is updated with `config`."""
    copy_companions(merged, out)
    if config:
        file = out / "config.json"
        updated = {**json.loads(file.read_text(encoding="utf-8")), **config}
        if "dtype" in config:
            updated = older_forms.in_dtype(updated, config["dtype"])
        file.write_text(json.dumps(updated, indent=1, ensure_ascii=False), encoding="utf-8")


def link_weights(merged: Path, out: Path) -> None:
    """Hard-link the merged model's weights and their index, which takes no disk space."""
    for file in merged.iterdir():
        if file.suffix == ".safetensors" or file.name.endswith(".index.json"):
            link_or_copy(file, out / file.name, "export")


def check_float16(name: str, largest: float, export_format: str, advice: str) -> None:
    """Check that a tensor fits float16, given its largest absolute value.

    Raises:
        NotDeployable: it would become infinite, or it is NaN.
    """
    if not largest <= FLOAT16_MAX:
        raise NotDeployable(
            f"{export_format}: {name} has the value {largest:g}, and the largest of float16 is {FLOAT16_MAX:g}; {advice}",
            export_format=export_format,
        )


def note(out: Path, **keys: Any) -> None:
    """Write what an exporter records about its work into qkit.json; to be called last."""
    (out / NOTE).write_text(json.dumps(keys, indent=1), encoding="utf-8")
