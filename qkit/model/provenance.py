"""Records in qkit.json which adapters were merged into a model and which base an adapter belongs to; checked before each merge."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qkit.core.errors import MissingArtifact, ModelError
from qkit.model.adapters import sums as adapter_sum
from qkit.tensors.lora_deltas import WEIGHTS
from qkit.tensors.shards import fingerprint, shards, tensor_specs

if TYPE_CHECKING:
    from qkit.recipe.schema import Recipe


NOTE = "qkit.json"  # in the folder of an adapter, a merged model or an export: what it is and what it was made from


def adapter_sha256(adapter: Path) -> str:
    """Hash of the tensors of an adapter, or of a whole model. Saving the same tensors again does not change it."""
    digest = hashlib.sha256()
    for file in [adapter / WEIGHTS] if (adapter / WEIGHTS).is_file() else shards(adapter):
        _add_tensors(digest, file)
    return digest.hexdigest()


def _add_tensors(digest: Any, file: Path) -> None:
    specs = tensor_specs(file)
    data_begin = file.stat().st_size - max(spec["data_offsets"][1] for spec in specs.values())
    with file.open("rb") as opened:
        for name in sorted(specs):
            begin, end = specs[name]["data_offsets"]
            digest.update(json.dumps([name, specs[name]["dtype"], specs[name]["shape"]]).encode())
            opened.seek(data_begin + begin)
            digest.update(opened.read(end - begin))


def merged_into(folder: Path) -> list[dict[str, Any]]:
    """The adapters that were merged into a model, in order, as recorded in its folder; empty if nothing is recorded."""
    file = folder / NOTE
    note = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return list(note.get("merged", []))


def check_not_merged(adapter: Path, folder: Path) -> None:
    """Raise ModelError if this adapter is already merged into the model in `folder`."""
    entries = merged_into(folder)
    digests = {adapter_sha256(member) for member, _ in adapter_sum.members(adapter)} if entries else set()
    for entry in entries:
        if digests & set(entry["adapters"]):
            raise ModelError(
                f"{adapter}: this adapter is already merged into {folder} (see its {NOTE}). Merging it twice would degrade "
                f"the answers without an error: use the base that it was trained on, {entry['base']}",
                source=adapter,
            )


def write_merged(out: Path, folder: Path, base: str, onto: str, adapters: Mapping[str, float]) -> None:
    """Record in `out` what it was merged from. `base`: the name of the model in `folder`. `adapters`: weights by adapter hash."""
    entry = {"base": base, "base_fingerprint": fingerprint(folder), "onto": onto, "adapters": dict(adapters)}
    note = {"merged": [*merged_into(folder), entry]}
    (out / NOTE).write_text(json.dumps(note, indent=1), encoding="utf-8")


# --- what an artifact is for ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Purpose:
    """What a model with labels was trained for. `max_length`: tokens of a row in training; `format`: of an export, or "merged"."""

    task: str
    max_length: int
    format: str = "merged"


def write_purpose(folder: Path, recipe: Recipe, tuned: Mapping[str, float]) -> None:
    """Record in the folder of an artifact what `purpose_of` reads, and with which settings it predicts. `tuned`: `Run.tuned`."""
    file = folder / NOTE
    note = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    note |= {"task": recipe.task, "max_length": recipe.data.max_length}
    if tuned:
        note["tuned"] = dict(tuned)
    if recipe.data.stride is not None:
        note["stride"] = recipe.data.stride
    if "max_answer_tokens" in recipe.evaluate.model_fields_set:
        note["max_answer_tokens"] = recipe.evaluate.max_answer_tokens
    file.write_text(json.dumps(note, indent=1), encoding="utf-8")


def purpose_of(folder: Path) -> Purpose | None:
    """What a folder records of its purpose; None if qkit did not make it, or before it recorded that."""
    file = folder / NOTE
    note = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if "task" not in note:
        return None
    return Purpose(note["task"], note["max_length"], note.get("format", "merged"))


# --- which base an adapter belongs to -------------------------------------------------------------------------------


def write_adapter_note(
    adapter: Path, folder: Path, recipe: Recipe, quantized: list[str], init_from: Mapping[str, str] | None = None
) -> None:
    """Record in an adapter's folder what it was trained on. `quantized`: names of the weights held in 4 bit; `init_from`: the adapter that
    training began with."""
    note = {
        "base": recipe.model.source,
        "base_fingerprint": fingerprint(folder),
        "quantization": recipe.quantization.model_dump(mode="json"),
        "quantized": quantized,
        **({"init_from": dict(init_from)} if init_from else {}),
    }
    (adapter / NOTE).write_text(json.dumps(note, indent=1), encoding="utf-8")


def is_whole(trained: Path) -> bool:
    """Whether a folder of `qkit train` holds a whole model, and not an adapter."""
    return (trained / "config.json").is_file() and not (trained / "adapter_config.json").is_file()


def check_adapter(adapter: Path, folder: Path) -> Mapping[str, Any]:
    """The adapter's note, after checking that the model in `folder` is the one it was trained on.

    Raises:
        MissingArtifact: the folder is not an adapter made by qkit.
        ModelError: the adapter was trained on another model, or is already merged into this one.
    """
    note_file = adapter / NOTE
    config = adapter / (adapter_sum.FILE if adapter_sum.is_several(adapter) else "adapter_config.json")
    if not note_file.is_file() or not (config.is_file() or is_whole(adapter)):
        raise MissingArtifact(f"{adapter}: not an adapter made by `qkit train` (it has no {NOTE})", path=adapter)
    check_not_merged(adapter, folder)
    note: dict[str, Any] = json.loads(note_file.read_text(encoding="utf-8"))
    if note["base_fingerprint"] != fingerprint(folder):
        raise ModelError(
            f"{adapter}: this adapter was trained on {note['base']}, but {folder} has different weights. On another base it would "
            "load and give worse answers: set model.source to the base that it was trained on",
            source=adapter,
        )
    return note


TRACER = "transformers' exporter"
MARK = {"graph": f"traced by {TRACER}"}  # in qkit.json of a folder with a traced graph


def is_traced(folder: Path) -> bool:
    """Whether the folder's graph was traced, according to its qkit.json."""
    file = folder / NOTE
    return file.is_file() and MARK.items() <= json.loads(file.read_text(encoding="utf-8")).items()
