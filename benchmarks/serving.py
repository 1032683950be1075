"""Serving: what `qkit serve` costs, and whether our figures are everybody's.

    python benchmarks/serving.py runs/quickstart                 # all of it
    python benchmarks/serving.py runs/quickstart --parts crosscheck --turns 3

overhead    throughput of a server that `qkit serve` started against vLLM started by hand with the same argv, both up, measured in turn;
            and how long `qkit serve` works before it has started vLLM
crosscheck  one server, in turn: our figures, `vllm bench serve` run by hand, and an asyncio client that has nothing of ours; for one client at
            a time (what a request takes, without chance meetings of requests) and for eight. Turns of one and the same program differ by
            tens of percent, so what each reads is set against what the server itself counted of the same requests

Results go to benchmarks/results/serving.json, part by part, and in words to serving.md. How fast each format is: formats.py.
Machines are noisy: ratios come from turns, with their range.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime as dt
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import mean, median
from typing import Any

import httpx
import psutil

from qkit.bench import record as bench_record
from qkit.bench import stage as bench_stage
from qkit.bench import tool as bench_tool
from qkit.bench.load import HeldOutPrompts, Load
from qkit.bench.tool import LoadTool
from qkit.core import figures as core_figures
from qkit.core.device import detect
from qkit.core.files import write_json, write_text
from qkit.model import tokenizer
from qkit.recipe.load import load
from qkit.run.directory import Run
from qkit.run.environment import environment
from qkit.runtimes.vllm import ENVIRONMENT

PARTS = ("overhead", "crosscheck")
LOAD = Load(requests=64, output_tokens=32, concurrency=8)
CROSSCHECKED = (Load(requests=16, output_tokens=32, concurrency=1), LOAD)
Turn = dict[str, dict[str, dict[str, float]]]  # by who asked: what it read, what the server counted, one over the other

FIGURES = ("ttft_seconds", "tpot_seconds", "output_tokens_per_second")  # means over a turn's requests
COUNTERS = {
    "ttft": "vllm:time_to_first_token_seconds_sum",
    "tpot": "vllm:request_time_per_output_token_seconds_sum",
    "e2e": "vllm:e2e_request_latency_seconds_sum",
    "requests": "vllm:e2e_request_latency_seconds_count",
    "tokens": "vllm:generation_tokens_total",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="a run directory whose stages data, merge and export are done")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--set", action="append", default=[], metavar="A.B=C", help="override a recipe value")
    parser.add_argument("--turns", type=int, default=5, help="of overhead and crosscheck")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    run = Run(given.run, load(given.run / "recipe.yaml", given.set))
    file = given.out / "serving.json"
    result = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"parts": {}}
    made: Mapping[str, Callable[[Run, int], Any]] = {"overhead": _overhead, "crosscheck": _crosscheck}
    for part in given.parts:
        begin = time.perf_counter()
        figures = made[part](run, given.turns)
        result["parts"][part] = {
            "command": f"python benchmarks/serving.py {' '.join(sys.argv[1:])}",
            "date": dt.date.today().isoformat(),
            "seconds": time.perf_counter() - begin,
            "environment": bench_record.with_hash(environment(detect().to_dict())),
            "load_average": os.getloadavg(),
            "figures": figures,
        }
        write_json(file, result)
    write_text(given.out / "serving.md", _markdown(result["parts"]))
    print(_markdown(result["parts"]))


# --- overhead ---------------------------------------------------------------------------------------------------------


def _overhead(run: Run, turns: int) -> dict[str, Any]:
    before_vllm = [_until_vllm_starts(run) for _ in range(turns)]
    with _served(run) as (process, described), tempfile.TemporaryDirectory() as folder:
        with _by_hand(described["argv"], Path(folder) / "plain.log") as plain:
            speeds = _in_turn(run, {"qkit serve": described["url"], "plain vLLM": plain}, described["model"], turns)
        assert process.poll() is None
    ratios = [a / b for a, b in zip(speeds["qkit serve"], speeds["plain vLLM"], strict=True)]
    return {
        "output_tokens_per_second": speeds,
        "ratio": median(ratios),
        "ratio_range": [min(ratios), max(ratios)],
        "seconds_before_vllm_starts": _median_and_each([seconds for seconds, _ in before_vllm]),
        "cpu_seconds_before_vllm_starts": _median_and_each([cpu for _, cpu in before_vllm]),
    }


def _median_and_each(values: list[float]) -> dict[str, Any]:
    return {"median": median(values), "each": values}


def _in_turn(run: Run, urls: Mapping[str, str], name: str, turns: int) -> dict[str, list[float]]:
    """Output tokens per second of each server, one after the other; who goes first changes every turn."""
    prompts = _prompts(run)
    speeds: dict[str, list[float]] = {who: [] for who in urls}
    log = Path(tempfile.gettempdir()) / "qkit-serving-load.log"
    tools = {
        who: LoadTool(url, name, bench_stage.tokenizer_folder(run), prompts, 0, log.with_suffix(f".{i}"))
        for i, (who, url) in enumerate(urls.items())
    }
    try:
        for turn in range(turns + 1):
            for who in [*tools][:: 1 if turn % 2 else -1]:
                repeat = tools[who].measure(LOAD, turn)
                speeds[who] += [bench_record.RATES["output_tokens_per_second"](repeat)] if turn else []
    finally:
        for tool in tools.values():
            tool.__exit__()
    return speeds


def _until_vllm_starts(run: Run) -> tuple[float, float]:
    """Seconds from starting `qkit serve` until the process that runs vLLM is there, and CPU seconds that it took for it."""
    begin = time.perf_counter()
    process = subprocess.Popen(_serve_command(run), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while not any(
            "vllm.entrypoints" in " ".join(_command(p)) for p in psutil.Process(process.pid).children(recursive=True)
        ):
            if process.poll() is not None:
                raise SystemExit(f"qkit serve ended with {process.returncode} before it had started vLLM")
            time.sleep(0.005)
        taken = psutil.Process(process.pid).cpu_times()
        return time.perf_counter() - begin, taken.user + taken.system
    finally:
        process.terminate()
        process.wait()


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def _serve_command(run: Run) -> list[str]:
    return [sys.executable, "-m", "qkit", "serve", str(run.root), "--json", "--set", "serve.port=0"]


@contextmanager
def _served(run: Run) -> Iterator[tuple[subprocess.Popen[str], dict[str, Any]]]:
    """`qkit serve`, and what it says of itself."""
    process = subprocess.Popen(_serve_command(run), stdout=subprocess.PIPE, text=True)
    assert process.stdout
    try:
        lines = [process.stdout.readline()]
        while lines[-1] not in ("}\n", ""):
            lines.append(process.stdout.readline())
        yield process, json.loads("".join(lines))
    finally:
        process.terminate()
        process.wait(60)
        process.stdout.close()


@contextmanager
def _by_hand(argv: Sequence[str], log: Path) -> Iterator[str]:
    """vLLM with the same command line on another port, as a person would start it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mine = list(argv)
    mine[mine.index("--port") + 1] = str(port)
    url = f"http://127.0.0.1:{port}"
    env = {**os.environ, **ENVIRONMENT, **detect().server_environment}
    with log.open("w") as sink:
        process = subprocess.Popen(mine, stdout=sink, stderr=sink, env=env)
    try:
        while not _healthy(url):
            assert process.poll() is None, log.read_text()[-2000:]
            time.sleep(0.5)
        yield url
    finally:
        process.terminate()
        process.wait(60)


