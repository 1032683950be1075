"""Does `qkit serve` hold? Requests at once, some clients hang up, some requests are broken, and a SIGTERM ends it in mid-flight.

    python benchmarks/soak.py runs/quickstart                                # 1,000 requests, 32 at once
    python benchmarks/soak.py runs/quickstart --requests 100 --at-once 8     # a short one
    python benchmarks/soak.py runs/quickstart --minutes 10                   # as many as fit

Every request that was accepted (status 200) must end with [DONE] and the tokens that were asked for, or with an error that its client can
see. Broken ones must be refused. After SIGTERM the process ends, and nothing that it started is left. Memory of the whole tree must not grow
from the second quarter to the last by more than GROWTH. Exit status 1 when a check fails; the result goes to benchmarks/results/soak.json.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime as dt
import json
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import psutil

from qkit.bench import stage as bench_stage
from qkit.bench.meter import Meter
from qkit.core.device import detect
from qkit.core.files import write_json
from qkit.model import source
from qkit.run.directory import Run
from qkit.run.environment import environment

HANG_UP, BROKEN = 0.05, 0.05  # shares of the requests
GROWTH = 0.05
TOKENS = (4, 32)  # asked for, from and to
ENDS_SECONDS = 60.0  # after SIGTERM
LAST = 3  # rounds of requests that are in the air or waiting when SIGTERM comes
GOOD = {"done", "hung up", "refused broken", "refused at the end", "cut at the end"}


class Soak:
    """One server under load: what became of each request, in words."""

    def __init__(self, url: str, name: str, prompts: Sequence[list[int]], at_once: int, seed: int):
        self.url, self.name, self.prompts = url, name, prompts
        self.slots = asyncio.Semaphore(at_once)
        self.random = random.Random(seed)
        self.outcomes: Counter[str] = Counter()
        self.ending = False

    async def request(self, client: httpx.AsyncClient) -> None:
        async with self.slots:
            kind = self.random.random()
            try:
                if kind < BROKEN:
                    outcome = await self.broken(client)
                else:
                    outcome = await self.whole(client, hangs_up=kind < BROKEN + HANG_UP)
            except httpx.TransportError as error:
                outcome = "cut at the end" if self.ending else f"cut: {type(error).__name__}"
            self.outcomes[outcome] += 1

    async def broken(self, client: httpx.AsyncClient) -> str:
        """One of the ways in which a request is wrong; the answer has to say so."""
        bad: dict[str, Any] = self.random.choice(
            [
                {"content": b'{"model": "' + self.name.encode() + b'", "prompt": '},
                {"json": {"model": "nobody", "prompt": "x", "max_tokens": 4}},
                {"json": {"model": self.name, "prompt": "x", "max_tokens": -4}},
                {"json": {"model": self.name, "prompt": self.prompts[0] * 1000, "max_tokens": 4}},
            ]
        )
        answer = await client.post(f"{self.url}/v1/completions", headers={"content-type": "application/json"}, **bad)
        if self.ending and answer.status_code == 503:
            return "refused at the end"
        return "refused broken" if 400 <= answer.status_code < 500 else f"broken, and answered {answer.status_code}"

    async def whole(self, client: httpx.AsyncClient, hangs_up: bool) -> str:
        tokens = self.random.randint(*TOKENS)
        body = {"model": self.name, "prompt": self.random.choice(self.prompts), "max_tokens": tokens, "stream": True}
        body |= {"ignore_eos": True, "stream_options": {"include_usage": True}}
        counted, done = 0, False
        async with client.stream("POST", f"{self.url}/v1/completions", json=body) as answer:
            if answer.status_code != 200:
                return "refused at the end" if self.ending else f"answered {answer.status_code}"
            async for line in answer.aiter_lines():
                if not line.startswith("data: "):
                    continue
                if hangs_up:
                    return "hung up"
                done = done or line == "data: [DONE]"
                event = {} if line == "data: [DONE]" else json.loads(line[6:])
                if "error" in event:
                    return "refused at the end" if self.ending else f"error: {str(event['error'])[:80]}"
                counted = (event.get("usage") or {}).get("completion_tokens", counted)
        if done and counted == tokens:
            return "done"
        return f"lost: ended without a word after {counted} tokens" if not done else f"{counted} tokens for {tokens}"


async def _load(soak: Soak, process: subprocess.Popen[str], given: argparse.Namespace) -> float:
    """All requests, and SIGTERM among the last ones; returns the seconds from it to the end of the process."""
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(timeout=300, limits=limits) as client:
        until = time.monotonic() + 60 * given.minutes
        if given.minutes:
            while time.monotonic() < until:
                await asyncio.gather(*(soak.request(client) for _ in range(4 * given.at_once)))
        else:
            last = min(LAST * given.at_once, given.requests // 2)
            await asyncio.gather(*(soak.request(client) for _ in range(given.requests - last)))
        flying = [
            asyncio.create_task(soak.request(client)) for _ in range(min(LAST * given.at_once, given.requests // 2))
        ]
        await asyncio.sleep(1.0)
        soak.ending = True
        process.send_signal(signal.SIGTERM)
        begin = time.monotonic()
        await asyncio.gather(*flying)
    while process.poll() is None and time.monotonic() - begin < ENDS_SECONDS:
        await asyncio.sleep(0.1)
    return time.monotonic() - begin


def _growth(series: Sequence[Sequence[float]]) -> float:
    """Median memory of the last quarter over that of the second, less 1."""
    counts = [count for _, count in series]
    quarter = max(1, len(counts) // 4)
    return median(counts[-quarter:]) / median(counts[quarter : 2 * quarter] or counts) - 1


def _shared_memory(process: psutil.Process) -> set[str]:
    """The files of shared memory that a process has mapped, by name; others on the machine have some too."""
    try:
        return {mapped.path for mapped in process.memory_maps() if mapped.path.startswith("/dev/shm/")}
    except psutil.Error:
        return set()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="a run directory whose stages data and export are done")
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--at-once", type=int, default=32)
    parser.add_argument("--minutes", type=float, default=0.0, help="in place of a number of requests")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    result = _soak(Run.open(given.run), given)
    write_json(given.out / "soak.json", result)
    print(json.dumps({key: result[key] for key in ("outcomes", "checks", "memory_growth", "seconds_to_end")}, indent=1))
    sys.exit(0 if all(result["checks"].values()) else 1)


def _soak(run: Run, given: argparse.Namespace) -> dict[str, Any]:
    rows = [list(row) for row in bench_stage.held_out_prompts(run)]
    command = [sys.executable, "-m", "qkit", "serve", str(run.root), "--json", "--set", "serve.port=0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout
    lines = [process.stdout.readline()]
    while lines[-1] not in ("}\n", ""):
        lines.append(process.stdout.readline())
    described = json.loads("".join(lines))
    children = psutil.Process(process.pid).children(recursive=True)
    shared = {Path(name) for child in children for name in _shared_memory(child)}
    begin = time.monotonic()
    soak = Soak(described["url"], described["model"], rows, given.at_once, given.seed)
    meter = Meter(process.pid)
    try:
        to_end = asyncio.run(_load(soak, process, given))
    finally:
        process.kill()
        process.wait()
        meter.stop()
    series = [[s.seconds, s.rss_bytes] for s in meter.samples if s.seconds < time.monotonic() - begin - to_end]
    _, left = psutil.wait_procs(children, timeout=5)
    growth = _growth(series)
    return {
        "command": f"python benchmarks/soak.py {' '.join(sys.argv[1:])}",
        "date": dt.date.today().isoformat(),
        "seconds": time.monotonic() - begin,
        "model": source.resolve(run.recipe.model).name,
        "outcomes": dict(soak.outcomes.most_common()),
        "seconds_to_end": to_end,
        "memory_growth": growth,
        "memory": series,
        "checks": {
            "no accepted request is lost without an error": not [o for o in soak.outcomes if o not in GOOD],
            "no process is left": not left and to_end < ENDS_SECONDS,
            "no shared memory is left": not [path for path in shared if path.exists()],
            f"memory grows by no more than {100 * GROWTH:g} %": growth <= GROWTH,
        },
        "environment": environment(detect().to_dict()),
    }


if __name__ == "__main__":
    main()
