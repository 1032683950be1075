"""The stage `bench`: the same prompts through each runtime, under loads that tell what it does when it is asked by one and by many.

A closed loop holds `concurrency` requests in the air; in an open loop they come as a Poisson process, whatever the server is doing.
Each load is measured `repeats` times after a round that is thrown away. bench_record.py says what the figures mean, bench_load.py
where load comes from.

    bench/ARTIFACT-cN.json     one record for each closed loop
    bench/ARTIFACT-rSHARE.json one for each open loop, at that share of the best throughput (with bench.sweep)
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from qkit.bench import meter as bench_meter
from qkit.bench import record as bench_record
from qkit.bench.load import DirectLoad, HeldOutPrompts, Load, LoadSource, Prompt
from qkit.bench.record import Repeat, Slo
from qkit.bench.tool import LoadTool
from qkit.core.device import detect
from qkit.core.errors import DataError
from qkit.core.files import write_json
from qkit.measure import held_out
from qkit.measure.artifacts import MERGED, Artifact, artifacts, open_artifact
from qkit.measure.evidence import cost_of, measured
from qkit.model import tokenizer as model_tokenizer
from qkit.plugins.runtime import Runtime
from qkit.recipe.schema import Bench
from qkit.run.directory import Run
from qkit.run.environment import environment

MIN_GROWTH = 1.05  # a closed loop that gives less than this over the one before it has found the most there is
MAX_CONCURRENCY = 256  # requests at once
NO_REMOTE_ENERGY = "the server may be on another machine, whose energy is not read"
OPEN_LOOP_SHARES = (0.25, 0.5, 0.75)  # of the best closed loop's requests per second, for open loops


@dataclass(frozen=True)
class Measurement:
    """A load and what it came to. `share`: of an open loop, the share of the best throughput that its rate is."""

    load: Load
    repeats: Sequence[Repeat]
    memory: Mapping[str, Any]
    energy: Mapping[str, Any]
    share: float | None = None

    @property
    def name(self) -> str:
        return f"c{self.load.concurrency}" if self.share is None else f"r{self.share:g}"

    def rate(self, name: str) -> float:
        return median(bench_record.RATES[name](repeat) for repeat in self.repeats)


def run(run: Run, out: Path) -> None:
    """Bench every runtime of the recipe.

    Raises:
        DataError: there are no held-out rows to take prompts from.
        ServerError: a server answered no request, or counts other tokens than the rows have.
    """
    section = run.recipe.bench
    rows = held_out_prompts(run)
    by_name = {artifact.name: artifact for artifact in artifacts(run)}
    for name in run.progress.track(section.runtimes, "bench", len(section.runtimes)):
        run.progress.say(f"bench: {name}")
        bench_artifact(run, by_name[MERGED if name == "transformers" else name], rows, out)


def held_out_prompts(run: Run) -> list[Sequence[int]]:
    """The prompts of the run's test rows, as token ids."""
    rows = held_out.read_held_out(run.need("data", "test.parquet")).rows
    if not rows:
        raise DataError("data.test names no rows, so there are no prompts to bench with: give it a source")
    return [row.prompt for row in rows]


def bench_artifact(run: Run, artifact: Artifact, rows: Sequence[Sequence[int]], out: Path) -> None:
    """One artifact under every load of the recipe; a record each into `out`."""
    begin = time.perf_counter()
    with ExitStack() as stack:
        runtime = stack.enter_context(open_artifact(run, artifact, "bench"))
        startup = getattr(runtime, "startup_seconds", time.perf_counter() - begin)
        server: Mapping[str, Any] | None = getattr(runtime, "server_description", None)
        source = stack.enter_context(_tool(run, server, rows)) if server else DirectLoad(runtime, rows)
        metadata = {**_metadata(run, artifact), "startup_seconds": startup, "argv": server["argv"] if server else None}
        for measured in measure(source, run.recipe.bench, server["pid"] if server else os.getpid()):
            known = {**metadata, **_peak(runtime, artifact)}
            written = record(measured, source, run.recipe.bench, run.recipe.seed, known)
            write_json(out / f"{artifact.name}-{measured.name}.json", written)


def _tool(run: Run, server: Mapping[str, Any], rows: Sequence[Sequence[int]]) -> LoadTool:
    prompts = text_prompts(model_tokenizer.tokenizer_of(run.recipe.model), rows)
    log = run.log("bench").with_name("bench-load.log")
    return LoadTool(server["url"], server["model"], tokenizer_folder(run), prompts, run.recipe.seed, log)


def tokenizer_folder(run: Run) -> Path:
    """Where the load tool finds the run's tokenizer: the merged model's folder."""
    return run.need("merge", "config.json").parent


