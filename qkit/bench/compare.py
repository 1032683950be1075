"""Compares two bench records: ratios with confidence intervals, and whether the second record is a regression.

A ratio is the geometric mean of B's repeats over that of A's. Its 95 % interval is Welch's t interval of the difference of the log means.
A figure has regressed if it is worse by more than the threshold and its interval excludes 1, so noise alone does not fail a build.
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

# Two-sided 95 % quantiles of Student's t for 1 to 30 degrees of freedom; above 30, the value for 30 is used, which widens the interval by at
# about 4 %. A table, so that Welch intervals need no dependency; a test checks it against the integral of the density.
STUDENT_T = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131),
    *(2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)
# The figures that can regress, and whether more is better.
JUDGED = {"output_tokens_per_second": True, "ttft_seconds": False, "tpot_seconds": False, "e2e_seconds": False}
# Figures without repeats, hence without an interval: shown, not judged.
SHOWN = ("peak_bytes", "disk_bytes", "startup_seconds")
LOAD_FIELDS = ("kind", "requests", "prompts", "request_rate")


@dataclass(frozen=True)
class Ratio:
    """A figure of two records. `ratio`: B over A, None if A is 0. `low` and `high`: its interval, None without repeats."""

    name: str
    before: float
    after: float
    ratio: float | None
    low: float | None
    high: float | None
    regressed: bool


@dataclass(frozen=True)
class Comparison:
    """The ratios of two records of one load. `differences`: between their environments and loads, with `ignore_mismatch` only."""

    name: str
    ratios: tuple[Ratio, ...]
    differences: tuple[str, ...]

    @property
    def regressions(self) -> list[Ratio]:
        return [ratio for ratio in self.ratios if ratio.regressed]


def compare(before: Path, after: Path, threshold: float, ignore_mismatch: bool = False) -> list[Comparison]:
    """Compare two records, or the closed-loop records of the same file name in two folders. `threshold`: a fraction, such as 0.05.

    Raises:
        MissingArtifact: a file is missing or is not a bench record, or the folders have no record name in common.
        UserError: the records come from different environments or loads, or some are missing in the second folder, and `ignore_mismatch`
            is not set; or a record has too few repeats.
    """
    return [_compare(a, b, threshold, ignore_mismatch) for a, b in _pairs(before, after, ignore_mismatch)]


def _pairs(before: Path, after: Path, ignore_mismatch: bool) -> Iterator[tuple[Path, Path]]:
    if not before.is_dir():
        yield before, after
        return
    wanted = sorted(path.name for path in before.glob("*-c[0-9]*.json"))
    names = [name for name in wanted if (after / name).is_file()]
    if not names:
        raise MissingArtifact(f"{before} and {after} have no bench records with the same name", path=after)
    if len(names) < len(wanted) and not ignore_mismatch:
        missing = ", ".join(name for name in wanted if name not in names)
        raise UserError(
            f"{after} has no {missing}, which {before} has; bench them as well, or compare only common records with --anyway"
        )
    yield from ((before / name, after / name) for name in names)


def _compare(before: Path, after: Path, threshold: float, ignore_mismatch: bool) -> Comparison:
    a, b = read(before), read(after)
    differences = tuple(differences_between(a, b))
    if differences and not ignore_mismatch:
        raise UserError(
            f"{before} and {after} were measured under different conditions:\n  "
            + "\n  ".join(differences)
            + "\ntheir ratio would not show the effect of a change alone; --anyway compares them nevertheless"
        )
    judged = [
        judge(name, _series(name, before, a), _series(name, after, b), threshold, more) for name, more in JUDGED.items()
    ]
    shown = [
        Ratio(name, a[name], b[name], b[name] / a[name], None, None, False) for name in SHOWN if a[name] and b[name]
    ]
    return Comparison(before.stem, (*judged, _failures(a, b), *shown), differences)


def _failures(a: Mapping[str, Any], b: Mapping[str, Any]) -> Ratio:
    """The number of failed requests. Any increase is a regression, because failures are not noise."""
    before, after = float(a["failed_requests"]), float(b["failed_requests"])
    return Ratio("failed_requests", before, after, after / before if before else None, None, None, after > before)


def read(file: Path) -> dict[str, Any]:
    """Read a bench record.

    Raises:
        MissingArtifact: the file is missing, or is not a bench record of this version.
    """
    if not file.is_file():
        raise MissingArtifact(
            f"{file}: bench record not found; `qkit bench RUN` writes RUN/bench/ARTIFACT-c1.json and others", path=file
        )
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise MissingArtifact(f"{file}: not JSON: {error}", path=file) from None
    if not isinstance(record, dict) or record.get("schema_version") != SCHEMA_VERSION or "by_repeat" not in record:
        raise MissingArtifact(
            f"{file}: not a bench record of version {SCHEMA_VERSION}; `qkit bench RUN` writes them", path=file
        )
    return record


def differences_between(a: Mapping[str, Any], b: Mapping[str, Any]) -> Iterator[str]:
    """Yield one line per difference in environment or load that makes two records incomparable."""
    if a["environment"]["sha256"] != b["environment"]["sha256"]:
        yield from _differing_values(a["environment"], b["environment"], "environment", skip=("sha256", "git"))
    if a["runtime"] == b["runtime"] == "url" and (urls := (_base_url(a), _base_url(b)))[0] != urls[1]:
        yield f"server: {urls[0]} and {urls[1]}"
    for name in ("concurrency", "output_tokens"):
        if a[name] != b[name]:
            yield f"{name}: {a[name]} and {b[name]}"
    if _is_chat(a) and ("doubts" in a) != ("doubts" in b):
        yield "first token: one record is from a version of qkit that counted the chunk with the role as the first token"
    for name in LOAD_FIELDS:
        if a["load"][name] != b["load"][name]:
            yield f"load.{name}: {a['load'][name]} and {b['load'][name]}"


def _is_chat(record: Mapping[str, Any]) -> bool:
    return "openai-chat" in (record["load"]["command"] or ())


def _base_url(record: Mapping[str, Any]) -> str | None:
    """The URL of the benched server. The environment of a record of any server is that of the client, so it does not tell servers apart."""
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
            f"{file} has {len(values)} repeat, but a comparison needs at least 2 to estimate noise; bench with --set bench.repeats=3"
        )
    return values


def judge(name: str, before: Sequence[float], after: Sequence[float], threshold: float, more_is_better: bool) -> Ratio:
    """The ratio of two series of repeats, with its interval. If a value is 0 (the TPOT of single tokens), the ratio is 1."""
    if min(*before, *after) <= 0:
        return Ratio(name, mean(before), mean(after), 1.0, None, None, False)
    a, b = [math.log(value) for value in before], [math.log(value) for value in after]
    shift, margin = mean(b) - mean(a), _interval_half_width(a, b)
    ratio, low, high = (math.exp(value) for value in (shift, shift - margin, shift + margin))
    worse = (ratio < 1 - threshold and high < 1) if more_is_better else (ratio > 1 + threshold and low > 1)
    return Ratio(name, math.exp(mean(a)), math.exp(mean(b)), ratio, low, high, worse)


def _interval_half_width(a: Sequence[float], b: Sequence[float]) -> float:
    """Half the width of Welch's 95 % interval for the difference of the means of `a` and `b`."""
    squared_errors = [variance(values) / len(values) for values in (a, b)]
    total = sum(squared_errors)
    if not total:
        return 0.0
    degrees = total**2 / sum(e**2 / (len(values) - 1) for e, values in zip(squared_errors, (a, b), strict=True))
    return STUDENT_T[min(int(degrees), len(STUDENT_T)) - 1] * math.sqrt(total)


