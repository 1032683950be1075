"""A run's summary for a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from qkit.core.figures import ABSENT, fixed, gib_text, kl_text, ms_text, speed_text
from qkit.recipe.registry import TRAINED
from qkit.report.further import interval_of, text_of
from qkit.report.summary import (
    LATENCY_KEYS,
    doubts,
    headline,
    interval_text,
    outdated,
    quality,
    refused,
    remarks,
    scored,
)

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table
    from rich.text import Text

    from qkit.report.summary import Summary


OUTDATED = "has changed since it was measured: run `qkit verify` again"
NAMES = ("", "stage", "artifact", "runtime", "figure", "worst labels")  # columns on the left
LONGEST = 20  # letters of a label
STYLES = {"done": "green", "missing": "dim", "stale": "yellow", "failed": "bold red"}


def screen(figures: Summary) -> RenderableType:
    """The summary for a terminal of 80 x 24: stages next to quality, speed below."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    columns = Table.grid(padding=(0, 3, 0, 0))
    columns.add_row(_stages_table(figures), *([_quality_table(figures)] if quality(figures) else []))
    parts: list[RenderableType] = [Text(headline(figures), style="bold"), Text(), columns]
    if (further := scored(figures, TRAINED)) and "metrics" in further:
        parts += [Text(), _further_tables(further)]
    if figures["validation"]:
        parts.append(Text(_validation(figures["validation"]), style="dim"))
    parts += [Text(f"{name} failed its gate: {why}", style=STYLES["failed"]) for name, why in refused(figures)]
    parts += [Text(f"{name} {OUTDATED}", style=STYLES["stale"]) for name in outdated(figures)]
    parts += [Text(f"{name}: {text}", style="dim") for name, text in remarks(figures)]
    if figures["bench"]:
        parts += [Text(), _bench_table(figures)]
    parts += [Text(doubt, style=STYLES["stale"]) for doubt in doubts(figures)]
    return Group(*parts)


def _validation(best: Mapping[str, Any]) -> str:
    """The best step by the validation rows, and whether the result is that of the step."""
    if best["value"] is None:
        return f"training: no evaluation gave a finite {best['metric']}"
    text = (
        f"training: best validation {best['metric']} {best['value']:.4g} at step {best['best_step']} of {best['steps']}"
    )
    stopped = f", stopped early at step {best['last_step']}" if best["last_step"] < best["steps"] else ""
    return f"{text}{stopped}{', and that step is the result' if best['restored'] else ''}"


def _stages_table(figures: Summary) -> Table:
    table = _table("stage", "", "time", "GiB", "planned")
    for name, stage in figures["stages"].items():
        peak = stage["peak_bytes"]
        table.add_row(
            *_cells(name),
            *_cells(stage["status"], style=STYLES.get(stage["status"], "")),
            *_cells(_clock(stage["seconds"]), gib_text(peak["measured"]), gib_text(peak["predicted"])),
        )
    return table


def _quality_table(figures: Summary) -> Table:
    """Score and distance to the trained model, one line for each artifact."""
    table = _table("artifact", "score", "interval", "KL", "top-1")
    for name, score, parity in quality(figures):
        style = STYLES.get(parity["status"] or "", "")
        scored = (name, fixed(score["score"]), interval_text(score))
        table.add_row(*_cells(*scored, kl_text(parity["kl_mean"]), fixed(_times(parity["top1"], 100)), style=style))
    return table


def _further_tables(score: Mapping[str, Any]) -> Table:
    """The task's further figures, and beside them its worst labels."""
    from rich.table import Table

    figures = _table("figure", "value", "interval")
    for values in score["metrics"].values():
        figures.add_row(*_cells(values["title"], text_of(values), interval_of(values)))
    worst = score.get("worst_labels", [])
    columns = Table.grid(padding=(0, 3, 0, 0))
    columns.add_row(figures, *([_worst_table(worst)] if worst else []))
    return columns


def _worst_table(worst: Sequence[Mapping[str, Any]]) -> Table:
    table = _table("worst labels", "rows", worst[0]["title"], "interval")
    table.columns[0].overflow, table.columns[0].max_width = "ellipsis", LONGEST
    for row in worst:
        table.add_row(*_cells(row["label"], str(row["support"]), text_of(row), interval_of(row)))
    return table


def _bench_table(figures: Summary) -> Table:
    if all(record["unit"] == "texts" for record in figures["bench"]):
        return _bench_of_texts(figures)
    table = _table("runtime", "artifact", "at once", "TTFT ms", "TPOT ms", "E2E ms", "tokens/s", "GiB", "start s")
    for record in figures["bench"]:
        latency = [ms_text(record[key]["p50"]) for key in LATENCY_KEYS]
        load = (record["runtime"], record["artifact"], str(record["concurrency"]))
        speed = speed_text(record)
        cost = (gib_text(record["peak_bytes"]), fixed(record["startup_seconds"]))
        table.add_row(*_cells(*load, *latency, speed, *cost))
    return table


def _bench_of_texts(figures: Summary) -> Table:
    """An answer is one text, which has no second token."""
    table = _table("runtime", "artifact", "at once", "p50 ms", "p99 ms", "texts/s", "GiB", "start s")
    for record in figures["bench"]:
        load = (record["runtime"], record["artifact"], str(record["concurrency"]))
        latency = [ms_text(record["e2e_seconds"][point]) for point in ("p50", "p99")]
        cost = (gib_text(record["peak_bytes"]), fixed(record["startup_seconds"]))
        table.add_row(*_cells(*load, *latency, speed_text(record), *cost))
    return table


def _table(*columns: str) -> Table:
    """A table without rules: a name on the left, figures on the right."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="dim")
    for column in columns:
        named = column in NAMES
        table.add_column(column, justify="left" if named else "right", no_wrap=True)
    return table


def _cells(*texts: str, style: str = "") -> Iterable[Text]:
    """Cells with literal text: rich would interpret markup in a plain string."""
    from rich.text import Text

    return [Text(text, style=style) for text in texts]


def _clock(seconds: float | None) -> str:
    """`0:09`, `4:42`, `2:05:00`: the narrowest form for a column."""
    if seconds is None:
        return ABSENT
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes}:{rest:02d}"


def _times(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor
