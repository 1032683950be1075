"""The stage `export`: one file per format here; the file's name is the format's name.

A recipe says `onnx-int4`: the file onnx.py, its variant `int4`. `EXPORT/NAME/` appears whole in RUN/export/.
"""

from __future__ import annotations

import json
from pathlib import Path

from qkit import model
from qkit.export._job import PROVENANCE, Job, exporter, split
from qkit.run import Run, need_disk


def run(run: Run, out: Path) -> None:
    """Make every format that the recipe names."""
    merged = run.need("merge", "config.json").parent
    size = sum(file.stat().st_size for file in merged.glob("*.safetensors"))
    need_disk(out, 3 * size, "export")  # ONNX in fp32 is twice the 16-bit model, and its builder writes before it moves
    for name in run.progress.track(run.recipe.export.formats, "export", len(run.recipe.export.formats)):
        run.progress.say(f"export: {name}")
        exporter(name).export(job(run), out / name, split(name)[1])
        _write_provenance(run, out / name, name)


def job(run: Run) -> Job:
    """What the exporters of a run work from."""
    return Job(
        merged=run.need("merge", "config.json").parent,
        base=model.resolve(run.recipe.model),
        adapter=run.need("train", "adapter"),
        rows=run.need("data", "train.parquet"),
        recipe=run.recipe,
        log=run.log("export"),
        say=run.progress.say,
    )


def _write_provenance(run: Run, folder: Path, name: str) -> None:
    """Written last, beside what the exporter has to say of its own (how it rounded, which base it belongs to)."""
    file = folder / PROVENANCE
    own = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    note = {**own, "format": name, "made_from": run.outputs("merge"), "recipe_sha256": run.recipe.sha256()}
    file.write_text(json.dumps(note, indent=1), encoding="utf-8")