def _healthy(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=2.0).status_code == 200
    except httpx.TransportError:
        return False


def _prompts(run: Run) -> HeldOutPrompts:
    return bench_stage.text_prompts(tokenizer.tokenizer_of(run.recipe.model), bench_stage.held_out_prompts(run))


# --- crosscheck -------------------------------------------------------------------------------------------------------


def _crosscheck(run: Run, turns: int) -> dict[str, Any]:
    """By number of clients: each turn asks the same prompts by all three; who goes first changes every turn."""
    prompts = _prompts(run)
    with _served(run) as (_, described), tempfile.TemporaryDirectory() as folder:
        url, name = described["url"], described["model"]
        with LoadTool(url, name, bench_stage.tokenizer_folder(run), prompts, 0, Path(folder) / "load.log") as tool:
            asks: dict[str, Callable[[Load, int], dict[str, float]]] = {
                "qkit": lambda load, turn: _ours(tool.measure(load, turn)),
                "vllm bench serve": lambda load, turn: _tool_by_hand(tool.arguments(load, turn), Path(folder)),
                "client": lambda load, turn: asyncio.run(
                    _client(url, name, [p.text for p in tool.picked(load, turn)], load)
                ),
            }
            found: dict[Load, list[Turn]] = {load: [] for load in CROSSCHECKED}
            for turn in range(turns + 1):
                order = [*asks][turn % 3 :] + [*asks][: turn % 3]
                for load, each in found.items():
                    each.append({who: _beside_the_server(url, load, lambda: asks[who](load, turn)) for who in order})  # noqa: B023
    return {str(load.concurrency): {"load": vars(load), **_agreement(each[1:])} for load, each in found.items()}


