"""The stage `bench`: the same prompts through each runtime, one request at a time and several at once.

TTFT: from sending a request to its first token. TPOT: mean time of the tokens after the first. Output tokens per second: over all requests
of a round, from the first one sent to the last token. A round is `concurrency` requests at once; the first round of each is a warm-up.

    bench/RUNTIME-cN.json   one record each
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from qkit import scoring
from qkit.artifacts import Artifact, artifacts, open_artifact
from qkit.device import detect
from qkit.errors import DataError
from qkit.run import Run, write_json
from qkit.runtime import Runtime, Timing


def run(run: Run, out: Path) -> None:
    """Bench every runtime of the recipe at every concurrency."""
    section = run.recipe.bench
    rows = scoring.read_held_out(run.need("data", "test.parquet")).rows
    if not rows:
        raise DataError("data.test names no rows, so there are no prompts to bench with: give it a source")
    prompts = [row.prompt for row in rows]
    by_name = {artifact.name: artifact for artifact in artifacts(run)}
    for name in run.progress.track(section.runtimes, "bench", len(section.runtimes)):
        run.progress.say(f"bench: {name}")
        _bench(run, by_name["merged" if name == "transformers" else name], prompts, out)


def _bench(run: Run, artifact: Artifact, prompts: Sequence[Sequence[int]], out: Path) -> None:
    section = run.recipe.bench
    begin = time.perf_counter()
    with open_artifact(run, artifact, "bench") as runtime:
        startup = getattr(runtime, "startup_seconds", time.perf_counter() - begin)
        for concurrency in section.concurrency:
            rounds = _rounds(runtime, prompts, concurrency, section.output_tokens, section.repeats)
            record = {
                "runtime": artifact.runtime,
                "artifact": artifact.name,
                "concurrency": concurrency,
                **_figures(rounds),
                "peak_bytes": runtime.memory_bytes(),
                "meter": "rss_tree" if artifact.runtime == "vllm" else detect().meter,
                "startup_seconds": startup,
                "disk_bytes": sum(f.stat().st_size for f in artifact.path.rglob("*") if f.is_file()),
                "repeats": section.repeats,
                "prompts": concurrency * section.repeats,
                "prompt_tokens": median(len(prompt) for prompt in prompts),
                "output_tokens": section.output_tokens,
            }
            write_json(out / f"{artifact.name}-c{concurrency}.json", record)


def _rounds(
    runtime: Runtime, prompts: Sequence[Sequence[int]], concurrency: int, output_tokens: int, repeats: int
) -> list[list[Timing]]:
    """`repeats` rounds of `concurrency` requests, after one round that is thrown away; each round has other prompts."""
    rounds = []
    for number in range(repeats + 1):
        picked = [prompts[(number * concurrency + i) % len(prompts)] for i in range(concurrency)]
        rounds.append(runtime.timed(picked, output_tokens))
    return rounds[1:]


def _figures(rounds: Sequence[Sequence[Timing]]) -> dict[str, Any]:
    """Percentiles over all requests; throughput as the median over rounds."""
    requests = [timing for timings in rounds for timing in timings]
    throughput = [
        sum(len(t.token_seconds) for t in timings) / max(t.e2e_seconds for t in timings) for timings in rounds
    ]
    return {
        "ttft_seconds": percentiles([t.ttft_seconds for t in requests]),
        "tpot_seconds": percentiles([t.tpot_seconds for t in requests]),
        "e2e_seconds": percentiles([t.e2e_seconds for t in requests]),
        "output_tokens_per_second": median(throughput),
        "output_tokens_per_second_range": [min(throughput), max(throughput)],
    }


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """p50 and p99, by linear interpolation between the two nearest values."""
    ordered = sorted(values)

    def at(quantile: float) -> float:
        place = quantile * (len(ordered) - 1)
        low = int(place)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (ordered[high] - ordered[low]) * (place - low)

    return {"p50": at(0.5), "p99": at(0.99)}
