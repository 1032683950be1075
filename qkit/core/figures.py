"""Formats figures for people: bytes, seconds, percentages, distances."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

GIB = 2**30
MIB = 2**20


def gib(count: int) -> str:
    """Bytes in GiB, with the unit."""
    return f"{count / GIB:.1f} GiB"


def mib(count: int) -> str:
    """Bytes in MiB, with the unit."""
    return f"{count / MIB:,.1f} MiB"


WIDE = 0.15  # repeats whose range exceeds this share of their median are shown as a range


def steady(values: Sequence[float]) -> bool:
    """Whether one figure can stand for all repeats: their range is within WIDE of the median."""
    return max(values) - min(values) <= WIDE * median(values)


ABSENT = "–"


def trimmed(value: float | None) -> str:
    """At most one decimal, and none if it would be 0."""
    return ABSENT if value is None else f"{value:.1f}".removesuffix(".0")


def fixed(value: float | None, decimals: int = 1) -> str:
    """A fixed number of decimals, so that columns line up; with thousands separators."""
    return ABSENT if value is None else f"{value:,.{decimals}f}"


def percent(fraction: float | None) -> str:
    """0.978 as `97.8 %`."""
    return ABSENT if fraction is None else f"{100 * fraction:.1f} %"


def kl_text(value: float | None) -> str:
    """A divergence in nats; a value too small for four decimals is shown as `< 0.0001`, not as 0."""
    if value is not None and -0.00005 < value < 0:  # rounding of a sum that is zero
        value = 0.0
    return "< 0.0001" if value is not None and 0 < value < 0.00005 else fixed(value, 4)


def speed_text(record: Mapping[str, Any]) -> str:
    """Output tokens per second; the slowest and the fastest repeat if they are too far apart for one figure."""
    speed, ends = record["output_tokens_per_second"], record["output_tokens_per_second_range"]
    if speed is None or ends is None or steady([ends[0], speed, ends[1]]):
        return fixed(speed)
    return f"{ends[0]:,.0f}–{ends[1]:,.0f}"


def ms_text(seconds: float | None) -> str:
    """Milliseconds, without the unit."""
    return ABSENT if seconds is None else fixed(seconds * 1000, 1 if seconds < 0.1 else 0)


def gib_text(count: float | None) -> str:
    """GiB, without the unit."""
    return ABSENT if count is None else fixed(count / 2**30, 2)


def bytes_text(count: float | None) -> str:
    """`110 MiB`, `1.70 GiB`."""
    if count is None:
        return ABSENT
    if count >= 2**30:
        return f"{count / 2**30:.2f} GiB"
    return f"{count / 2**20:.0f} MiB" if count >= 10 * 2**20 else f"{count / 2**20:.1f} MiB"


def seconds_text(seconds: float | None) -> str:
    """`45 ms`, `9.5 s`, `4 min 42 s`, `2 h 05 min`."""
    if seconds is None:
        return ABSENT
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"
