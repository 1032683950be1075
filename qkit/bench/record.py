"""The results of a bench: timed requests, the standard figures computed from them, and the record that holds the figures.

TTFT: time from sending a request to its first chunk that holds a token (content, reasoning or a tool call). ITL: time between consecutive
chunks of that kind, as the client receives them. TPOT: mean time per token after the first, (E2E - TTFT) / (tokens - 1). E2E: time to the
last token. Throughput: over a whole repeat, from sending its first request to receiving its last answer. Goodput: requests per second that
met every limit of the SLO. Doubts: anomalies in the timings, because of which figures may be wrong. bench.schema.json describes a record.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import mean, median, quantiles
from typing import Any

from qkit.core.figures import steady

SCHEMA_VERSION = 1
OUTLIER_FACTOR = 3  # a gap is an outlier if it is so many times longer or shorter than all other gaps of its answer
MIN_GAPS = 3  # answers with fewer gaps are not searched for outliers
PERCENTILES = {"p50": 50, "p90": 90, "p99": 99}
MILLION = 1_000_000


@dataclass(frozen=True)
class Request:
    """An answered request; times in seconds.

    `gaps`: between its chunks, each of which holds one token or more. `tokens`: output tokens, as counted by the server.
    """

    ttft: float
    gaps: tuple[float, ...]
    prompt_tokens: int
    tokens: int

    @property
    def e2e(self) -> float:
        return self.ttft + sum(self.gaps)

    @property
    def tpot(self) -> float:
        """Seconds per token after the first; 0 for a single token."""
        return (self.e2e - self.ttft) / (self.tokens - 1) if self.tokens > 1 else 0.0


@dataclass(frozen=True)
class Repeat:
    """One measurement of a load. `seconds`: its duration; `errors`: one message per failed request; `doubts`: anomaly -> number of answers."""

    seconds: float
    requests: tuple[Request, ...]
    errors: tuple[str, ...] = ()
    tool_cpu_seconds: float | None = None
    doubts: Mapping[str, int] = field(default_factory=dict)

    def per_second(self, count: float) -> float:
        return count / self.seconds


@dataclass(frozen=True)
class Slo:
    """Limits in seconds that a good request meets; None: no limit."""

    ttft_seconds: float | None = None
    tpot_seconds: float | None = None
    e2e_seconds: float | None = None

    @property
    def limits(self) -> dict[str, float]:
        limits = {"ttft_seconds": self.ttft_seconds, "tpot_seconds": self.tpot_seconds, "e2e_seconds": self.e2e_seconds}
        return {name: limit for name, limit in limits.items() if limit is not None}

    def met(self, request: Request) -> bool:
        return all(LATENCIES[name](request) <= limit for name, limit in self.limits.items())


LATENCIES: Mapping[str, Callable[[Request], float]] = {
    "ttft_seconds": lambda request: request.ttft,
    "tpot_seconds": lambda request: request.tpot,
    "e2e_seconds": lambda request: request.e2e,
}
# Which gap of an answer may be an outlier, its index, and the likely cause.
GAP_CHECKS = (
    (
        "first",
        0,
        "the first chunk may hold no token, or the server may do other work after it; TTFT and TPOT may be wrong",
    ),
    ("last", -1, "it may include tokens without text, or no token at all; TPOT and the end-to-end time may be wrong"),
)
RATES: Mapping[str, Callable[[Repeat], float]] = {
    "output_tokens_per_second": lambda repeat: repeat.per_second(sum(r.tokens for r in repeat.requests)),
    "total_tokens_per_second": lambda repeat: repeat.per_second(
        sum(r.tokens + r.prompt_tokens for r in repeat.requests)
    ),
    "requests_per_second": lambda repeat: repeat.per_second(len(repeat.requests)),
}


def figures(repeats: Sequence[Repeat], slo: Slo | None = None) -> dict[str, Any]:
    """The figures of a record: latencies over the requests of all repeats, throughput as the median over repeats with its range."""
    requests = [request for repeat in repeats for request in repeat.requests]
    rates = {name: [rate(repeat) for repeat in repeats] for name, rate in RATES.items()}
    throughput = rates["output_tokens_per_second"]
    return {
        **{name: distribution([latency(r) for r in requests]) for name, latency in LATENCIES.items()},
        "itl_seconds": distribution([gap for r in requests for gap in r.gaps]),
        **{name: median(values) for name, values in rates.items()},
        "output_tokens_per_second_range": [min(throughput), max(throughput)],
        "goodput_per_second": median(_goodput(repeat, slo) for repeat in repeats) if slo and slo.limits else None,
        "slo": slo.limits if slo and slo.limits else None,
        "failed_requests": sum(len(repeat.errors) for repeat in repeats),
        "chunks": sum(1 + len(r.gaps) for r in requests),
        "tokens": sum(r.tokens for r in requests),
        "doubts": list(_doubts(repeats, requests)),
        "by_repeat": [_repeat_figures(repeat) for repeat in repeats],
        "steady": len(repeats) > 1 and all(steady(values) for values in _compared_figures(repeats).values()),
    }


def _doubts(repeats: Sequence[Repeat], requests: Sequence[Request]) -> Iterator[str]:
    """Yield one line per anomaly in the timings of the answers."""
    counts: Counter[str] = Counter()
    for repeat in repeats:
        counts.update(repeat.doubts)
    yield from (f"{count} of {len(requests)} {anomaly}" for anomaly, count in counts.items() if count)
    at_once = sum(request.tokens > 1 and not any(request.gaps) for request in requests)
    if 2 * at_once > len(requests):
        yield f"{at_once} of {len(requests)} answers arrived in one piece: their TTFT equals the end-to-end time, and they have no TPOT"
    several = [request.gaps for request in requests if len(request.gaps) >= MIN_GAPS]
    for which, index, cause in GAP_CHECKS:
        outliers = [gaps for gaps in several if _is_outlier(gaps, index)]
        if 2 * len(outliers) > len(several):
            gap, others = (f"{median(1000 * s for s in seconds):,.1f} ms" for seconds in _split_gaps(outliers, index))
            yield (
                f"the {which} gap between chunks ({gap}) differs greatly from all others ({others}) in {len(outliers)} of "
                f"{len(requests)} answers: {cause}"
            )


def _is_outlier(gaps: Sequence[float], index: int) -> bool:
    """Whether the first (0) or last (-1) gap is unlike all others; a short last gap is normal."""
    others = _other_gaps(gaps, index)
    return gaps[index] > OUTLIER_FACTOR * max(others) or (index == 0 and OUTLIER_FACTOR * gaps[index] < min(others))


def _split_gaps(answers: Sequence[Sequence[float]], index: int) -> tuple[list[float], list[float]]:
    """The first (0) or last (-1) gap of each answer, and all other gaps."""
    return [gaps[index] for gaps in answers], [gap for gaps in answers for gap in _other_gaps(gaps, index)]


def _other_gaps(gaps: Sequence[float], index: int) -> Sequence[float]:
    return gaps[1:] if index == 0 else gaps[:-1]


def _goodput(repeat: Repeat, slo: Slo) -> float:
    return repeat.per_second(sum(slo.met(request) for request in repeat.requests))


def _repeat_figures(repeat: Repeat) -> dict[str, Any]:
    """The figures by which two records are compared, and the CPU seconds of the load tool."""
    return {
        "seconds": repeat.seconds,
        "requests": len(repeat.requests),
        **{name: rate(repeat) for name, rate in RATES.items()},
        **{name: median(map(latency, repeat.requests)) for name, latency in LATENCIES.items()},
        "tool_cpu_seconds": repeat.tool_cpu_seconds,
    }


def _compared_figures(repeats: Sequence[Repeat]) -> dict[str, list[float]]:
    entries = [_repeat_figures(repeat) for repeat in repeats]
    return {name: [entry[name] for entry in entries] for name in ("output_tokens_per_second", *LATENCIES)}


def distribution(values: Sequence[float]) -> dict[str, float | None]:
    """Mean and percentiles, linearly interpolated between the two nearest values; None for an empty sequence."""
    if not values:
        return dict.fromkeys(("mean", *PERCENTILES))
    if len(values) == 1:
        return dict.fromkeys(("mean", *PERCENTILES), float(values[0]))
    cuts = quantiles(values, n=100, method="inclusive")
    return {"mean": mean(values), **{name: cuts[percent - 1] for name, percent in PERCENTILES.items()}}


def cost(price_per_hour: float | None, output_tokens_per_second: float) -> dict[str, float] | None:
    """The cost of a million output tokens at this throughput, in the currency of the price; None without a price."""
    if price_per_hour is None:
        return None
    hours = MILLION / output_tokens_per_second / 3600
    return {"price_per_hour": price_per_hour, "per_million_output_tokens": price_per_hour * hours}


def with_hash(environment: Mapping[str, Any]) -> dict[str, Any]:
    """An environment with a hash of what affects speed. qkit's version and commit are excluded: they are what comparisons are about."""
    packages = {name: version for name, version in environment["packages"].items() if name != "qkit"}
    hashed = {
        **{key: value for key, value in environment.items() if key not in ("git", "sha256")},
        "packages": packages,
    }
    return {**environment, "sha256": hashlib.sha256(json.dumps(hashed, sort_keys=True).encode()).hexdigest()}


def artifact_sha256(outputs: Mapping[str, str], folder: str) -> str | None:
    """One hash of the names and hashes of an artifact's files, as the manifest lists them under `folder`; None if it lists none."""
    files = sorted((name.removeprefix(folder), digest) for name, digest in outputs.items() if name.startswith(folder))
    return hashlib.sha256(json.dumps(files).encode()).hexdigest() if files else None
