"""The stage `bench`: sends the same prompts to each runtime, under loads from a single client to many.

A closed loop keeps `concurrency` requests in flight; in an open loop, requests arrive as a Poisson process whatever the server is doing.
Each load is measured `repeats` times, after a warm-up round that is not counted. record.py defines the figures; load.py generates the load.

    bench/ARTIFACT-cN.json      one record per closed loop
    bench/ARTIFACT-rSHARE.json  one record per open loop, at that share of the best request rate (with bench.sweep)
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from qkit.bench import labelled
from qkit.bench import meter as bench_meter
from qkit.bench import record as bench_record
from qkit.bench.load import DirectLoad, HeldOutPrompts, Load, LoadSource, Prompt, Subject
from qkit.bench.record import Repeat, Slo
from qkit.bench.tool import LoadTool
from qkit.core.device import detect
from qkit.core.errors import DataError
from qkit.core.files import write_json
from qkit.measure import held_out
from qkit.measure.artifacts import Artifact, artifacts, open_artifact
from qkit.measure.evidence import cost_of, read_evidence
from qkit.model import tokenizer as model_tokenizer
from qkit.plan import deployable
from qkit.plugins.task import open_task
from qkit.recipe.registry import MERGED
from qkit.recipe.schema import Bench
from qkit.run.directory import Run
from qkit.run.environment import environment

MIN_GROWTH = 1.05  # the closed loops of a sweep end when throughput grows by less than this factor
MAX_CONCURRENCY = 256  # of a sweep
NO_REMOTE_ENERGY = "the server may run on another machine, whose energy cannot be read"
OPEN_LOOP_SHARES = (0.25, 0.5, 0.75)  # rates of the open loops, as shares of the best closed loop's requests per second


@dataclass(frozen=True)
class Measurement:
    """A load and its results. `share`: for an open loop, its rate as a share of the best request rate."""

    load: Load
    repeats: Sequence[Repeat]
    memory: Mapping[str, Any]
    energy: Mapping[str, Any]
    share: float | None = None

    @property
    def name(self) -> str:
        return f"c{self.load.concurrency}" if self.share is None else f"r{self.share:g}"

    def rate(self, name: str) -> float:
        """The median over repeats of a rate named in record.RATES, per second."""
        return median(bench_record.RATES[name](repeat) for repeat in self.repeats)


def run(run: Run, out: Path) -> None:
    """Bench every runtime of the recipe.

    Raises:
        DataError: there are no held-out rows to take prompts or texts from.
        ServerError: every request to a server failed, or its token counts of the prompts differ from the rows'.
    """
    section = run.recipe.bench
    if not section.runtimes:
        return
    deployable.check(run.recipe)
    open_subject, unit = _opener(run)
    for name in run.progress.track(section.runtimes, "bench", len(section.runtimes)):
        run.progress.notify(f"bench: {name}")
        with open_subject(name) as subject:
            bench_subject(run, subject, unit, out)


def _opener(run: Run) -> tuple[Callable[[str], AbstractContextManager[Subject]], str]:
    """What opens an entry of bench.runtimes, and the unit of an answer: tokens, or texts."""
    if not open_task(run.recipe.task).HEAD.generates:
        return partial(labelled.opened, run), labelled.TEXTS
    rows = held_out_prompts(run)
    by_name = {artifact.name: artifact for artifact in artifacts(run)}
    return lambda name: _generating(run, by_name[MERGED if name == "transformers" else name], rows), "tokens"


def held_out_prompts(run: Run) -> list[Sequence[int]]:
    """The prompts of the run's test rows, as token ids."""
    rows = held_out.held_out_of(run).rows
    if not rows:
        raise DataError("data.test has no rows, so there are no prompts to bench with; add a source to data.test")
    return [row.prompt for row in rows]


@contextmanager
def _generating(run: Run, artifact: Artifact, rows: Sequence[Sequence[int]]) -> Iterator[Subject]:
    """An artifact that generates text, opened by its runtime, with the load for it."""
    begin = time.perf_counter()
    with ExitStack() as stack:
        runtime = stack.enter_context(open_artifact(run, artifact, "bench"))
        startup = getattr(runtime, "startup_seconds", time.perf_counter() - begin)
        server: Mapping[str, Any] | None = getattr(runtime, "server_description", None)
        source = stack.enter_context(_tool(run, server, rows)) if server else DirectLoad(runtime, rows)
        pid, argv = (server["pid"], server["argv"]) if server else (os.getpid(), None)
        meter = "rss_tree" if artifact.runtime == "vllm" else detect().meter
        yield Subject(artifact.name, artifact, source, pid, startup, argv, runtime.memory_bytes, meter)


def bench_subject(run: Run, subject: Subject, unit: str, out: Path) -> None:
    """Bench one subject under every load of the recipe; write one record per load to `out`."""
    metadata = {
        **_metadata(run, subject.artifact),
        "artifact": subject.name,
        "startup_seconds": subject.startup_seconds,
        "argv": subject.argv,
        "unit": unit,
    }
    for measurement in measure(subject.source, run.recipe.bench, subject.pid):
        known = {**metadata, "peak_bytes": subject.peak(), "meter": subject.meter}
        written = record(measurement, subject.source, run.recipe.bench, run.recipe.seed, known)
        write_json(out / f"{subject.name}-{measurement.name}.json", written)


