"""Rows of several clients at once: as many workers as the machine has cores, and each takes the next batch as soon as it is free.

A batch is the row that has waited longest, with rows of the same length that wait as well: without padding nothing is computed in vain, and
the runtime is fastest (runtimes/_onnx_encoder.py). There are no rounds, so a short text never waits for the end of a long batch that others
share. A request of many texts waits behind itself: one that comes later has its turn when as many rows of each have been taken.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import logging
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from qkit.plugins.runtime import Encodes, TextRow

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

BATCH_TOKENS = 512  # of a batch; a longer row has one to itself


def usable_cores(quota: Path = Path("/sys/fs/cgroup/cpu.max")) -> int:
    """The cores that this process may use: those it is bound to, and no more than the quota of its container, rounded up."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    limit, _, period = quota.read_text(encoding="ascii").partition(" ") if quota.is_file() else ("max", "", "")
    return cores if limit.strip() == "max" else max(1, min(cores, -(-int(limit) // int(period))))


class EngineError(Exception):
    """The runtime failed on a batch."""


@dataclass(eq=False)
class Job:
    """The rows of one request. `results`: by row, None until it is computed; `left`: rows without a result."""

    rows: Sequence[TextRow]
    loop: asyncio.AbstractEventLoop
    done: asyncio.Future[None]
    results: list[NDArray[np.float32] | None] = field(default_factory=list)
    left: int = 0

    def __post_init__(self) -> None:
        self.results = [None] * len(self.rows)
        self.left = len(self.rows)

    def finish(self, error: Exception | None = None) -> None:
        """Wake the request up, from a worker's thread. `error`: why it has no results."""

        def wake() -> None:
            if not self.done.done():
                if error:
                    self.done.set_exception(error)
                else:
                    self.done.set_result(None)

        self.loop.call_soon_threadsafe(wake)


# The place in line, a number that makes it unique, the request, and which of its rows.
Waiting = tuple[int, int, Job, int]


class Engine:
    """The waiting rows, and the threads that compute them with `runtime`, which several threads may use at once."""

    def __init__(self, runtime: Encodes, workers: int, batch_tokens: int = BATCH_TOKENS):
        self.runtime = runtime
        self.batch_tokens = batch_tokens
        self.by_length: dict[int, list[Waiting]] = {}
        self.changed = threading.Condition()
        self.numbers = itertools.count()
        self.taken = 0  # rows that have left the line
        self.running = 0
        self.waiting = 0
        self.batch_sizes: list[int] = []  # of batches since the last `sizes`
        self.closing = False
        self.threads = [threading.Thread(target=self._work, daemon=True) for _ in range(workers)]
        for thread in self.threads:
            thread.start()

    async def logits(self, rows: Sequence[TextRow]) -> list[NDArray[np.float32]]:
        """The logits of each row. Cancelling it takes the rows that have not begun out of the line.

        Raises:
            EngineError: the runtime failed.
        """
        loop = asyncio.get_running_loop()
        job = Job(rows, loop, loop.create_future())
        if rows:
            self._add(job)
            await job.done
        return [result for result in job.results if result is not None]

    def _add(self, job: Job) -> None:
        with self.changed:
            for place, row in enumerate(job.rows):
                line = self.by_length.setdefault(len(row.input_ids), [])
                heapq.heappush(line, (self.taken + place, next(self.numbers), job, place))
            self.waiting += len(job.rows)
            self.changed.notify(len(job.rows))

    def close(self) -> None:
        """End the threads after the batches that they compute."""
        with self.changed:
            self.closing = True
            self.changed.notify_all()
        for thread in self.threads:
            thread.join(timeout=5)

    def sizes(self) -> list[int]:
        """The rows of each batch that was computed since the last call."""
        with self.changed:
            sizes, self.batch_sizes = self.batch_sizes, []
        return sizes

    def _work(self) -> None:
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.by_length or self.closing)
                if self.closing:
                    return
                batch = self._take()
            if batch:
                self._compute(batch)

    def _take(self) -> list[tuple[Job, int]]:
        """Take the row that is first in line, and others of its length; empty if all that waited have been cancelled."""
        length = min(self.by_length, key=lambda each: self.by_length[each][0][:2])
        line, batch = self.by_length[length], list[tuple[Job, int]]()
        while line and (not batch or length * (len(batch) + 1) <= self.batch_tokens):
            *_, job, place = heapq.heappop(line)
            self.waiting -= 1
            if not job.done.done():
                batch.append((job, place))
        if not line:
            del self.by_length[length]
        self.taken += len(batch)
        self.running += len(batch)
        return batch

    def _compute(self, batch: Sequence[tuple[Job, int]]) -> None:
        try:
            outputs = list(self.runtime.logits([job.rows[place] for job, place in batch]))
        except Exception as error:  # of any type: the clients must learn of it, and the others' batches go on
            logging.getLogger("qkit").exception("a batch failed")
            for job in {id(job): job for job, _ in batch}.values():
                job.finish(EngineError(f"{type(error).__name__}: {error}"))
            outputs = []
        with self.changed:
            self.running -= len(batch)
            self.batch_sizes.append(len(batch))
            for (job, place), logits in zip(batch, outputs, strict=False):  # none where the batch failed
                job.results[place] = logits
                job.left -= 1
                if not job.left:
                    job.finish()
