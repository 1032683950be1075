"""Generation for several clients at once with onnxruntime-genai: one thread steps the engine, and each request has a queue of tokens.

The engine batches statically: up to `max_num_seqs` requests that wait at the same time run together, and a request that arrives while they
run waits until the longest of them has ended. So latency is low with few clients, and one large `max_tokens` delays every client.
"""

from __future__ import annotations

import asyncio
import json
import logging
import queue
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

EVENTS = 64


@dataclass(frozen=True)
class Sampling:
    """How tokens are sampled; temperature 0 is greedy."""

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_tokens: int = 0
    repetition_penalty: float = 1.0


@dataclass(frozen=True)
class Ended:
    """The last item of a request's queue. `reason`: stop, length, or error with a message."""

    reason: str
    message: str = ""


@dataclass(eq=False)
class Job:
    """A request in progress. `tokens`: ids, then one Ended."""

    prompt: list[int]
    sampling: Sampling
    loop: asyncio.AbstractEventLoop
    tokens: asyncio.Queue[int | Ended] = field(default_factory=asyncio.Queue)
    cancelled: bool = False
    request: Any = None
    turn: int = 0

    def put(self, item: int | Ended) -> None:
        self.loop.call_soon_threadsafe(self.tokens.put_nowait, item)


class Engine:
    """A model folder from the ONNX export, and the thread that runs it."""

    def __init__(self, folder: Path, max_num_seqs: int, failed: Callable[[], None] = lambda: None):
        """`failed` is called once, when the engine has stopped for good."""
        import onnxruntime_genai as genai

        config = genai.Config(str(folder))
        config.overlay(json.dumps({"engine": {"static_batching": {"max_batch_size": max_num_seqs}}}))
        self.model = genai.Model(config)
        self.engine: Any = None  # created by the engine thread, the only one that may call it
        self.arriving: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self.jobs: list[Job] = []
        self.failure, self.failed = "", failed
        self.thread = threading.Thread(target=self._guarded, daemon=True)
        self.thread.start()

    async def generate(self, prompt: list[int], sampling: Sampling) -> AsyncIterator[int | Ended]:
        """Token ids, then the reason for the end. Closing the iterator early removes the request from the batch."""
        job = Job(prompt, sampling, asyncio.get_running_loop())
        self.arriving.put(job)
        try:
            while True:
                item = Ended("error", self.failure) if self.failure and job.tokens.empty() else await job.tokens.get()
                yield item
                if isinstance(item, Ended):
                    return
        finally:
            job.cancelled = True

    def close(self) -> None:
        self.arriving.put(None)
        self.thread.join(timeout=5)

    @property
    def load(self) -> tuple[int, int]:
        """The number of requests in the engine, running or waiting, and of those that have not reached it yet."""
        return len(self.jobs), self.arriving.qsize()

    def _guarded(self) -> None:
        try:
            self._run()
        except Exception as error:  # of any type: every client and /health must learn of it
            logging.getLogger("qkit").exception("the engine failed")
            self.failure = f"{type(error).__name__}: {error}"
            for job in self.jobs:
                job.put(Ended("error", self.failure))
            self.failed()

    def _run(self) -> None:
        import onnxruntime_genai as genai

        self.engine = genai.Engine(self.model)
        events = self.engine.create_event_buffer(EVENTS)
        while True:
            while not self.arriving.empty() or not self.jobs:
                job = self.arriving.get()
                if job is None:
                    return
                self._begin(job)
            for job in [job for job in self.jobs if job.cancelled]:
                job.request.cancel_turn(job.turn)
            for event in self.engine.run(events):
                self._take(event)

    def _begin(self, job: Job) -> None:
        import numpy as np
        import onnxruntime_genai as genai

        if job.cancelled:
            return
        try:
            job.request = self.engine.create_request()
            options = genai.TurnOptions(job.request)
            _set_options(options, job.sampling)
            job.turn = job.request.begin_turn(np.array(job.prompt, np.int32), options)
            self.jobs.append(job)
        except Exception as error:  # the bindings refuse this request; the others go on
            if job.request is not None:
                job.request.close()
            job.put(Ended("error", f"{type(error).__name__}: {error}"))

    def _take(self, event: Any) -> None:
        import onnxruntime_genai as genai

        job = next((job for job in self.jobs if job.request is event.request), None)
        if job is None:
            return
        if event.token is not None and event.finish_reason != genai.FinishReason.EOS:
            job.put(int(event.token))
        if event.finish_reason != genai.FinishReason.NONE:
            self.jobs.remove(job)
            job.request.close()
            job.put(_ended(event))


def _set_options(options: Any, sampling: Sampling) -> None:
    """Set the sampling options of a request."""
    options.set_max_generated_tokens(sampling.max_tokens)
    options.set_do_sample(sampling.temperature > 0)
    if sampling.temperature > 0:
        options.set_temperature(sampling.temperature)
        options.set_top_p(sampling.top_p)
        options.set_top_k(sampling.top_k)
    if sampling.min_tokens:
        options.set_min_generated_tokens(sampling.min_tokens)
    if sampling.repetition_penalty != 1.0:
        options.set_repetition_penalty(sampling.repetition_penalty)


def _ended(event: Any) -> Ended:
    import onnxruntime_genai as genai

    reasons = {
        genai.FinishReason.EOS: "stop",
        genai.FinishReason.CANCELLED: "stop",
        genai.FinishReason.MAX_GENERATED_TOKENS: "length",
        genai.FinishReason.MAX_SESSION_TOKENS: "length",
    }
    reason = reasons.get(event.finish_reason, "error")
    return Ended(reason, "" if reason != "error" else f"the engine failed: {event.error_code}")
