"""Two bench records side by side: ratios with intervals, and whether the second is a regression.

A ratio is B over A of the means of log figures over repeats; its interval is Welch's t interval of their difference, at 95 %. A figure has
regressed when it is worse by more than the threshold and its interval leaves out 1: noise alone fails nobody's build.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, variance
from typing import Any

from qkit.bench.record import SCHEMA_VERSION
from qkit.core.errors import MissingArtifact, Regressed, UserError

CONFIDENCE = 0.95
# Student's t for 95 % at 1 to 30 degrees of freedom; more are taken for 30.
STUDENT_T = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131),
    *(2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)
# Figures that are judged, and whether more of it is better.
JUDGED = {"output_tokens_per_second": True, "ttft_seconds": False, "tpot_seconds": False, "e2e_seconds": False}
# Figures that have no repeats, and so no interval: shown, not judged.
SHOWN = ("peak_bytes", "disk_bytes", "startup_seconds")
LOAD_FIELDS = ("kind", "requests", "prompts", "request_rate")


@dataclass(frozen=True)
class Ratio:
    """B over A, None where A is 0; `low` and `high` are None where there are no repeats to tell."""

    name: str
    before: float
    after: float
    ratio: float | None
    low: float | None
    high: float | None
    regressed: bool


@dataclass(frozen=True)
class Comparison:
    """Two records of one load, and what differs around them (known only with `anyway`)."""

    name: str
    ratios: tuple[Ratio, ...]
    differences: tuple[str, ...]

    @property
    def regressions(self) -> list[Ratio]:
        return [ratio for ratio in self.ratios if ratio.regressed]


def compare(before: Path, after: Path, threshold: float, ignore_mismatch: bool = False) -> list[Comparison]:
    """Compare two records, or the closed loops of two folders by their files' names. `threshold`: a share, such as 0.05.

    Raises:
        MissingArtifact: a file is absent or is no bench record, or the folders have no name in common.
        UserError: the records come from different environments or loads, or the second folder lacks some, and `anyway` was not said;
            or one has too few repeats.
    """
    return [_compare(a, b, threshold, ignore_mismatch) for a, b in _pairs(before, after, ignore_mismatch)]


def _pairs(before: Path, after: Path, ignore_mismatch: bool) -> Iterator[tuple[Path, Path]]:
    if not before.is_dir():
        yield before, after
        return
    wanted = sorted(path.name for path in before.glob("*-c[0-9]*.json"))
    names = [name for name in wanted if (after / name).is_file()]
    if not names:
        raise MissingArtifact(f"{before} and {after} have no bench record of the same name")
    if len(names) < len(wanted) and not ignore_mismatch:
        gone = ", ".join(name for name in wanted if name not in names)
        raise UserError(
            f"{after} lacks {gone}, which {before} has: bench them too, or --anyway compares what both have"
        )
    yield from ((before / name, after / name) for name in names)


def _compare(before: Path, after: Path, threshold: float, ignore_mismatch: bool) -> Comparison:
    a, b = read(before), read(after)
    differences = tuple(differences_between(a, b))
    if differences and not ignore_mismatch:
        raise UserError(
            f"{before} and {after} were not measured alike:\n  "
            + "\n  ".join(differences)
            + "\na ratio of the two would say nothing of the change; --anyway gives it all the same"
        )
    judged = [
        judge(name, _series(name, before, a), _series(name, after, b), threshold, more) for name, more in JUDGED.items()
    ]
    shown = [
        Ratio(name, a[name], b[name], b[name] / a[name], None, None, False) for name in SHOWN if a[name] and b[name]
    ]
    return Comparison(before.stem, (*judged, _failures(a, b), *shown), differences)


def _failures(a: Mapping[str, Any], b: Mapping[str, Any]) -> Ratio:
    """Requests that failed: more of them than before are worse, whatever their number. They are no noise."""
    then, now = float(a["failed_requests"]), float(b["failed_requests"])
    return Ratio("failed_requests", then, now, now / then if then else None, None, None, now > then)


def read(file: Path) -> dict[str, Any]:
    """A bench record.

    Raises:
        MissingArtifact: it is absent, or no record of this version.
    """
    if not file.is_file():
        raise MissingArtifact(
            f"{file}: no such bench record; `qkit bench RUN` writes RUN/bench/ARTIFACT-c1.json and its like"
        )
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise MissingArtifact(f"{file}: not JSON: {error}") from None
    if not isinstance(record, dict) or record.get("schema_version") != SCHEMA_VERSION or "by_repeat" not in record:
        raise MissingArtifact(f"{file}: no bench record of version {SCHEMA_VERSION}; `qkit bench RUN` writes them")
    return record


def differences_between(a: Mapping[str, Any], b: Mapping[str, Any]) -> Iterator[str]:
    """What makes two records incomparable, one line each: where they were measured, or how."""
    if a["environment"]["sha256"] != b["environment"]["sha256"]:
        yield from _differing_values(a["environment"], b["environment"], "environment", skip=("sha256", "git"))
    if a["runtime"] == b["runtime"] == "url" and (places := (_base_url(a), _base_url(b)))[0] != places[1]:
        yield f"server: {places[0]} and {places[1]}"
    for name in ("concurrency", "output_tokens"):
        if a[name] != b[name]:
            yield f"{name}: {a[name]} and {b[name]}"
    if _is_chat(a) and ("doubts" in a) != ("doubts" in b):
        yield "first token: one is of a version that took the chunk with the role for it, the other is not"
    for name in LOAD_FIELDS:
        if a["load"][name] != b["load"][name]:
            yield f"load.{name}: {a['load'][name]} and {b['load'][name]}"


def _is_chat(record: Mapping[str, Any]) -> bool:
    return "openai-chat" in (record["load"]["command"] or ())


def _base_url(record: Mapping[str, Any]) -> str | None:
    """Where the load was sent; the environment of such a record is the sender's."""
    command = record["load"]["command"] or []
    return str(command[command.index("--base-url") + 1]) if "--base-url" in command else None