def _tool(run: Run, server: Mapping[str, Any], rows: Sequence[Sequence[int]]) -> LoadTool:
    prompts = text_prompts(model_tokenizer.tokenizer_of(run.recipe.model), rows)
    log = run.log("bench").with_name("bench-load.log")
    return LoadTool(server["url"], server["model"], tokenizer_folder(run), prompts, run.recipe.seed, log)


def tokenizer_folder(run: Run) -> Path:
    """The folder from which the load tool loads the run's tokenizer: the merged model's."""
    return run.need("merge", "config.json").parent


def text_prompts(tokenizer: Any, rows: Sequence[Sequence[int]]) -> HeldOutPrompts:
    """Decode rows of token ids to prompts, leaving out rows whose text tokenizes to other ids.

    Raises:
        DataError: no row is left.
    """
    texts = tokenizer.batch_decode(rows, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    encoded = tokenizer(texts, add_special_tokens=False).input_ids
    triples = zip(texts, rows, encoded, strict=True)
    prompts = tuple(Prompt(text, len(ids)) for text, ids, encoded_ids in triples if list(ids) == encoded_ids)
    if not prompts:
        raise DataError(
            "every held-out prompt changes its token ids when it is sent as text, so a server cannot be benched with them"
        )
    return HeldOutPrompts(prompts, len(rows) - len(prompts))


# --- measuring --------------------------------------------------------------------------------------------------------


def measure(source: LoadSource, section: Bench, pid: int | None) -> Iterator[Measurement]:
    """Yield a measurement of every load of a recipe's bench section.

    `pid`: the process whose memory is sampled, with its children; None samples no memory and reads no energy.
    """
    if section.sweep:
        yield from _sweep(source, section, pid)
        return
    for concurrency in section.concurrency:
        yield _measurement(source, _closed(section, concurrency), section, pid)


def _sweep(source: LoadSource, section: Bench, pid: int | None) -> Iterator[Measurement]:
    """Closed loops of 1, 2, 4, ... until throughput stops growing; then, if requests can queue, open loops below the best rate."""
    best: Measurement | None = None
    concurrency = 1
    while concurrency <= MAX_CONCURRENCY:
        latest = _measurement(source, _closed(section, concurrency), section, pid)
        yield latest
        if best and _speed(latest) < MIN_GROWTH * _speed(best):
            best = max(best, latest, key=_speed)
            break
        best, concurrency = latest, 2 * concurrency
    if best is None or not source.queues:
        return
    for share in OPEN_LOOP_SHARES:
        rate = share * best.rate("requests_per_second")
        load = Load(best.load.requests, section.output_tokens, request_rate=rate)
        yield _measurement(source, load, section, pid, share)


def _speed(measurement: Measurement) -> float:
    return measurement.rate("output_tokens_per_second")


def _closed(section: Bench, concurrency: int) -> Load:
    return Load(concurrency * section.rounds, section.output_tokens, concurrency=concurrency)


def _measurement(
    source: LoadSource, load: Load, section: Bench, pid: int | None, share: float | None = None
) -> Measurement:
    """Run the warm-up round, then the repeats, each with its own prompts."""
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
    measurement: Measurement, source: LoadSource, section: Bench, seed: int, metadata: Mapping[str, Any]
) -> dict[str, Any]:
    """One record, as bench.schema.json describes it. `metadata`: what was benched, as `_metadata` or any_server.run has it."""
    load, requests = measurement.load, [r for repeat in measurement.repeats for r in repeat.requests]
    figures = bench_record.figures(measurement.repeats, _slo(section))
    return {
        "schema_version": bench_record.SCHEMA_VERSION,
        **metadata,
        "concurrency": load.concurrency,
        **figures,
        "repeats": section.repeats,
        "prompts": len(requests),
        "prompt_tokens": median(request.prompt_tokens for request in requests),
        "output_tokens": load.output_tokens,
        "load": {
            "tool": source.name,
            "command": source.command,
            "kind": load.kind if source.queues else "direct",
            "request_rate": load.request_rate,
            "share": measurement.share,
            "requests": load.requests,
            "prompts": source.description,
            "warm_up_requests": load.warm_up().requests,
            "seed": seed,
        },
        "memory": measurement.memory,
        "energy": measurement.energy,
        "cost": bench_record.cost(section.price_per_hour, figures["output_tokens_per_second"]),
        "environment": bench_record.with_hash(
            {**environment(detect().to_dict()), "driver": bench_meter.driver_version()}
        ),
    }


def _slo(section: Bench) -> Slo:
    return Slo(section.slo_ttft_seconds, section.slo_tpot_seconds, section.slo_e2e_seconds)


def _metadata(run: Run, artifact: Artifact) -> dict[str, Any]:
    """The fields of a record that describe the artifact: its identity, the cost of its training, and its quality."""
    outputs = {**run.outputs("merge"), **run.outputs("export")}
    evidence, training = read_evidence(run.root), cost_of(run.manifest()["stages"].get("train"))
    score, distance = evidence.scores.get(artifact.name, {}), evidence.parity.get(artifact.name, {})
    return {
        "runtime": artifact.runtime,
        "artifact": artifact.name,
        "model_sha256": bench_record.artifact_sha256(outputs, f"{artifact.path.relative_to(run.root)}/"),
        "disk_bytes": artifact.disk_bytes,
        "training": training,
        "quality": {
            "metric": evidence.metric,
            **{key: score.get(key) for key in ("score", "low", "high")},
            **{key: distance.get(key) for key in ("kl_mean", "top1")},
        },
    }
