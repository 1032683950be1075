"""The reference model's scores of the held-out rows: recorded once for each adapter, and read by every stage that measures against them.

They are computed in fp32, from the base's weights as training used them: in bf16, two runs of one model differ more than a correct merge does.

The log-probabilities over the whole vocabulary are in RUN/.work/reference/ until `forget` deletes them.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from qkit.core.device import detect
from qkit.core.files import make_folder, need_disk, read_json, write_json
from qkit.measure.parity import ArtifactDistances, Parity, Reference
from qkit.model import source
from qkit.plugins.runtime import RowScores, open_runtime
from qkit.plugins.task import open_task
from qkit.run.directory import Run

REFERENCE_BYTES = (
    4 * 2**30
)  # parity is measured on as many rows as have their log-probabilities in this much disk space
BASE_ROWS = 32  # enough to tell whether an artifact is closer to the base model than to the adapter
REFERENCE, BASE = "reference-fp32", "base-fp32"
FORM = 2  # of these files
DONE = "done.json"  # written last: how many rows each file holds, and the distance of the same model in bf16


def recorded(run: Run, rows: Sequence[Any]) -> Reference:
    """The reference model's scores: read from disk if this adapter's were recorded, otherwise computed and recorded.

    Raises:
        DoesNotFit: the disk has too little room.
    """
    folder = _home(run) / _key(run)
    if not (folder / DONE).is_file():
        forget(run)
        make_folder(folder)
        _record(run, rows, folder)
    done = read_json(folder / DONE)
    exact = _read_both(run, folder)
    return replace(exact, rounding=tuple(done["rounding"]), bf16=Parity(**done["bf16"]))


def forget(run: Run) -> None:
    """Delete what was recorded."""
    for folder in (_home(run), _home(run).with_name("live")):  # "live": its name in earlier versions
        shutil.rmtree(folder, ignore_errors=True)


def _home(run: Run) -> Path:
    return run.root / ".work" / "reference"


def _key(run: Run) -> str:
    outputs = {**run.outputs("data"), **run.outputs("train")}
    quantization = run.recipe.quantization.model_dump(mode="json")
    weights = {name: digest for name, digest in outputs.items() if name.endswith(".safetensors")}
    text = json.dumps([REFERENCE, FORM, outputs.get("data/test.parquet"), weights, quantization], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def _record(run: Run, rows: Sequence[Any], folder: Path) -> None:
    """Score the rows with the adapter, then the base alone, then the adapter in bf16. One model is in memory at a time."""
    need_disk(folder, REFERENCE_BYTES, "measuring against the reference model")
    run.progress.notify("scoring the held-out rows with the reference model in fp32")
    trained, task = run.trained(), open_task(run.recipe.task)
    with _opened(run, trained, exact=True) as runtime:
        done: dict[str, Any] = {REFERENCE: write(task.outputs(runtime, rows), folder / REFERENCE)}
    if task.HEAD.generates:  # a new head has nothing to lose on the base
        with _opened(run, None, exact=True) as runtime:
            done[BASE] = write(task.outputs(runtime, rows[: min(BASE_ROWS, done[REFERENCE])]), folder / BASE)
    else:
        done[BASE] = write((), folder / BASE)
    run.progress.notify("scoring them again in bf16, to measure rounding")
    distances = ArtifactDistances(_read_both(run, folder))
    with _opened(run, trained, exact=False) as runtime:
        for row in task.outputs(runtime, rows):
            distances.add(row)
    write_json(
        folder / DONE,
        {**done, "bf16": distances.parity().to_dict(), "rounding": distances.to_reference.sums().tolist()},
    )


def _opened(run: Run, trained: Path | None, exact: bool) -> Any:
    base = source.resolve(run.recipe.model)
    return open_runtime("transformers", base, detect(), recipe=run.recipe, adapter=trained, exact=exact)


def _read_both(run: Run, folder: Path) -> Reference:
    scores, base = (tuple(read(folder / name)) for name in (REFERENCE, BASE))
    return Reference(scores, base, distance=open_task(run.recipe.task).distance)


def write(scores: Iterable[RowScores], file: Path) -> int:
    """Write full scores row by row, up to REFERENCE_BYTES, and what belongs to them beside `file`; returns the number of rows written."""
    import numpy as np

    written, targets, shapes = 0, [np.empty(0, np.float32)], []
    with file.open("wb") as sink:
        for row in scores:
            assert row.full is not None
            written += row.full.nbytes
            if written > REFERENCE_BYTES:
                break
            sink.write(row.full.tobytes())
            targets.append(row.targets)
            shapes.append(row.full.shape)
    np.savez(_beside(file), targets=np.concatenate(targets), shapes=np.array(shapes, np.int64).reshape(-1, 2))
    return len(shapes)


def read(file: Path) -> Iterator[RowScores]:
    """The scores that `write` wrote to the file, memory-mapped."""
    import numpy as np

    with np.load(_beside(file)) as stored:
        targets, shapes = stored["targets"], stored["shapes"]
    if not len(shapes):
        return
    values, begin, first = np.memmap(file, np.float32, "r"), 0, 0
    for height, width in shapes.tolist():
        full = values[begin : begin + height * width].reshape(height, width)
        yield RowScores(targets=targets[first : first + height], top1=full.argmax(1), full=full)
        begin, first = begin + height * width, first + height


def _beside(file: Path) -> Path:
    return file.with_name(f"{file.name}.npz")
