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


RANGE_NOTE = "figures that vary by more than 15 % between repeats are shown as a range"
SINGLE_REPEAT_NOTE = "one repeat does not show how much the figures vary; bench with --set bench.repeats=3"


def records(records: Sequence[Mapping[str, Any]]) -> RenderableType:
    """A table with one line per record; a figure that varies between repeats is shown as a range."""
    from rich.console import Group

    table = _table("artifact", "load", "TTFT ms", "TPOT ms", "E2E ms", "tokens/s", "requests/s", "failed")
    for record in records:
        latencies = (_over_repeats(record, key, core_figures.ms_text) for key in bench_record.LATENCIES)
        rates = (
            _over_repeats(record, key, core_figures.fixed)
            for key in ("output_tokens_per_second", "requests_per_second")
        )
        table.add_row(record["artifact"], load_text(record), *latencies, *rates, str(record["failed_requests"]))
    costs = [_cost(record) for record in records if record["cost"]]
    several = [record["steady"] for record in records if record["repeats"] > 1]
    notes = [RANGE_NOTE] if not all(several) else []
    notes += [SINGLE_REPEAT_NOTE] if len(several) < len(records) else []
    notes += [f"{record['artifact']}, {load_text(record)}: {doubt}" for record in records for doubt in record["doubts"]]
    return Group(table, *notes, *costs)


def load_text(record: Mapping[str, Any]) -> str:
    """The load in words: `8 at once`, or `3.1 per second`."""
    if record["concurrency"] is not None:
        return f"{record['concurrency']} at once"
    return f"{record['load']['request_rate']:.3g} per second"


def _over_repeats(record: Mapping[str, Any], key: str, text: Any) -> str:
    """The figure, or the lowest and the highest of its repeats if they vary too much for one figure."""
    values = [entry[key] for entry in record["by_repeat"]]
    if core_figures.steady(values):
        middle = record[key]
        return str(text(middle["p50"] if isinstance(middle, dict) else middle))
    return f"{text(min(values))}–{text(max(values))}"


def _cost(record: Mapping[str, Any]) -> str:
    cost = record["cost"]
    price = f"{cost['per_million_output_tokens']:.3g} per million output tokens at {cost['price_per_hour']:g} per hour"
    return f"{record['artifact']}, {load_text(record)}: {price}"


def comparisons(comparisons: Sequence[Comparison]) -> RenderableType:
    """A table of the ratios of the second record over the first, with their intervals."""
    from rich.console import Group

    table = _table("record", "figure", "first", "second", "ratio", "interval", "")
    for comparison in comparisons:
        for ratio in comparison.ratios:
            table.add_row(comparison.name, *_ratio(ratio))
    differences = dict.fromkeys(line for comparison in comparisons for line in comparison.differences)
    return Group(table, *(f"differs: {line}" for line in differences))


def _ratio(ratio: Ratio) -> list[str]:
    interval = core_figures.ABSENT if ratio.low is None else f"{ratio.low:.3f}–{ratio.high:.3f}"
    figures = [f"{value:,.4g}" if value < 1e4 else f"{value:,.0f}" for value in (ratio.before, ratio.after)]
    text = core_figures.ABSENT if ratio.ratio is None else f"{ratio.ratio:.3f}"
    return [ratio.name, *figures, text, interval, "worse" if ratio.regressed else ""]


def training(record: Mapping[str, Any]) -> RenderableType:
    """A table with one line per point of a training sweep, followed by the points that failed and why."""
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
        is_text = column in ("", "artifact", "record", "figure", "meter", "against")
        table.add_column(column, justify="left" if is_text else "right", no_wrap=True)
    return table
