"""Predicts every record of a file with a run, an artifact or a server."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from qkit.commands.predict import sink, source, state
from qkit.commands.predict.job import Job
from qkit.commands.predict.predictors import Predictor
from qkit.commands.predict.targets import Target, resolve
from qkit.core.errors import UserError
from qkit.core.progress import Progress
from qkit.data.read import Broken, Record
from qkit.plugins.example import RowError

FIRST_WINDOW = 128  # rows
SHORT_SECONDS, LONG_SECONDS = 2.0, 10.0  # of a window


@dataclass(frozen=True)
class Result:
    """What became of the file. `rows`: predicted now; `errors`: of these, without an answer; `skipped`: there from an earlier attempt."""

    out: str
    model: str
    rows: int
    errors: int
    skipped: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        return {**vars(self), "rows_per_second": self.rows / self.seconds if self.seconds else 0.0}


def run(job: Job, progress: Progress) -> Result:
    """Predict all records and write their lines.

    Raises:
        UserError: the file, the target or an option is wrong, or the output is not of this file.
        ServerError: the server does not answer.
    """
    if job.top_k != -1 and Path(job.out).suffix in sink.DELIMITERS:
        raise UserError(f"--top-k {job.top_k}: a table has a column for each label; write JSON lines, or omit --top-k")
    sink.check_name(job.out)
    records = source.records(job.file, job.stdin_format)
    target = resolve(job)
    now = state.fingerprint(job, target)
    state.check(job, now)
    written = sink.Sink(job.out, job.overwrite)
    try:
        state.write(job, now)
        _skip(records, written, job)
        progress.notify(f"predicting with {target.name}")
        predictor = target.open()
        begin = time.perf_counter()
        try:
            rows, errors = _predicted(records, written, job, target, predictor, progress)
        finally:
            predictor.close()
        return Result(job.out, target.name, rows, errors, written.done, time.perf_counter() - begin)
    finally:
        written.close()


def _skip(records: Iterator[Record | Broken], written: sink.Sink, job: Job) -> None:
    """Pass over the records that have their lines.

    Raises:
        UserError: the lines are not of this file.
    """
    last = None
    for last in islice(records, written.done):  # noqa: B007 (the last one counts)
        pass
    if written.done and (last is None or last.line != written.last):
        raise UserError(
            f"{job.out}: it exists, and its {written.done} lines are not of {job.file}; name another file, or set --overwrite"
        )


def _predicted(
    records: Iterator[Record | Broken],
    written: sink.Sink,
    job: Job,
    target: Target,
    predictor: Predictor,
    progress: Progress,
) -> tuple[int, int]:
    """Predict window by window. Returns how many records there were, and how many of them have no answer."""
    rows = errors = 0
    kept = sink.kept_names(job.keep, predictor.names(target.task.EXAMPLE) if job.keep else (), job.out)
    begin = time.perf_counter()
    size = min(FIRST_WINDOW, predictor.window)
    with progress.bar("predict", None, written.done) as bar:
        while window := list(islice(records, size)):
            start = time.perf_counter()
            requests = [_request(record, job, target) for record in window]
            answers = iter(predictor.predict([one for one in requests if not isinstance(one, RowError)]))
            for record, request in zip(window, requests, strict=True):
                answer = request if isinstance(request, RowError) else next(answers)
                errors += isinstance(answer, RowError)
                line = {sink.ERROR: str(answer)} if isinstance(answer, RowError) else answer
                written.write(record.line, _kept(record, kept), line)
            written.flush()
            rows += len(window)
            now = time.perf_counter()
            bar.advance(len(window), rows_per_second=rows / (now - begin))
            size = next_window(size, now - start, predictor.window)
    return rows, errors


def next_window(size: int, seconds: float, most: int) -> int:
    """The rows of the next window, after one of `size` rows took so long. Larger ones fill batches of one length better; what is lost when the
    command is stopped, and what is not shown, is one window.
    """
    if seconds < SHORT_SECONDS:
        return min(2 * size, most)
    return max(size // 2, 1) if seconds > LONG_SECONDS else size


def _request(record: Record | Broken, job: Job, target: Target) -> dict[str, Any] | RowError:
    """What is asked of a record. Columns of the recipe count where the record has them, since other data may have other names."""
    if isinstance(record, Broken):
        return RowError(record.reason)
    trained = {ours: theirs for ours, theirs in target.columns.items() if theirs in record.value}
    try:
        return target.task.request(record.value, {**trained, **job.columns})
    except RowError as error:
        return error


def _kept(record: Record | Broken, kept: Mapping[str, str]) -> dict[str, Any]:
    value = {} if isinstance(record, Broken) else record.value
    return {name: value.get(column) for column, name in kept.items()}
