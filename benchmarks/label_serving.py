"""Texts per second of `qkit serve` and of transformers' pipeline in fp32, both asked by as many clients at once, in turn.

    qkit run recipes/intent-banking77.yaml
    python benchmarks/label_serving.py runs/intent-banking77 --clients 1 8 32

server     the run's export, by `qkit serve`, over HTTP: one text a request, each client with a connection of its own
pipeline   RUN/merge in this process, without any HTTP: each client calls it with one text; torch has all cores

A client asks again as soon as it has its answer. Each way is measured --rounds times for --seconds, in turn, after a warm-up; figures are
medians over rounds. Latencies are of the round with the median rate. The labels of both ways are compared on all texts that both were asked.
"""

from __future__ import annotations

import argparse
import datetime as dt
import http.client
import json
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any
from urllib.parse import urlsplit

from qkit.core.device import detect
from qkit.core.files import write_json
from qkit.measure.held_out import held_out_of
from qkit.run.directory import Run
from qkit.run.environment import environment

HERE = Path(__file__).resolve().parent
Ask = Callable[[str], str]  # text -> label


@dataclass
class Round:
    """What the clients of one round saw. `seconds`: of each request; `labels`: by text."""

    wall: float = 0.0
    seconds: list[float] = field(default_factory=list)
    labels: dict[str, str] = field(default_factory=dict)

    @property
    def rate(self) -> float:
        return len(self.seconds) / self.wall


def main() -> None:
    given = _arguments()
    run = Run.open(given.run)
    texts = [record["text"] for record in held_out_of(run).records]
    rounds: dict[str, list[Round]] = {}
    with served(given.run, given.export) as connect, piped(run.folder("merge")) as pipeline:
        for clients in given.clients:
            for turn in range(given.rounds + 1):
                for way, client in (("server", connect), ("pipeline", pipeline)):
                    one = measured(client, texts, clients, given.seconds if turn else given.seconds / 4)
                    if turn:
                        rounds.setdefault(f"{way} {clients}", []).append(one)
    figures = {name: _figures(some) for name, some in rounds.items()}
    record = {
        "what": "texts per second by qkit serve and by transformers.pipeline in fp32, asked by as many clients",
        "command": shlex.join(["python", "benchmarks/label_serving.py", *sys.argv[1:]]),
        "date": dt.date.today().isoformat(),
        "environment": environment(detect().to_dict()),
        "export": given.export,
        "model": run.recipe.model.source,
        "characters": {"median": median(map(len, texts)), "most": max(map(len, texts))},
        "figures": figures,
        "server / pipeline": {
            str(clients): figures[f"server {clients}"]["texts_per_second"] / figures[f"pipeline {clients}"]["texts_per_second"]
            for clients in given.clients
        },
        "same_label": _same(rounds),
    }  # fmt: skip
    write_json(given.out, record)
    print(json.dumps({name: record[name] for name in ("figures", "server / pipeline", "same_label")}, indent=2))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="a finished run of task=classify")
    parser.add_argument("--export", default="onnx-int8")
    parser.add_argument("--clients", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=10.0, help="of a round")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "label_serving.json")
    return parser.parse_args()


@contextmanager
def served(run: Path, export: str) -> Iterator[Callable[[], Ask]]:
    """Start `qkit serve`; yield what makes a client of it."""
    command = [sys.executable, "-m", "qkit", "serve", str(run), "--json", "--artifact", export, "--set", "serve.port=0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        ready = _document(process.stdout)
        address = urlsplit(ready["url"])

        def connect() -> Ask:
            connection = http.client.HTTPConnection(str(address.hostname), address.port)
            headers = {"Content-Type": "application/json"}

            def ask(text: str) -> str:
                body = json.dumps({"model": ready["model"], "input": text})
                connection.request("POST", "/classify", body, headers)
                answer = json.loads(connection.getresponse().read())
                return str(answer["data"][0]["label"])

            return ask

        yield connect
        process.terminate()


def _document(lines: Iterable[str]) -> dict[str, Any]:
    """The JSON document that a program prints first, over several lines."""
    text = ""
    for line in lines:
        text += line
        if line.rstrip() == "}":
            break
    document: dict[str, Any] = json.loads(text)
    return document


@contextmanager
def piped(folder: Path) -> Iterator[Callable[[], Ask]]:
    """Open transformers' pipeline; yield what makes a client of it. All clients share it, as threads of a web server would."""
    import transformers

    pipe = transformers.pipeline("text-classification", model=str(folder), device="cpu")

    def ask(text: str) -> str:
        return str(pipe(text, truncation=True)[0]["label"])

    yield lambda: ask


def measured(make: Callable[[], Ask], texts: Sequence[str], clients: int, seconds: float) -> Round:
    """Let `clients` threads ask for that long, each from a place of its own in the texts."""
    result, lock, begin = Round(), threading.Lock(), time.perf_counter()

    def client(number: int) -> None:
        ask, place = make(), number * len(texts) // clients
        times, labels = [], {}
        while (start := time.perf_counter()) < begin + seconds:
            text = texts[place % len(texts)]
            labels[text] = ask(text)
            times.append(time.perf_counter() - start)
            place += 1
        with lock:
            result.seconds.extend(times)
            result.labels.update(labels)

    threads = [threading.Thread(target=client, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    result.wall = time.perf_counter() - begin
    return result


def _figures(rounds: Sequence[Round]) -> dict[str, Any]:
    middle = sorted(rounds, key=lambda one: one.rate)[len(rounds) // 2]
    latencies = sorted(middle.seconds)
    return {
        "texts_per_second": median(one.rate for one in rounds),
        "texts_per_second_range": [min(one.rate for one in rounds), max(one.rate for one in rounds)],
        "p50_seconds": latencies[len(latencies) // 2],
        "p99_seconds": latencies[int(0.99 * (len(latencies) - 1))],
        "requests": len(latencies),
    }


def _same(rounds: dict[str, list[Round]]) -> dict[str, Any]:
    labels: dict[str, dict[str, str]] = {}
    for name, some in rounds.items():
        for one in some:
            labels.setdefault(name.split()[0], {}).update(one.labels)
    both = labels["server"].keys() & labels["pipeline"].keys()
    return {
        "texts": len(both),
        "share": sum(labels["server"][text] == labels["pipeline"][text] for text in both) / len(both),
    }


if __name__ == "__main__":
    main()
