"""Bench records and comparisons as tables for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from qkit.bench import record as bench_record
from qkit.bench.compare import Comparison, Ratio
from qkit.core import figures as core_figures

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table


RANGE_NOTE = "a figure that ranges over more than 15 % from repeat to repeat is shown as its range"


SINGLE_REPEAT_NOTE = "of one repeat nobody knows how far its figures vary: --set bench.repeats=3 tells"


def records(found: Sequence[Mapping[str, Any]]) -> RenderableType:
    """One line for each record; what is not steady as a range."""
    from rich.console import Group

    table = _table("artifact", "load", "TTFT ms", "TPOT ms", "E2E ms", "tokens/s", "requests/s", "failed")
    for record in found:
        latencies = (_over_repeats(record, key, core_figures.ms_text) for key in bench_record.LATENCIES)
        rates = (
            _over_repeats(record, key, core_figures.fixed)
            for key in ("output_tokens_per_second", "requests_per_second")
        )
        table.add_row(record["artifact"], load_text(record), *latencies, *rates, str(record["failed_requests"]))
    said = [_cost(record) for record in found if record["cost"]]
    several = [record["steady"] for record in found if record["repeats"] > 1]
    notes = [RANGE_NOTE] if not all(several) else []
    notes += [SINGLE_REPEAT_NOTE] if len(several) < len(found) else []
    notes += [f"{record['artifact']}, {load_text(record)}: {doubt}" for record in found for doubt in record["doubts"]]
    return Group(table, *notes, *said)


def load_text(record: Mapping[str, Any]) -> str:
    """`8 at once`, or `3.1 a second`."""
    if record["concurrency"] is not None:
        return f"{record['concurrency']} at once"
    return f"{record['load']['request_rate']:.3g} a second"


def _over_repeats(record: Mapping[str, Any], key: str, text: Any) -> str:
    """The figure, or where its repeats lie too far apart for one figure, the lowest and the highest."""
    values = [entry[key] for entry in record["by_repeat"]]
    if core_figures.steady(values):
        middle = record[key]
        return str(text(middle["p50"] if isinstance(middle, dict) else middle))
    return f"{text(min(values))}–{text(max(values))}"


def _cost(record: Mapping[str, Any]) -> str:
    cost = record["cost"]
    price = f"{cost['per_million_output_tokens']:.3g} for a million output tokens at {cost['price_per_hour']:g} an hour"
    return f"{record['artifact']}, {load_text(record)}: {price}"


def comparisons(found: Sequence[Comparison]) -> RenderableType:
    """Ratios of the second record over the first, with their intervals."""
    from rich.console import Group

    table = _table("record", "figure", "first", "second", "ratio", "interval", "")
    for comparison in found:
        for ratio in comparison.ratios:
            table.add_row(comparison.name, *_ratio(ratio))
    apart = dict.fromkeys(line for comparison in found for line in comparison.differences)
    return Group(table, *(f"not alike: {line}" for line in apart))


def _ratio(ratio: Ratio) -> list[str]:
    interval = core_figures.ABSENT if ratio.low is None else f"{ratio.low:.3f}–{ratio.high:.3f}"
    figures = [f"{value:,.4g}" if value < 1e4 else f"{value:,.0f}" for value in (ratio.before, ratio.after)]
    times = core_figures.ABSENT if ratio.ratio is None else f"{ratio.ratio:.3f}"
    return [ratio.name, *figures, times, interval, "worse" if ratio.regressed else ""]


def training(record: Mapping[str, Any]) -> RenderableType:
    """One line for each point of a training sweep, and what became of those that failed."""
    from rich.console import Group

    table = _table("batch tokens", "max length", "tokens/s", "peak GiB", "meter", "MFU", "against")
    for point in record["points"]:
        speed = point["tokens_per_second"]
        figures = [
            str(point["batch_tokens"]),
            str(point["max_length"]),
            core_figures.fixed(speed),
            core_figures.gib_text(point["peak_bytes"]),
        ]
        table.add_row(
            *figures, point["meter"], core_figures.percent(point["mfu"]), point["against"] or core_figures.ABSENT
        )
    return Group(
        table, *(f"batches of {p['batch_tokens']}, rows of {p['max_length']}: {p['why']}" for p in record["failed"])
    )


def _table(*columns: str) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="dim")
    for column in columns:
        named = column in ("", "artifact", "record", "figure", "meter", "against")
        table.add_column(column, justify="left" if named else "right", no_wrap=True)
    return table
