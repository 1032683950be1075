"""What the model that was trained says of the held-out rows: recorded once for an adapter, and read by every stage that measures against it.

It is computed in fp32, from the base's weights as training saw them: in bf16 two runs of one model differ, by more than a right merge does.

The log-probabilities over the whole vocabulary lie in RUN/.work/reference/, where `forget` takes them away.
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
from qkit.measure import divergence, parity
from qkit.measure.parity import Parity, Reference
from qkit.model import source
from qkit.plugins.runtime import RowScores, Runtime, TokenRow, open_runtime
from qkit.run.directory import Run

REFERENCE_BYTES = 4 * 2**30  # parity is measured on as many rows as the reference model's log-probabilities fit here
BASE_ROWS = 32  # enough to tell whether an artifact is nearer to the base model than to the adapter
REFERENCE, BASE = "reference-fp32", "base-fp32"
DONE = "done.json"  # written last: how many rows each file holds, and what bf16 makes of them
ON_WHICH = ("data/test.parquet", "train/adapter/adapter_model.safetensors")


def recorded(run: Run, rows: Sequence[TokenRow]) -> Reference:
    """The reference model's scores: read from disk if this adapter's are there, else made."""
    folder = _home(run) / _key(run)
    if not (folder / DONE).is_file():
        forget(run)
        make_folder(folder)
        _record(run, rows, folder)
    done = read_json(folder / DONE)
    exact = _read_both(folder, rows, done)
    return replace(exact, rounding=tuple(done["rounding"]), bf16=Parity(**done["bf16"]))


def forget(run: Run) -> None:
    """Free the disk of what was recorded."""
    for folder in (_home(run), _home(run).with_name("live")):  # "live": as earlier versions call it
        shutil.rmtree(folder, ignore_errors=True)


def _home(run: Run) -> Path:
    return run.root / ".work" / "reference"


def _key(run: Run) -> str:
    made = {**run.outputs("data"), **run.outputs("train")}
    quantization = run.recipe.quantization.model_dump(mode="json")
    text = json.dumps([REFERENCE, [made.get(name) for name in ON_WHICH], quantization], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def _record(run: Run, rows: Sequence[TokenRow], folder: Path) -> None:
    """The adapter first, then the base alone, then the adapter in bf16; never two models in memory at once."""
    need_disk(folder, REFERENCE_BYTES, "measuring against the reference model")
    run.progress.say("the trained model's log-probabilities on the held-out rows, in fp32")
    adapter = run.need("train", "adapter")
    with _opened(run, adapter, exact=True) as runtime:
        done: dict[str, Any] = {REFERENCE: write(runtime.score(rows), folder / REFERENCE)}
    with _opened(run, None, exact=True) as runtime:
        done[BASE] = write(runtime.score(rows[: min(BASE_ROWS, done[REFERENCE])]), folder / BASE)
    run.progress.say("the same in bf16: what rounding makes of it")
    exact = _read_both(folder, rows, done)
    with _opened(run, adapter, exact=False) as runtime:
        seen = _Seen(exact.scores, runtime.score(rows))
        done["bf16"] = parity.measure(exact, seen).to_dict()
    write_json(folder / DONE, {**done, "rounding": seen.sums})


def _opened(run: Run, adapter: Path | None, exact: bool) -> Runtime:
    base = source.resolve(run.recipe.model)
    return open_runtime("transformers", base, detect(), recipe=run.recipe, adapter=adapter, exact=exact)


def _read_both(folder: Path, rows: Sequence[TokenRow], done: dict[str, Any]) -> Reference:
    scores, base = (tuple(read(folder / name, rows[: done[name]])) for name in (REFERENCE, BASE))
    return Reference(scores, base)


class _Seen:
    """Scores as they pass by; `sums`: of each row that the exact ones have, the sum of its divergences, in nats."""

    def __init__(self, exact: Sequence[RowScores], scores: Iterable[RowScores]):
        self.exact, self.scores = exact, scores
        self.sums: list[float] = []

    def __iter__(self) -> Iterator[RowScores]:
        for row in self.scores:
            if len(self.sums) < len(self.exact):
                kl = divergence.divergence(self.exact[len(self.sums)], row)
                self.sums.append(float(kl.sum(dtype="float64")))
            yield row


def write(scores: Iterable[RowScores], file: Path) -> int:
    """Write full log-probabilities one row after the other; how many rows did fit REFERENCE_BYTES."""
    written = count = 0
    with file.open("wb") as sink:
        for row in scores:
            assert row.full is not None
            written += row.full.nbytes
            if written > REFERENCE_BYTES:
                break
            sink.write(row.full.tobytes())
            count += 1
    return count


def read(file: Path, rows: Sequence[TokenRow]) -> Iterator[RowScores]:
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
