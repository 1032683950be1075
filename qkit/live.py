"""What the model that was trained says of the held-out rows: recorded once for an adapter, and read by every stage that measures against it.

The log-probabilities over the whole vocabulary lie in RUN/.work/live/, where `forget` takes them away.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from qkit import model
from qkit.device import detect
from qkit.run import Run, make_folder, need_disk, read_json, write_json
from qkit.runtime import Row, RowScores, open_runtime

LIVE_BYTES = 4 * 2**30  # parity is measured on as many rows as the live model's log-probabilities fit here
BASE_ROWS = 32  # enough to tell whether an artifact is nearer to the base model than to the adapter
DONE = "done.json"  # written last: how many rows each file holds
ON_WHICH = ("data/test.parquet", "train/adapter/adapter_model.safetensors")


@dataclass(frozen=True)
class Live:
    """Scores of the live adapter on the first held-out rows, and those of the base model alone on the first few of them."""

    scores: tuple[RowScores, ...]
    base: tuple[RowScores, ...]


def recorded(run: Run, rows: Sequence[Row]) -> Live:
    """The live model's scores: read from disk if this adapter's are there, else made."""
    folder = _home(run) / _key(run)
    if not (folder / DONE).is_file():
        forget(run)
        make_folder(folder)
        _record(run, rows, folder)
    counts = read_json(folder / DONE)
    return Live(*(tuple(read(folder / name, rows[: counts[name]])) for name in ("live", "base")))


def forget(run: Run) -> None:
    """Free the disk of what was recorded."""
    shutil.rmtree(_home(run), ignore_errors=True)


def _home(run: Run) -> Path:
    return run.root / ".work" / "live"


def _key(run: Run) -> str:
    made = {**run.outputs("data"), **run.outputs("train")}
    quantization = run.recipe.quantization.model_dump(mode="json")
    text = json.dumps([[made.get(name) for name in ON_WHICH], quantization], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def _record(run: Run, rows: Sequence[Row], folder: Path) -> None:
    """The adapter first, then the base alone; never two models in memory at once."""
    base, adapter = model.resolve(run.recipe.model), run.need("train", "adapter")
    need_disk(folder, LIVE_BYTES, "measuring against the live adapter")
    run.progress.say("the live adapter's log-probabilities on the held-out rows")
    with open_runtime("transformers", base, detect(), recipe=run.recipe, adapter=adapter) as runtime:
        counts = {"live": write(runtime.score(rows), folder / "live")}
    with open_runtime("transformers", base, detect(), recipe=run.recipe, adapter=None) as runtime:
        counts["base"] = write(runtime.score(rows[: min(BASE_ROWS, counts["live"])]), folder / "base")
    write_json(folder / DONE, counts)


def write(scores: Iterable[RowScores], file: Path) -> int:
    """Write full log-probabilities one row after the other; how many rows did fit LIVE_BYTES."""
    written = count = 0
    with file.open("wb") as sink:
        for row in scores:
            assert row.full is not None
            written += row.full.nbytes
            if written > LIVE_BYTES:
                break
            sink.write(row.full.tobytes())
            count += 1
    return count


def read(file: Path, rows: Sequence[Row]) -> Iterator[RowScores]:
    """The rows' scores, mapped from the file."""
    import numpy as np

    lengths = [len(row.input_ids) - row.start for row in rows]
    if not lengths:
        return
    every = np.memmap(file, np.float32, "r").reshape(sum(lengths), -1)
    begin = 0
    for row, length in zip(rows, lengths, strict=True):
        full = every[begin : begin + length]
        targets = full[np.arange(length), np.asarray(row.input_ids[row.start :])]
        yield RowScores(targets=targets, top1=full.argmax(1), full=full)
        begin += length
