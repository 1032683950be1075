"""How the stage `export` makes its formats.

A format of 8 bits and fewer is made from each merge that the stage `merge` has measured, and the one nearer to the live adapter is kept:
which of them that is may be another one after quantization.

    export/candidates.json   for each such format, every way with its distance to the live adapter
"""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from qkit.core.device import detect
from qkit.core.files import need_disk, read_json, write_json
from qkit.measure import candidates, parity
from qkit.measure import held_out as measure_held_out
from qkit.measure import reference as measure_reference
from qkit.measure.candidates import Candidate
from qkit.measure.held_out import HeldOut
from qkit.measure.parity import Reference
from qkit.merging.folder import dtype_of, write_folder
from qkit.model import provenance, source
from qkit.plan import deployable
from qkit.plugins.exporter import Job, exporter
from qkit.plugins.runtime import open_runtime
from qkit.recipe.registry import split
from qkit.run.directory import Run

# Formats that a server is for, and that transformers opens as well where this package is: the method in config.json -> the package.
OPENED_BY_TRANSFORMERS = {"compressed-tensors": "compressed_tensors", "bitsandbytes": "bitsandbytes"}
KEPT = {
    "vllm": 0.0,
    "vllm-adapter": 0.1,
    "onnx-fp32": 2.0,
    "onnx-fp16": 1.0,
    "safetensors": 1.0,
    "safetensors-fp16": 1.0,
    "gguf-f16": 1.0,
}
KEPT_ELSE = 0.7  # of 8 bits and fewer, with embedding and head in 16
LOST = (
    "Leave this format out of export.formats, take one with more bits, set merge.base=16bit (which most often survives quantization), "
    "or train longer"
)


def run(run: Run, out: Path) -> None:
    """Make every format that the recipe names.

    Raises:
        NotDeployable: one of them cannot be made, or not be loaded where it goes.
        ParityFailed: the fine-tune is not in the best there is of one.
    """
    names = run.recipe.export.formats
    deployable.check(run.recipe)
    merged = run.need("merge", "config.json").parent
    size = sum(file.stat().st_size for file in merged.glob("*.safetensors"))
    need_disk(out, int(size * disk_share(names)), "export")
    tables: dict[str, Any] = {}
    for name in run.progress.track(names, "export", len(names)):
        run.progress.say(f"export: {name}")
        base, table = _make(run, out, name)
        _write_provenance(run, out / name, name, base)
        if table:
            tables[name] = table
    shutil.rmtree(_work(out), ignore_errors=True)
    write_json(out / candidates.FILE, tables)


def disk_share(names: Sequence[str]) -> float:
    """What these formats take on the disk, as a multiple of the 16-bit weights: all of them, and what the hungriest needs beside it.

    An ONNX file is built whole in a temporary folder; links to the merged weights are free.
    """
    kept = [KEPT.get(name, KEPT_ELSE) for name in names]
    beside = [share if name.startswith("onnx") else 0.0 for name, share in zip(names, kept, strict=True)]
    return sum(kept) + max(beside, default=0.0)


def job(run: Run) -> Job:
    """What the exporters of a run work from."""
    return Job(
        merged=run.need("merge", "config.json").parent,
        base=source.resolve(run.recipe.model),
        adapter=run.need("train", "adapter"),
        rows=run.need("data", "train.parquet"),
        recipe=run.recipe,
        log=run.log("export"),
        notify=run.progress.say,
    )


def _make(run: Run, out: Path, name: str) -> tuple[str, dict[str, Any] | None]:
    """Make one format; onto which weights it was merged, and the table of the ways to make it where there is a choice."""
    variant, chosen = split(name)[1], str(candidates.read_table(run)["chosen"])
    exporter(name).export(job(run), out / name, variant)
    others = list(candidates.other_bases(run))
    if variant not in exporter(name).QUANTIZED or not others:
        return chosen, None
    runtime = _measurable(exporter(name).RUNTIME, out / name)
    if runtime is None:
        note = f"not measured: only a server opens it; made from {chosen}, the choice among the 16-bit merges"
        return chosen, {"chosen": chosen, "note": note, "candidates": []}
    return _better(run, out, name, [chosen, *others], runtime)


def _better(run: Run, out: Path, name: str, ways: Sequence[str], runtime: str) -> tuple[str, dict[str, Any]]:
    """Make the format from the other merges too; the nearest to the live adapter takes its place."""
    held_out = measure_held_out.read_held_out(run.need("data", "test.parquet"))
    reference = measure_reference.recorded(run, held_out.rows)
    folders = {way: out / name if way == ways[0] else _from_other(run, out, name, way) for way in ways}
    measured = [_measured(run, way, folder, runtime, held_out, reference) for way, folder in folders.items()]
    best = candidates.choose(measured, "fidelity")
    candidates.refuse_lost(best, f"export {name}", LOST)
    if best.name != ways[0]:
        shutil.rmtree(out / name)
        folders[best.name].rename(out / name)
        run.progress.say(f"export: {name} is nearer to the live adapter when it is made from the {best.name} merge")
    return best.name, candidates.table(measured, "fidelity")


def _work(out: Path) -> Path:
    return out / ".other"


def _from_other(run: Run, out: Path, name: str, way: str) -> Path:
    """The format made from a merge that was not kept: that one is made once more, and goes at the end of the stage."""
    merged, target = _work(out) / way / "merged", _work(out) / way / name
    if not merged.is_dir():
        run.progress.say(f"export: the {way} merge")
        write_folder(run, merged, candidates.base_of(way), dtype=dtype_of(run))
    run.progress.say(f"export: {name} from the {way} merge")
    exporter(name).export(replace(job(run), merged=merged), target, split(name)[1])
    return target


def _measured(run: Run, way: str, folder: Path, runtime: str, held_out: HeldOut, reference: Reference) -> Candidate:
    run.progress.say(f"export: measuring what is made from the {way} merge")
    with open_runtime(runtime, folder, detect()) as opened:
        rows = held_out.rows[
            : measure_reference.BASE_ROWS
        ]  # enough to tell which is nearer; how near it is, `verify` measures on all
        return Candidate(way, candidates.describe(way), parity.measure(reference, opened.score(rows)))


def _measurable(runtime: str, folder: Path) -> str | None:
    """The runtime to measure an export with: its own; for a server's format transformers, where it reads that; else None."""
    if runtime != "vllm":
        return runtime
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    package = OPENED_BY_TRANSFORMERS.get((config.get("quantization_config") or {}).get("quant_method", ""))
    return "transformers" if package and importlib.util.find_spec(package) else None


def _write_provenance(run: Run, folder: Path, name: str, base: str) -> None:
    """Written last, beside what the exporter has to say of its own: how it rounded, which base it belongs to."""
    (folder / candidates.FILE).unlink(missing_ok=True)
    file = folder / provenance.NOTE
    own = read_json(file) if file.exists() else {}
    *earlier, last = provenance.merged_into(run.folder("merge"))
    apart = (folder / "adapter_config.json").is_file()
    note = {
        **own,
        "format": name,
        **({} if apart else {"base": base}),  # an adapter's is the model that it belongs to
        "merged": earlier if apart else [*earlier, {**last, "onto": candidates.base_of(base)}],
        "made_from": run.outputs("merge"),
        "recipe_sha256": run.recipe.sha256(),
    }
    file.write_text(json.dumps(note, indent=1), encoding="utf-8")
