"""What a bench came to: requests as they were timed, the field's figures of them, and the record that holds them.

TTFT: from sending a request to its first chunk that holds a token (content, reasoning or a tool call). ITL: between one such chunk and
the next, as the client saw them arrive. TPOT: mean time of a request's tokens after the first, (E2E - TTFT) / (tokens - 1). E2E: to the
last token. Throughput: over a whole repeat, from its first request sent to its last answer. Goodput: requests a second that met every
limit of an SLO. Doubts: what is odd about the timings themselves, so that figures made of them may be wrong. bench.schema.json describes
a record.
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
OUTLIER_FACTOR = 3  # times longer, or shorter: a gap that no other of its answer is like
MIN_GAPS = 3  # gaps, below which none can be told from the others
PERCENTILES = {"p50": 50, "p90": 90, "p99": 99}
MILLION = 1_000_000


@dataclass(frozen=True)
class Request:
    """One answered request, in seconds. `gaps`: between its chunks, which hold a token each or more; `tokens`: as the server counts."""

    ttft: float
    gaps: tuple[float, ...]
    prompt_tokens: int
    tokens: int

    @property
    def e2e(self) -> float:
        return self.ttft + sum(self.gaps)

    @property
    def tpot(self) -> float:
        """0 for a single token."""
        return (self.e2e - self.ttft) / (self.tokens - 1) if self.tokens > 1 else 0.0


@dataclass(frozen=True)
class Repeat:
    """One measurement of a load: its requests, how long all of them took, those that failed, and the load tool's own CPU seconds."""

    seconds: float
    requests: tuple[Request, ...]
    errors: tuple[str, ...] = ()
    tool_cpu_seconds: float | None = None
    doubts: Mapping[str, int] = field(default_factory=dict)  # what is odd -> about how many answers

    def per_second(self, count: float) -> float:
        return count / self.seconds


@dataclass(frozen=True)
class Slo:
    """The most seconds that a good request may take; None does not matter."""

    ttft_seconds: float | None = None
    tpot_seconds: float | None = None
    e2e_seconds: float | None = None

    @property
    def limits(self) -> dict[str, float]:
        found = {"ttft_seconds": self.ttft_seconds, "tpot_seconds": self.tpot_seconds, "e2e_seconds": self.e2e_seconds}
        return {name: limit for name, limit in found.items() if limit is not None}

    def met(self, request: Request) -> bool:
        return all(LATENCIES[name](request) <= limit for name, limit in self.limits.items())


LATENCIES: Mapping[str, Callable[[Request], float]] = {
    "ttft_seconds": lambda request: request.ttft,
    "tpot_seconds": lambda request: request.tpot,
    "e2e_seconds": lambda request: request.e2e,
}
# A gap at either end, and what it may come from.
GAP_CHECKS = (
    (
        "first",
        0,
        "the first chunk may hold no token, or the server does something else after it: TTFT and TPOT may be off",
    ),
    ("last", -1, "tokens without text may have come in it, or none at all: TPOT and the end-to-end time may be off"),
)
RATES: Mapping[str, Callable[[Repeat], float]] = {
    "output_tokens_per_second": lambda repeat: repeat.per_second(sum(r.tokens for r in repeat.requests)),
    "total_tokens_per_second": lambda repeat: repeat.per_second(
        sum(r.tokens + r.prompt_tokens for r in repeat.requests)
    ),
    "requests_per_second": lambda repeat: repeat.per_second(len(repeat.requests)),
}


def figures(repeats: Sequence[Repeat], slo: Slo | None = None) -> dict[str, Any]:
    """Latencies over the requests of all repeats; throughput as the median over repeats, with its range."""
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
    """What is odd about how the answers came, one line each."""
    counts: Counter[str] = Counter()
    for repeat in repeats:
        counts.update(repeat.doubts)
    yield from (f"{count} of {len(requests)} {what}" for what, count in counts.items() if count)
    at_once = sum(request.tokens > 1 and not any(request.gaps) for request in requests)
    if 2 * at_once > len(requests):
        yield f"{at_once} of {len(requests)} answers came at once: TTFT is their end-to-end time, and there is no TPOT"
    several = [request.gaps for request in requests if len(request.gaps) >= MIN_GAPS]
    for which, at, why in GAP_CHECKS:
        odd = [gaps for gaps in several if _is_outlier(gaps, at)]
        if 2 * len(odd) > len(several):
            alone, others = (f"{median(1000 * pick for pick in picks):,.1f} ms" for picks in _split_gaps(odd, at))
            yield (
                f"the {which} gap between chunks, {alone}, is far from all others ({others}) in {len(odd)} of "
                f"{len(requests)} answers: {why}"
            )


def _is_outlier(gaps: Sequence[float], at: int) -> bool:
    """Whether the first (0) or last (-1) gap is unlike all others; a last one that is short is nothing odd."""
    others = gaps[1:] if at == 0 else gaps[:-1]
    return gaps[at] > OUTLIER_FACTOR * max(others) or (at == 0 and OUTLIER_FACTOR * gaps[at] < min(others))


def _split_gaps(found: Sequence[Sequence[float]], at: int) -> tuple[list[float], list[float]]:
    """The first or last gap of each, and all others."""
    return [gaps[at] for gaps in found], [gap for gaps in found for gap in (gaps[1:] if at == 0 else gaps[:-1])]


def _goodput(repeat: Repeat, slo: Slo) -> float:
    return repeat.per_second(sum(slo.met(request) for request in repeat.requests))


def _repeat_figures(repeat: Repeat) -> dict[str, Any]:
    """The figures that two records are compared by, and what the load tool itself took."""
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
    """Mean and percentiles, linearly interpolated between the two nearest values; nulls for an empty sequence."""
    if not values:
        return dict.fromkeys(("mean", *PERCENTILES))
    if len(values) == 1:
        return dict.fromkeys(("mean", *PERCENTILES), float(values[0]))
    cuts = quantiles(values, n=100, method="inclusive")
    return {"mean": mean(values), **{name: cuts[percent - 1] for name, percent in PERCENTILES.items()}}


def cost(price_per_hour: float | None, output_tokens_per_second: float) -> dict[str, float] | None:
    """What a million output tokens cost at this throughput, in the price's currency; None without a price."""
    if price_per_hour is None:
        return None
    hours = MILLION / output_tokens_per_second / 3600
    return {"price_per_hour": price_per_hour, "per_million_output_tokens": price_per_hour * hours}


def with_hash(environment: Mapping[str, Any]) -> dict[str, Any]:
    """An environment with the hash of what speed depends on: not qkit's own version and commit, which comparisons are made of."""
    packages = {name: version for name, version in environment["packages"].items() if name != "qkit"}
    decisive = {
        **{key: value for key, value in environment.items() if key not in ("git", "sha256")},
        "packages": packages,
    }
    return {**environment, "sha256": hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()}


def artifact_sha256(outputs: Mapping[str, str], folder: str) -> str | None:
    """One hash for an artifact: of the names and hashes of its files, as the manifest has them below `folder`. None when it has none."""
    mine = sorted((name.removeprefix(folder), digest) for name, digest in outputs.items() if name.startswith(folder))
    return hashlib.sha256(json.dumps(mine).encode()).hexdigest() if mine else None