def _differing_values(a: Any, b: Any, place: str, skip: Sequence[str] = ()) -> Iterator[str]:
    if isinstance(a, dict) and isinstance(b, dict):
        for key in [*a, *(key for key in b if key not in a)]:
            if key not in skip and (place, key) != ("environment.packages", "qkit"):
                yield from _differing_values(a.get(key), b.get(key), f"{place}.{key}")
    elif a != b:
        yield f"{place}: {a} and {b}"


def _series(name: str, file: Path, record: Mapping[str, Any]) -> list[float]:
    values = [float(entry[name]) for entry in record["by_repeat"]]
    if len(values) < 2:
        raise UserError(
            f"{file} has {len(values)} repeat, which tells nothing of its noise: bench it with --set bench.repeats=3"
        )
    return values


def judge(name: str, before: Sequence[float], after: Sequence[float], threshold: float, more_is_better: bool) -> Ratio:
    """The ratio of two series of repeats with its interval. A figure of 0 (the TPOT of single tokens) has no ratio and is 1."""
    if min(*before, *after) <= 0:
        return Ratio(name, mean(before), mean(after), 1.0, None, None, False)
    a, b = [math.log(value) for value in before], [math.log(value) for value in after]
    shift, margin = mean(b) - mean(a), _interval_half_width(a, b)
    ratio, low, high = (math.exp(value) for value in (shift, shift - margin, shift + margin))
    worse = (ratio < 1 - threshold and high < 1) if more_is_better else (ratio > 1 + threshold and low > 1)
    return Ratio(name, math.exp(mean(a)), math.exp(mean(b)), ratio, low, high, worse)


def _interval_half_width(a: Sequence[float], b: Sequence[float]) -> float:
    """Half the width of Welch's interval for a difference of means."""
    parts = [variance(values) / len(values) for values in (a, b)]
    if not sum(parts):
        return 0.0
    freedom = sum(parts) ** 2 / sum(part**2 / (len(values) - 1) for part, values in zip(parts, (a, b), strict=True))
    return STUDENT_T[min(int(freedom), len(STUDENT_T)) - 1] * math.sqrt(sum(parts))


def regression(comparisons: Sequence[Comparison], threshold: float) -> Regressed | None:
    """The error that fails a build, naming every figure that got worse; None when none did."""
    worse = [f"{comparison.name}: {_regression_line(r)}" for comparison in comparisons for r in comparison.regressions]
    if not worse:
        return None
    return Regressed(f"worse by more than {100 * threshold:g} %, and by more than chance:\n  " + "\n  ".join(worse))


def _regression_line(found: Ratio) -> str:
    if found.ratio is None or found.low is None:
        return f"{found.name}: {found.before:g} before, {found.after:g} now"
    return f"{found.name} is {found.ratio:.3f} times what it was (interval {found.low:.3f} to {found.high:.3f})"


def share(text: str) -> float:
    """`5%` or `0.05`.

    Raises:
        UserError: it is neither.
    """
    number = text.removesuffix("%").strip()
    try:
        value = float(number) / (100 if text.endswith("%") else 1)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1:
        raise UserError(f"--threshold {text}: write it as 5% or 0.05")
    return value
