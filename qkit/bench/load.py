"""How load is made: by a tool that sends requests to a server, or directly, batch by batch, for a runtime that lives in this process.

The tool is vLLM's own benchmark, `vllm bench serve`, started once as a program of its own and given one measurement after the other.
Chosen over guidellm 0.8 by running both against one server on two cores: it keeps every gap between chunks, where guidellm keeps a
request's first and last token; its own CPU use was 0.2 s of a load of 14 s, where guidellm's was 1.7 s (and its dispatch warned that it
was the bottleneck); its TPOT leaves the first token out; it comes with vLLM. Neither sends token ids that it is given. So prompts
go as text, with the server told to add no special tokens, and the server's count of each prompt must be the row's. What streams back is
read by bench_stream.py: the tool's own reader takes chunks for tokens that hold none.
"""

from __future__ import annotations

import itertools
import uuid
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from qkit.bench.record import Repeat, Request
from qkit.plugins.runtime import Runtime

HELD_OUT = "held-out rows"
# What a request has beyond OpenAI's parameters, where the server takes it: no prefix cache from load to load, no special tokens added to
# prompts that have theirs, answers of full length, greedy ones, and the ids of the tokens in a chunk, of which some have no text.
BEYOND_OPENAI: Mapping[str, Any] = {
    "cache_salt": "",
    "add_special_tokens": False,
    "ignore_eos": True,
    "repetition_penalty": 1.0,
    "return_token_ids": True,
}


def beyond_openai(names: Collection[str]) -> dict[str, Any]:
    """Those of them, with a salt that no request before had."""
    return {
        name: uuid.uuid4().hex if name == "cache_salt" else value
        for name, value in BEYOND_OPENAI.items()
        if name in names
    }


@dataclass(frozen=True)
class Prompt:
    """One prompt as text, and how many tokens it has where they were counted."""

    text: str
    tokens: int | None = None


@dataclass(frozen=True)
class HeldOut:
    """Prompts of a run's held-out rows. `left_out`: rows whose text has other tokens than the row."""

    prompts: tuple[Prompt, ...]
    left_out: int = 0

    @property
    def says(self) -> str:
        return HELD_OUT + (f", {self.left_out} left out whose text has other tokens" if self.left_out else "")


@dataclass(frozen=True)
class Synthetic:
    """Random prompts of about so many tokens: uniform from (1 - spread) to (1 + spread) times `tokens`."""

    tokens: int = 128
    spread: float = 0.0

    @property
    def says(self) -> str:
        return f"random, {self.tokens} tokens" + (f" +-{100 * self.spread:.0f} %" if self.spread else "")


@dataclass(frozen=True)
class Load:
    """One way of asking. `concurrency` requests at once (closed loop), or `request_rate` a second as they come (open loop, Poisson)."""

    requests: int
    output_tokens: int
    concurrency: int | None = None
    request_rate: float | None = None

    @property
    def kind(self) -> str:
        return "closed" if self.request_rate is None else "open"

    def warm_up(self) -> Load:
        """What is sent first and thrown away: a request for each client."""
        return replace(self, requests=min(self.requests, self.concurrency or self.requests))


class Measures(Protocol):
    """What a bench measures with. `queues`: requests may wait for each other, so that an open loop means something."""

    name: str
    command: list[str] | None
    queues: bool
    says: str

    def measure(self, load: Load, number: int) -> Repeat: ...


class Direct:
    """A runtime in this process: batches of `concurrency` prompts, one after the other. There is no queue, and nothing arrives by itself."""

    name = "direct"
    command: list[str] | None = None
    queues = False
    says = HELD_OUT

    def __init__(self, runtime: Runtime, prompts: Sequence[Sequence[int]]):
        self.runtime = runtime
        self.prompts = prompts

    def measure(self, load: Load, number: int) -> Repeat:
        size = load.concurrency or 1
        requests: list[Request] = []
        seconds = 0.0
        for batch in range(max(1, load.requests // size)):
            begin = number * load.requests + batch * size
            picked = [self.prompts[(begin + i) % len(self.prompts)] for i in range(size)]
            timings = self.runtime.timed(picked, load.output_tokens)
            seconds += max(timing.e2e_seconds for timing in timings)
            for prompt, timing in zip(picked, timings, strict=True):
                requests.append(_of_times(len(prompt), timing.token_seconds))
        return Repeat(seconds, tuple(requests))


def _of_times(prompt_tokens: int, seconds: Sequence[float]) -> Request:
    gaps = tuple(after - before for before, after in itertools.pairwise(seconds))
    return Request(seconds[0], gaps, prompt_tokens, len(seconds))