def _beside_the_server(url: str, load: Load, ask: Callable[[], dict[str, float]]) -> dict[str, Any]:
    """What a program reads, what the server counted meanwhile, and the one over the other."""
    before = _counters(url)
    read = ask()
    counted = {key: value - before[key] for key, value in _counters(url).items()}
    if counted["requests"] != load.requests:
        raise SystemExit(
            f"{counted['requests']:.0f} requests reached the server, and {load.requests} were meant: is it asked by others?"
        )
    server = {
        "ttft_seconds": counted["ttft"] / counted["requests"],
        "tpot_seconds": counted["tpot"] / counted["requests"],
        "output_tokens_per_second": counted["tokens"]
        / counted["e2e"]
        * (load.concurrency or 1),  # as if no client paused
    }
    return {"read": read, "server": server, "over_server": {key: read[key] / server[key] for key in FIGURES}}


def _counters(url: str) -> dict[str, float]:
    lines = httpx.get(f"{url}/metrics", timeout=60).text.splitlines()
    return {
        key: sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(f"{name}{{"))
        for key, name in COUNTERS.items()
    }


def _agreement(turns: Sequence[Turn]) -> dict[str, Any]:
    """By who asked: medians of what was read and of that over the server's own, and how far ours is from theirs; without the first turn."""
    asked = turns[0]

    def medians(of: Callable[[Turn, str, str], float]) -> dict[str, dict[str, float]]:
        return {who: {key: median(of(turn, who, key) for turn in turns) for key in FIGURES} for who in asked}

    return {
        "read": medians(lambda turn, who, key: turn[who]["read"][key]),
        "over_server": medians(lambda turn, who, key: turn[who]["over_server"][key]),
        "qkit_over_others": medians(
            lambda turn, who, key: turn["qkit"]["over_server"][key] / turn[who]["over_server"][key] - 1
        ),
        "qkit_over_others_as_read": medians(
            lambda turn, who, key: turn["qkit"]["read"][key] / turn[who]["read"][key] - 1
        ),
        "turns": list(turns),
    }


def _ours(repeat: bench_record.Repeat) -> dict[str, float]:
    record = bench_record.figures([repeat])
    return {key: _mean(record[key]) for key in FIGURES}


def _mean(figure: Any) -> float:
    return float(figure["mean"] if isinstance(figure, dict) else figure)


