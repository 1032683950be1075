"""The contracts of a runtime, the thing that opens an artifact: `Scores` and `Generates` for causal language models,
`Encodes` for models with a head on whole texts.

evaluate, verify and bench use only these; `runtimes/NAME.py` implements the runtime NAME.
"""

from __future__ import annotations

import importlib
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from qkit.core.batching import within_budget

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from qkit.core.device import Device


SPAN = ("start_logits", "end_logits")  # the outputs of a head on answers
ENCODER_TOKENS = 4096  # padding included, of a forward pass of a model that reads whole texts
PREFILL_TOKENS = 8192  # of prompts, padding included, that a model in this process reads at once


class Opened(ABC):
    """An opened artifact. Use it as a context manager, or call `close`."""

    @abstractmethod
    def memory_bytes(self) -> int:
        """Return the peak memory of this runtime so far; `Device.meter` says what is counted."""

    def close(self) -> None:
        """Release the model and its memory."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


class Scores(Opened):
    """An opened causal language model that scores what is given to it."""

    @abstractmethod
    def score(self, rows: Sequence[TokenRow]) -> Iterator[RowScores]:
        """Yield the scores of each row, in order. The logits of no more than one batch are in memory at a time."""


class Encodes(Opened):
    """An opened model with a head on whole texts."""

    @abstractmethod
    def logits(self, rows: Sequence[TextRow]) -> Iterator[NDArray[np.float32]]:
        """Yield the logits of each row, in order: [labels] of a text, or [tokens, labels] from a head on tokens.

        A head on answers gives [tokens, 2]: whether the answer begins there, and whether it ends there.
        """

    def transitions(self) -> Mapping[str, NDArray[np.float32]] | None:
        """Return the scores of a CRF: `pairs` [labels, labels] from a label to the next, `start` and `end` [labels]; None without one."""
        return None


class Generates(ABC):
    """An opened model that generates text, greedily, from token ids."""

    # Of prompts, padding included, in one batch; no limit where a server forms the batches
    prefill_tokens: float = float("inf")

    @abstractmethod
    def steps(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, stop: frozenset[int]
    ) -> Iterator[dict[int, int]]:
        """Decode all prompts as one batch; yield, for each step, {index of a prompt: its new token}.

        A prompt ends with its first token in `stop`, which is yielded too, or after `max_new_tokens`.
        """

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        stop: frozenset[int],
        batch_size: int = 32,
        advance: Callable[[int], None] = lambda _: None,
    ) -> list[list[int]]:
        """Return the completions, stop token included, in the order of `prompts`. Prompts of similar length share a batch.

        `advance` is called after each batch with the number of its prompts.
        """
        order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
        completions: list[list[int]] = [[] for _ in prompts]
        for places in within_budget((len(prompts[index]) for index in order), self.prefill_tokens, batch_size):
            batch = [order[place] for place in places]
            for step in self.steps([prompts[index] for index in batch], max_new_tokens, stop):
                for place, token in step.items():
                    completions[batch[place]].append(token)
            advance(len(batch))
        return completions

    def timed(self, prompts: Sequence[Sequence[int]], output_tokens: int) -> list[Timing]:
        """Decode all prompts as one batch, and time each of exactly `output_tokens` tokens of each prompt."""
        begin = time.perf_counter()
        seconds: list[list[float]] = [[] for _ in prompts]
        for step in self.steps(prompts, output_tokens, frozenset()):
            now = time.perf_counter() - begin
            for index in step:
                seconds[index].append(now)
        return [Timing(of_prompt) for of_prompt in seconds]


class Runtime(Scores, Generates):
    """An opened causal language model: it scores and generates."""


@dataclass(frozen=True)
class TokenRow:
    """A prompt and its completion as token ids; `input_ids[start:]` is the completion."""

    input_ids: Sequence[int]
    start: int

    @property
    def prompt(self) -> Sequence[int]:
        return self.input_ids[: self.start]


@dataclass(frozen=True)
class TextRow:
    """A text, or a pair of texts, as token ids. `token_type_ids`: empty where the model has none; `labels`: the ids of its labels."""

    input_ids: Sequence[int]
    token_type_ids: Sequence[int]
    labels: tuple[int, ...] = ()

    @property
    def windows(self) -> tuple[TextRow, ...]:
        """What a runtime reads: the text is in one piece, where rows of other tasks may be in several."""
        return (self,)


def joined(outputs: Mapping[str, Any], stack: Callable[[list[Any], int], Any]) -> Any:
    """A head's `logits`; those of a head on answers, which gives two of [..., tokens], as [..., tokens, 2]. `stack`: torch's, or numpy's."""
    return outputs["logits"] if "logits" in outputs else stack([outputs[name] for name in SPAN], -1)


@dataclass(frozen=True)
class RowScores:
    """The scores of one row's T completion tokens, each given the true tokens before it.

    `targets` [T] float32: log-probability of the true tokens. `top1` [T] int64: the most likely tokens.
    `full` [T, vocabulary] float32: all log-probabilities, if the runtime returns them; else `top_ids` and `top` [T, k].
    """

    targets: NDArray[np.float32]
    top1: NDArray[np.int64]
    full: NDArray[np.float32] | None = None
    top_ids: NDArray[np.int64] | None = None
    top: NDArray[np.float32] | None = None
    unit: str = "tokens"  # what the distributions are over


@dataclass(frozen=True)
class Timing:
    """One request: seconds from sending it to each of its output tokens."""

    token_seconds: Sequence[float]

    @property
    def e2e_seconds(self) -> float:
        return self.token_seconds[-1]


def open_runtime(name: str, artifact: Path, device: Device, **options: Any) -> Any:
    """Open `artifact` with the runtime of that name; `runtimes/NAME.py` documents its options and errors.

    Returns:
        A `Runtime`, or an `Encodes` for a task whose head reads whole texts.
    """
    opened: Opened = importlib.import_module(f"qkit.runtimes.{name}").open(artifact, device, **options)
    return opened
