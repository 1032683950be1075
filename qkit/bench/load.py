"""How load is generated: a tool sends requests to a server, or a runtime in this process generates batch by batch.

The tool is vLLM's own benchmark, `vllm bench serve`. It is started once, in a separate process, and runs one measurement after another.
It was chosen over guidellm 0.8 after running both against one server on two cores: it keeps every gap between chunks, while guidellm keeps
only a request's first and last token; it used 0.2 s of CPU for a load of 14 s, while guidellm used 1.7 s and warned that its dispatch was
the bottleneck; its TPOT excludes the first token; and it comes with vLLM. Neither tool can send token ids. So prompts are sent as text,
the server is told to add no special tokens, and the server's token count of each prompt must match the row's. stream.py reads the streamed
answers, because the tool's own client counts empty chunks as tokens.
"""

from __future__ import annotations

import itertools
import uuid
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from qkit.bench.record import Repeat, Request
from qkit.measure.artifacts import Artifact
from qkit.plugins.runtime import Runtime

HELD_OUT = "held-out rows"
# Request parameters beyond OpenAI's, sent where the server accepts them: a salt that keeps the prefix cache of one load from serving the
# next, no special tokens added to prompts that already have them, answers of full length, greedy decoding, and the token ids of each chunk,
# because some tokens have no text.
EXTRA_PARAMETERS: Mapping[str, Any] = {
    "cache_salt": "",
    "add_special_tokens": False,
    "ignore_eos": True,
    "repetition_penalty": 1.0,
    "return_token_ids": True,
}


def extra_body(names: Collection[str]) -> dict[str, Any]:
    """The extra parameters in `names`, with a new cache salt."""
    return {
        name: uuid.uuid4().hex if name == "cache_salt" else value
        for name, value in EXTRA_PARAMETERS.items()
        if name in names
    }


@dataclass(frozen=True)
class Prompt:
    """A prompt as text, and its number of tokens if known."""

    text: str
    tokens: int | None = None


@dataclass(frozen=True)
class HeldOutPrompts:
    """Prompts of a run's held-out rows. `left_out`: how many rows were left out because their text tokenizes to other ids than the row's."""

    prompts: tuple[Prompt, ...]
    left_out: int = 0

    @property
    def description(self) -> str:
        return HELD_OUT + (f", {self.left_out} left out whose text has other tokens" if self.left_out else "")


@dataclass(frozen=True)
class RandomPrompts:
    """Random prompts whose lengths in tokens are uniform from (1 - spread) to (1 + spread) times `tokens`."""

    tokens: int = 128
    spread: float = 0.0

    @property
    def description(self) -> str:
        return f"random, {self.tokens} tokens" + (f" +-{100 * self.spread:.0f} %" if self.spread else "")


@dataclass(frozen=True)
class Load:
    """A number of requests, and when they are sent.

    In a closed loop, `concurrency` requests are in flight at any time. In an open loop, requests arrive as a Poisson process at
    `request_rate` per second.
    """

    requests: int
    output_tokens: int
    concurrency: int | None = None
    request_rate: float | None = None

    @property
    def kind(self) -> str:
        return "closed" if self.request_rate is None else "open"

    def warm_up(self) -> Load:
        """The load that is sent first and not counted: one request per client."""
        return replace(self, requests=min(self.requests, self.concurrency or self.requests))


class LoadSource(Protocol):
    """What generates the load of a bench.

    `name` and `command`: the tool and its command line, for the record. `queues`: whether requests can queue, which an open loop needs.
    `description`: the kind of prompts, for the record; two records are compared only if it is the same.
    """

    name: str
    command: list[str] | None
    queues: bool
    description: str

    def measure(self, load: Load, number: int) -> Repeat:
        """Run a load once. `number`: 0 for the warm-up, then 1, 2, ... for the repeats, each with other prompts."""


@dataclass(frozen=True)
class Subject:
    """What is benched: an artifact, and what loads it. `name`: in the record and in the file's name.

    `pid`: the process whose memory is sampled, with its children. `argv`: of a server; None for a runtime in this process. `peak`: reads the
    peak memory in bytes, which `meter` describes.
    """

    name: str
    artifact: Artifact
    source: LoadSource
    pid: int
    startup_seconds: float
    argv: Sequence[str] | None
    peak: Callable[[], int]
    meter: str


class DirectLoad:
    """A runtime in this process, which generates for one batch of `concurrency` prompts after another. There is no queue."""

    name = "direct"
    command: list[str] | None = None
    queues = False
    description = HELD_OUT

    def __init__(self, runtime: Runtime, prompts: Sequence[Sequence[int]]):
        self.runtime = runtime
        self.prompts = prompts

    def measure(self, load: Load, number: int) -> Repeat:
        size = load.concurrency or 1
        requests: list[Request] = []
        seconds = 0.0
        for batch in range(max(1, load.requests // size)):
            first = number * load.requests + batch * size
            prompts = [self.prompts[(first + i) % len(self.prompts)] for i in range(size)]
            timings = self.runtime.timed(prompts, load.output_tokens)
            seconds += max(timing.e2e_seconds for timing in timings)
            for prompt, timing in zip(prompts, timings, strict=True):
                requests.append(_timed_request(len(prompt), timing.token_seconds))
        return Repeat(seconds, tuple(requests))


def _timed_request(prompt_tokens: int, seconds: Sequence[float]) -> Request:
    gaps = tuple(after - before for before, after in itertools.pairwise(seconds))
    return Request(seconds[0], gaps, prompt_tokens, len(seconds))
