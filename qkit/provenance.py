"""Which adapters a model folder has in it already: kept in its qkit.json, and asked before another one is folded in."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qkit.deltas import WEIGHTS
from qkit.errors import ModelError
from qkit.tensor_files import fingerprint, tensor_specs

NOTE = "qkit.json"  # in an adapter's folder, a merged model's, an export's: what it is, and what it was made from


def adapter_sha256(adapter: Path) -> str:
    """Hash of an adapter's tensors: the same for a copy that was saved anew."""
    digest, file = hashlib.sha256(), adapter / WEIGHTS
    specs = tensor_specs(file)
    data_begin = file.stat().st_size - max(spec["data_offsets"][1] for spec in specs.values())
    with file.open("rb") as opened:
        for name in sorted(specs):
            begin, end = specs[name]["data_offsets"]
            digest.update(json.dumps([name, specs[name]["dtype"], specs[name]["shape"]]).encode())
            opened.seek(data_begin + begin)
            digest.update(opened.read(end - begin))
    return digest.hexdigest()


def merged_into(folder: Path) -> list[dict[str, Any]]:
    """The adapters that were folded into a model, first to last, as far as its folder says."""
    file = folder / NOTE
    note = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return list(note.get("merged", []))


def check_not_merged(adapter: Path, folder: Path) -> None:
    """Raise ModelError when the model in `folder` has this adapter in it already."""
    entries = merged_into(folder)
    digest = adapter_sha256(adapter) if entries else ""
    for entry in entries:
        if digest in entry["adapters"]:
            raise ModelError(
                f"{adapter}: this adapter is in {folder} already (its {NOTE} says so); folded in twice it would be accepted and answer worse: "
                f"give the base it was trained on, {entry['base']}"
            )


def write_merged(out: Path, folder: Path, base: str, onto: str, adapters: Mapping[str, float]) -> None:
    """Note in `out` what it was merged from. `base`: what the model in `folder` is called; `adapters`: hashes and their weights."""
    entry = {"base": base, "base_fingerprint": fingerprint(folder), "onto": onto, "adapters": dict(adapters)}
    note = {"merged": [*merged_into(folder), entry]}
    (out / NOTE).write_text(json.dumps(note, indent=1), encoding="utf-8")