def regression(comparisons: Sequence[Comparison], threshold: float) -> Regressed | None:
    """The error that fails a build and names every regressed figure, or None without regressions."""
    figures = [(comparison.name, figure) for comparison in comparisons for figure in comparison.regressions]
    if not figures:
        return None
    lines = "\n  ".join(f"{name}: {_regression_line(figure)}" for name, figure in figures)
    message = f"worse by more than {100 * threshold:g} %, and by more than noise explains:\n  {lines}"
    return Regressed(message, figures=[(name, figure.name) for name, figure in figures])


def _regression_line(figure: Ratio) -> str:
    if figure.ratio is None or figure.low is None:
        return f"{figure.name}: {figure.before:g} before, {figure.after:g} after"
    return (
        f"{figure.name} is {figure.ratio:.3f} times the value before (interval {figure.low:.3f} to {figure.high:.3f})"
    )


def parse_threshold(text: str) -> float:
    """A threshold such as `5%` or `0.05`, as a fraction.

    Raises:
        UserError: it is not a number from 0 to below 1.
    """
    number = text.removesuffix("%").strip()
    try:
        value = float(number) / (100 if text.endswith("%") else 1)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1:
        raise UserError(f"--threshold {text}: must be a percentage or a fraction below 1, such as 5% or 0.05")
    return value
