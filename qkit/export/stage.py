"""The stage `export`: makes the formats that the recipe names.

A format with 8 bits or fewer is made from each merge that the stage `merge` measured, and the one closest to the reference model is kept:
after quantization another merge may be the best.

    export/candidates.json   for each such format, every candidate with its distance to the reference model
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
from qkit.measure.candidates import Candidate, CandidateResult
from qkit.measure.held_out import HeldOut
from qkit.measure.parity import Reference
from qkit.merging.folder import dtype_of, write_folder
from qkit.model import provenance, source
from qkit.plan import deployable
from qkit.plugins.exporter import Job, exporter
from qkit.plugins.runtime import open_runtime
from qkit.plugins.task import open_task
from qkit.recipe.registry import is_unmerged, split
from qkit.run.directory import Run

# Server formats that transformers can open too: quant_method in config.json -> the package that this needs.
OPENED_BY_TRANSFORMERS = {"compressed-tensors": "compressed_tensors", "bitsandbytes": "bitsandbytes"}
# Size of each format as a multiple of the 16-bit weights.
KEPT = {
    "vllm": 0.0,
    "vllm-adapter": 0.1,
    "onnx-fp32": 2.0,
    "onnx-fp16": 1.0,
    "safetensors": 1.0,
    "safetensors-fp16": 1.0,
    "gguf-f16": 1.0,
}
KEPT_ELSE = 0.7  # formats with 8 bits or fewer, with embedding and head in 16
LOST = (
    "Leave this format out of export.formats, choose one with more bits, set merge.base=16bit (which usually survives quantization better), "
    "or train longer"
)


def run(run: Run, out: Path) -> None:
    """Make every format that the recipe names.

    Raises:
        NotDeployable: a format cannot be made, or its runtime cannot load it.
        ParityFailed: even the best candidate of a format has lost the fine-tune.
    """
    names = run.recipe.export.formats
    deployable.check(run.recipe)
    size = sum(file.stat().st_size for file in job(run).merged.glob("*.safetensors"))
    need_disk(out, int(size * disk_share(names)), "export")
    tables: dict[str, Any] = {}
    for name in run.progress.track(names, "export", len(names)):
        run.progress.notify(f"export: {name}")
        merge, table = _make(run, out, name)
        _write_provenance(run, out / name, name, merge)
        if table:
            tables[name] = table
    shutil.rmtree(_work(out), ignore_errors=True)
    write_json(out / candidates.FILE, tables)


def disk_share(names: Sequence[str]) -> float:
    """The disk space that these formats take, as a multiple of the 16-bit weights, plus the largest temporary copy.

    An ONNX file is built whole in a temporary folder; links to the merged weights are free.
    """
    kept = [KEPT.get(name, KEPT_ELSE) for name in names]
    temporary = [share if name.startswith("onnx") else 0.0 for name, share in zip(names, kept, strict=True)]
    return sum(kept) + max(temporary, default=0.0)


def job(run: Run) -> Job:
    """The inputs of the exporters for a run."""
    base = source.resolve(run.recipe.model)
    is_merged = not is_unmerged(run.recipe)
    return Job(
        merged=run.need("merge", "config.json").parent if is_merged else base,
        base=base,
        adapter=run.trained(),
        rows=run.need("data", "train.parquet"),
        recipe=run.recipe,
        log=run.log("export"),
        notify=run.progress.notify,
    )


def _make(run: Run, out: Path, name: str) -> tuple[Candidate | None, dict[str, Any] | None]:
    """Make one format. Returns the merge that it was made from, if any, and the table of candidates if there was a choice."""
    variant = split(name)[1]
    exporter(name).export(job(run), out / name, variant)
    if is_unmerged(run.recipe):
        return None, None
    kept = candidates.chosen_merge(run)
    others = candidates.other_merges(run)
    if variant not in exporter(name).QUANTIZED or not others:
        return kept, None
    runtime = _measurable(exporter(name).RUNTIME, out / name)
    if runtime is None:
        note = f"not measured: only a server can open it; made from {kept.name}, the best of the 16-bit merges"
        return kept, {"chosen": kept.name, "note": note, "candidates": []}
    return _choose_merge(run, out, name, [kept, *others], runtime)


def _choose_merge(
    run: Run, out: Path, name: str, merges: Sequence[Candidate], runtime: str
) -> tuple[Candidate, dict[str, Any]]:
    """Make the format from the other merges too, and keep the one closest to the reference model. It exists from the first of `merges`."""
    held_out = measure_held_out.held_out_of(run)
    reference = measure_reference.recorded(run, held_out.rows)
    choice = candidates.choose_best(
        merges,
        make=lambda merge: out / name if merge == merges[0] else _make_from(run, out, name, merge),
        measure=lambda merge, folder: _measure(run, merge, folder, runtime, held_out, reference),
        rule="fidelity",
    )
    choice.refuse_lost(name, f"export {name}", LOST)
    if choice.candidate != merges[0]:
        shutil.rmtree(out / name)
        choice.folder.rename(out / name)
        run.progress.notify(
            f"export: {name} is closer to the reference model when made from the {choice.candidate.name} merge"
        )
    return choice.candidate, choice.table()


def _work(out: Path) -> Path:
    return out / ".other"


def _make_from(run: Run, out: Path, name: str, merge: Candidate) -> Path:
    """Make the format from a merge that was not kept: it is merged again, and deleted at the end of the stage."""
    merged, target = _work(out) / merge.name / "merged", _work(out) / merge.name / name
    if not merged.is_dir():
        run.progress.notify(f"export: the {merge.name} merge")
        write_folder(run, merged, merge.base, dtype=dtype_of(run))
    run.progress.notify(f"export: {name} from the {merge.name} merge")
    exporter(name).export(replace(job(run), merged=merged), target, split(name)[1])
    return target


def _measure(
    run: Run, merge: Candidate, folder: Path, runtime: str, held_out: HeldOut, reference: Reference
) -> CandidateResult:
    """Parity on the first rows: enough to tell which is closer. The stage `verify` measures on all rows."""
    run.progress.notify(f"export: measuring the one made from the {merge.name} merge")
    with open_runtime(runtime, folder, detect(), head=open_task(run.recipe.task).HEAD) as opened:
        rows = held_out.rows[: measure_reference.BASE_ROWS]
        return CandidateResult.of(merge, parity.measure(reference, open_task(run.recipe.task).outputs(opened, rows)))


def _measurable(runtime: str, folder: Path) -> str | None:
    """The runtime to measure an export with: its own; for a server format transformers if it can open that; else None."""
    if runtime != "vllm":
        return runtime
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    package = OPENED_BY_TRANSFORMERS.get((config.get("quantization_config") or {}).get("quant_method", ""))
    return "transformers" if package and importlib.util.find_spec(package) else None


def _write_provenance(run: Run, folder: Path, name: str, merge: Candidate | None) -> None:
    """Complete qkit.json. Written last: the exporter's own entries (how it rounded, an adapter's base) stay."""
    (folder / candidates.FILE).unlink(missing_ok=True)
    file = folder / provenance.NOTE
    note = read_json(file) if file.exists() else {}
    note["format"] = name
    history = provenance.merged_into(run.folder("merge"))
    if (folder / "adapter_config.json").is_file():  # an unmerged adapter: its base is the model that it belongs to
        note["merged"] = history[:-1]
    elif merge is not None:
        note["base"] = merge.name
        note["merged"] = [*history[:-1], {**history[-1], "onto": merge.base}]
    note["made_from"] = run.outputs("merge")
    note["recipe_sha256"] = run.recipe.sha256()
    file.write_text(json.dumps(note, indent=1), encoding="utf-8")
    provenance.write_purpose(folder, run.recipe, run.tuned())
