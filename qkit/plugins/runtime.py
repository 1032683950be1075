"""What every runtime offers, for every kind of artifact: greedy generation for token ids, scores of token ids, memory, close.

evaluate, verify and bench are written once on top of this; `runtimes/NAME.py` says how NAME does it.
"""

from __future__ import annotations

import importlib
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from qkit.core.device import Device


PREFILL_TOKENS = 8192  # of prompts, padding included, that a model in this process reads at once


@dataclass(frozen=True)
class TokenRow:
    """A prompt and its completion as token ids; `input_ids[start:]` is the completion."""

    input_ids: Sequence[int]
    start: int

    @property
    def prompt(self) -> Sequence[int]:
        return self.input_ids[: self.start]


@dataclass(frozen=True)
class RowScores:
    """What a model says of one row's T completion tokens, each from the true tokens before it.

    `targets` [T] float32: log-probability of the tokens that are there. `top1` [T] int64: the most likely tokens.
    `full` [T, vocabulary] float32: all log-probabilities, where the runtime gives them; else `top_ids` and `top` [T, k].
    """

    targets: NDArray[np.float32]
    top1: NDArray[np.int64]
    full: NDArray[np.float32] | None = None
    top_ids: NDArray[np.int64] | None = None
    top: NDArray[np.float32] | None = None


@dataclass(frozen=True)
class Timing:
    """One request: seconds from sending it to each of its output tokens. bench_record.py makes figures of them."""

    token_seconds: Sequence[float]

    @property
    def e2e_seconds(self) -> float:
        return self.token_seconds[-1]


class Runtime(ABC):
    """An opened artifact. Use it as a context manager, or call `close`."""

    most_tokens: int | None = None  # of prompts in a batch; None: the runtime sees to it that they fit

    @abstractmethod
    def steps(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, stop: frozenset[int]
    ) -> Iterator[dict[int, int]]:
        """Greedy decoding of all prompts as one batch: each yield is one step, {index of the prompt: its new token}.

        A prompt ends with its first token in `stop` (which is yielded), or after `max_new_tokens`.
        """

    @abstractmethod
    def score(self, rows: Sequence[TokenRow]) -> Iterator[RowScores]:
        """One RowScores per row, in order; streamed, so that no more than a batch of logits is ever held."""

    @abstractmethod
    def memory_bytes(self) -> int:
        """Peak memory of this runtime so far: see `Device.meter` for what is counted."""

    def close(self) -> None:
        """Give everything back."""

    def __enter__(self) -> Runtime:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        stop: frozenset[int],
        batch_size: int = 32,
        advance: Callable[[int], None] = lambda _: None,
    ) -> list[list[int]]:
        """Greedy completions, stop token included, in the order of `prompts`; prompts of like length share a batch.

        `advance` is told after each batch how many prompts it has finished.
        """
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        completions: list[list[int]] = [[] for _ in prompts]
        for batch in self._batches(order, prompts, batch_size):
            for step in self.steps([prompts[i] for i in batch], max_new_tokens, stop):
                for index, token in step.items():
                    completions[batch[index]].append(token)
            advance(len(batch))
        return completions

    def _batches(self, order: Sequence[int], prompts: Sequence[Sequence[int]], most: int) -> Iterator[list[int]]:
        """Prompts in their order, the longest last, as many at once as `most` and `most_tokens` let; one always."""
        batch: list[int] = []
        for index in order:
            padded = len(prompts[index]) * (len(batch) + 1)
            if batch and (len(batch) == most or (self.most_tokens is not None and padded > self.most_tokens)):
                yield batch
                batch = []
            batch.append(index)
        if batch:
            yield batch

    def timed(self, prompts: Sequence[Sequence[int]], output_tokens: int) -> list[Timing]:
        """Send all prompts at once and time each of exactly `output_tokens` tokens of each."""
        begin = time.perf_counter()
        seconds: list[list[float]] = [[] for _ in prompts]
        for step in self.steps(prompts, output_tokens, frozenset()):
            now = time.perf_counter() - begin
            for index in step:
                seconds[index].append(now)
        return [Timing(s) for s in seconds]


def open_runtime(name: str, artifact: Path, device: Device, **options: Any) -> Runtime:
    """Open `artifact` with the runtime of that name: `runtimes/NAME.py` is where to read on."""
    opened: Runtime = importlib.import_module(f"qkit.runtimes.{name}").open(artifact, device, **options)
    return opened