def _tool_by_hand(arguments: Sequence[str], folder: Path) -> dict[str, float]:
    """A process of its own, and the summary that the tool writes."""
    mine = list(arguments)
    mine[mine.index("--result-dir") + 1] = str(folder)
    env = {**os.environ, **bench_tool.ENVIRONMENT}
    subprocess.run(
        [sys.executable, "-m", "qkit.bench.vllm_driver"],
        input=json.dumps(mine) + "\n",
        text=True,
        capture_output=True,
        check=True,
        env=env,
    )
    told = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    return {
        "ttft_seconds": told["mean_ttft_ms"] / 1000,
        "tpot_seconds": told["mean_tpot_ms"] / 1000,
        "output_tokens_per_second": told["output_throughput"],
    }


async def _client(url: str, name: str, prompts: Sequence[str], load: Load) -> dict[str, float]:
    """The same prompts at the same concurrency, and the same definitions, with nothing of ours."""
    slots = asyncio.Semaphore(load.concurrency or 1)
    body = {"model": name, "max_tokens": load.output_tokens, "ignore_eos": True, "temperature": 0, "stream": True}
    body |= {"stream_options": {"include_usage": True}, "add_special_tokens": False, "cache_salt": os.urandom(8).hex()}

    async def one(client: httpx.AsyncClient, prompt: str) -> tuple[float, float, float, int]:
        async with slots:
            begin, times, tokens = time.perf_counter(), [], 0
            async with client.stream("POST", f"{url}/v1/completions", json={**body, "prompt": prompt}) as answer:
                async for line in answer.aiter_lines():
                    if line.startswith("data: {"):
                        event = json.loads(line[6:])
                        times += [time.perf_counter()] * bool(event["choices"])
                        tokens = (event.get("usage") or {}).get("completion_tokens", tokens)
            return begin, times[0], times[-1], tokens

    async with httpx.AsyncClient(timeout=600) as client:
        asked = await asyncio.gather(*(one(client, prompt) for prompt in prompts))
    seconds = max(last for *_, last, _ in asked) - min(begin for begin, *_ in asked)
    return {
        "ttft_seconds": mean(first - begin for begin, first, _, _ in asked),
        "tpot_seconds": mean((last - first) / (tokens - 1) for _, first, last, tokens in asked),
        "output_tokens_per_second": sum(tokens for *_, tokens in asked) / seconds,
    }


# --- in words --------------------------------------------------------------------------------------------------------


def _markdown(parts: Mapping[str, Any]) -> str:
    sections = []
    if "overhead" in parts:
        found = parts["overhead"]["figures"]
        low, high = found["ratio_range"]
        sections.append(
            f"`qkit serve` over plain vLLM, output tokens per second: {found['ratio']:.3f} (turns {low:.3f} to {high:.3f}); "
            f"it starts vLLM {found['seconds_before_vllm_starts']['median']:.2f} s after it was started itself "
            f"({found['cpu_seconds_before_vllm_starts']['median']:.2f} s of CPU)."
        )
    if "crosscheck" in parts:
        sections += [_crosscheck_table(found) for found in parts["crosscheck"]["figures"].values()]
    return "\n\n".join(sections) + "\n"


def _crosscheck_table(found: Mapping[str, Any]) -> str:
    head = f"{found['load']['concurrency']} at once, by"
    lines = [
        f"| {head} | TTFT ms | TPOT ms | Tokens/s | over the server's own counts | qkit over it, by these |",
        "|---|--:|--:|--:|---|---|",
    ]
    for who, each in found["read"].items():
        over = ", ".join(f"{value:.3f}" for value in found["over_server"][who].values())
        apart = ", ".join(f"{100 * value:+.1f} %" for value in found["qkit_over_others"][who].values())
        cells = [who, core_figures.ms_text(each["ttft_seconds"]), core_figures.ms_text(each["tpot_seconds"])]
        lines.append(f"| {' | '.join(cells)} | {each['output_tokens_per_second']:.1f} | {over} | {apart} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
