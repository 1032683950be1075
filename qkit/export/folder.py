"""What every export folder holds beside its weights, and how an exporter says that it has no such variant."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qkit.core.errors import NotDeployable
from qkit.model import older_forms
from qkit.model.provenance import NOTE
from qkit.tensors.companions import copy_companions


def start(out: Path, kind: str, variant: str, known: Mapping[str, str]) -> None:
    """Make the folder.

    Raises:
        NotDeployable: the exporter has no such variant.
    """
    if variant not in known:
        names = ", ".join("-".join(filter(None, (kind, name))) for name in known)
        raise NotDeployable(f"export format {'-'.join(filter(None, (kind, variant)))}: there is {names}")
    out.mkdir(parents=True)


def beside_weights(merged: Path, out: Path, **config: Any) -> None:
    """Tokenizer, template, generation config and config.json of the merged model, the last with `config` put into it."""
    copy_companions(merged, out)
    if config:
        file = out / "config.json"
        kept = json.loads(file.read_text(encoding="utf-8"))
        made = older_forms.in_dtype({**kept, **config}, config["dtype"]) if "dtype" in config else {**kept, **config}
        file.write_text(json.dumps(made, indent=1, ensure_ascii=False), encoding="utf-8")


def link(source: Path, target: Path) -> None:
    """A hard link; a copy where links do not work."""
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links: a copy serves as well
        shutil.copyfile(source, target)


def link_weights(merged: Path, out: Path) -> None:
    """The merged model's weights and their index, at no cost of disk."""
    for file in merged.iterdir():
        if file.suffix == ".safetensors" or file.name.endswith(".index.json"):
            link(file, out / file.name)


def note(out: Path, **keys: Any) -> None:
    """What an exporter says of its own in qkit.json; written last."""
    (out / NOTE).write_text(json.dumps(keys, indent=1), encoding="utf-8")
