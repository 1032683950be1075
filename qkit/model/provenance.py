"""Which adapters a model folder has in it already, and which base an adapter belongs to: kept in qkit.json, asked before one is merged."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qkit.core.errors import MissingArtifact, ModelError
from qkit.model import adapter_sum
from qkit.tensors.lora_deltas import WEIGHTS
from qkit.tensors.shards import fingerprint, tensor_specs

if TYPE_CHECKING:
    from qkit.recipe.schema import Recipe


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
    digests = {adapter_sha256(one) for one, _ in adapter_sum.members(adapter)} if entries else set()
    for entry in entries:
        if digests & set(entry["adapters"]):
            raise ModelError(
                f"{adapter}: this adapter is in {folder} already (its {NOTE} says so); folded in twice it would be accepted and answer worse: "
                f"give the base it was trained on, {entry['base']}"
            )


def write_merged(out: Path, folder: Path, base: str, onto: str, adapters: Mapping[str, float]) -> None:
    """Note in `out` what it was merged from. `base`: what the model in `folder` is called; `adapters`: hashes and their weights."""
    entry = {"base": base, "base_fingerprint": fingerprint(folder), "onto": onto, "adapters": dict(adapters)}
    note = {"merged": [*merged_into(folder), entry]}
    (out / NOTE).write_text(json.dumps(note, indent=1), encoding="utf-8")


# --- which base an adapter belongs to -------------------------------------------------------------------------------


def write_adapter_note(adapter: Path, folder: Path, how: Recipe, quantized: list[str]) -> None:
    """Keep beside an adapter what it was trained on."""
    note = {
        "base": how.model.source,
        "base_fingerprint": fingerprint(folder),
        "quantization": how.quantization.model_dump(mode="json"),
        "quantized": quantized,
    }
    (adapter / NOTE).write_text(json.dumps(note, indent=1), encoding="utf-8")


def check_adapter(adapter: Path, folder: Path) -> Mapping[str, Any]:
    """The adapter's note, after seeing that the model in `folder` is the one it was trained on.

    Raises:
        MissingArtifact: this is no adapter that qkit made.
        ModelError: it was trained on another model, or is in this one already.
    """
    note_file = adapter / NOTE
    config = adapter / (adapter_sum.FILE if adapter_sum.is_several(adapter) else "adapter_config.json")
    if not note_file.is_file() or not config.is_file():
        raise MissingArtifact(f"{adapter}: not an adapter made by `qkit train` (it has no {NOTE})")
    check_not_merged(adapter, folder)
    note: dict[str, Any] = json.loads(note_file.read_text(encoding="utf-8"))
    if note["base_fingerprint"] != fingerprint(folder):
        raise ModelError(
            f"{adapter}: this adapter was trained on {note['base']}, and the weights in {folder} are others; "
            "on another base it would be accepted and answer worse: give model.source the base it was trained on"
        )
    return note


TRACER = "transformers' exporter"
MARK = {"graph": f"traced by {TRACER}"}  # in such a folder's qkit.json


def is_traced(folder: Path) -> bool:
    """Whether a folder says that its graph is one of these."""
    file = folder / NOTE
    return file.is_file() and MARK.items() <= json.loads(file.read_text(encoding="utf-8")).items()