def text_prompts(tokenizer: Any, rows: Sequence[Sequence[int]]) -> HeldOutPrompts:
    """Prompts as text that is tokenized to the very same ids.

    Raises:
        DataError: none of them is.
    """
    texts = tokenizer.batch_decode(rows, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    back = tokenizer(texts, add_special_tokens=False).input_ids
    pairs = zip(texts, rows, back, strict=True)
    true = tuple(Prompt(text, len(ids)) for text, ids, again in pairs if list(ids) == again)
    if not true:
        raise DataError(
            "no held-out prompt keeps its token ids when it is sent as text, so a server cannot be benched with them"
        )
    return HeldOutPrompts(true, len(rows) - len(true))


# --- measuring --------------------------------------------------------------------------------------------------------


def measure(source: LoadSource, section: Bench, pid: int | None) -> Iterator[Measurement]:
    """Every load of a recipe's section. `pid`: whose memory is watched, with all below it; None: nobody's."""
    if section.sweep:
        yield from _sweep(source, section, pid)
        return
    for concurrency in section.concurrency:
        yield _measurement(source, _closed(section, concurrency), section, pid)


def _sweep(source: LoadSource, section: Bench, pid: int | None) -> Iterator[Measurement]:
    """Closed loops of 1, 2, 4 ... until throughput stops growing; then open loops below the best of them, for what has a queue."""
    best: Measurement | None = None
    concurrency = 1
    while concurrency <= MAX_CONCURRENCY:
        found = _measurement(source, _closed(section, concurrency), section, pid)
        yield found
        if best and _speed(found) < MIN_GROWTH * _speed(best):
            best = max(best, found, key=_speed)
            break
        best, concurrency = found, 2 * concurrency
    if best is None or not source.queues:
        return
    for share in OPEN_LOOP_SHARES:
        rate = share * best.rate("requests_per_second")
        load = Load(best.load.requests, section.output_tokens, request_rate=rate)
        yield _measurement(source, load, section, pid, share)


def _speed(measured: Measurement) -> float:
    return measured.rate("output_tokens_per_second")


def _closed(section: Bench, concurrency: int) -> Load:
    return Load(concurrency * section.rounds, section.output_tokens, concurrency=concurrency)


def _measurement(
    source: LoadSource, load: Load, section: Bench, pid: int | None, share: float | None = None
) -> Measurement:
    """A round thrown away, then the repeats, each with prompts of its own."""
    source.measure(load.warm_up(), 0)
    with bench_meter.Meter(pid) as meter:
        before = bench_meter.energy() if pid is not None else NO_REMOTE_ENERGY
        repeats = [source.measure(load, number) for number in range(1, section.repeats + 1)]
        after = bench_meter.energy() if pid is not None else NO_REMOTE_ENERGY
        meter.sample()
    tokens = sum(request.tokens for repeat in repeats for request in repeat.requests)
    return Measurement(load, repeats, meter.to_dict(), bench_meter.energy_spent(before, after, tokens), share)


# --- the record -------------------------------------------------------------------------------------------------------


def record(
    measured: Measurement, source: LoadSource, section: Bench, seed: int, metadata: Mapping[str, Any]
) -> dict[str, Any]:
    """One record, as bench.schema.json describes it. `about`: what was benched, and where it comes from."""
    load, requests = measured.load, [r for repeat in measured.repeats for r in repeat.requests]
    found = bench_record.figures(measured.repeats, _slo(section))
    return {
        "schema_version": bench_record.SCHEMA_VERSION,
        **metadata,
        "concurrency": load.concurrency,
        **found,
        "repeats": section.repeats,
        "prompts": len(requests),
        "prompt_tokens": median(request.prompt_tokens for request in requests),
        "output_tokens": load.output_tokens,
        "load": {
            "tool": source.name,
            "command": source.command,
            "kind": load.kind if source.queues else "direct",
            "request_rate": load.request_rate,
            "share": measured.share,
            "requests": load.requests,
            "prompts": source.description,
            "warm_up_requests": load.warm_up().requests,
            "seed": seed,
        },
        "memory": measured.memory,
        "energy": measured.energy,
        "cost": bench_record.cost(section.price_per_hour, found["output_tokens_per_second"]),
        "environment": bench_record.with_hash(
            {**environment(detect().to_dict()), "driver": bench_meter.driver_version()}
        ),
    }


def _slo(section: Bench) -> Slo:
    return Slo(section.slo_ttft_seconds, section.slo_tpot_seconds, section.slo_e2e_seconds)


def _peak(runtime: Runtime, artifact: Artifact) -> dict[str, Any]:
    meter = "rss_tree" if artifact.runtime == "vllm" else detect().meter
    return {"peak_bytes": runtime.memory_bytes(), "meter": meter}


def _metadata(run: Run, artifact: Artifact) -> dict[str, Any]:
    """What is benched, and what the same run knows of it: how it was trained, and how good it is."""
    outputs = {**run.outputs("merge"), **run.outputs("export")}
    found, training = measured(run), cost_of(run.manifest()["stages"].get("train"))
    score, distance = found.scores.get(artifact.name, {}), found.parity.get(artifact.name, {})
    return {
        "runtime": artifact.runtime,
        "artifact": artifact.name,
        "model_sha256": bench_record.artifact_sha256(outputs, f"{artifact.path.relative_to(run.root)}/"),
        "disk_bytes": artifact.disk_bytes,
        "training": training,
        "quality": {
            "metric": found.metric,
            **{key: score.get(key) for key in ("score", "low", "high")},
            **{key: distance.get(key) for key in ("kl_mean", "top1")},
        },
    }
