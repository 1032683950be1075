"""Charts of a run's bench, for the report and as files: latency against throughput, memory over time, quality against speed, and closeness
against size.
"""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence
from math import log10
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qkit.core import files
from qkit.core.errors import MissingArtifact, MissingExtra
from qkit.core.figures import GIB
from qkit.core.files import make_folder, write_text
from qkit.measure.artifacts import Artifact
from qkit.recipe.registry import MERGED
from qkit.report import summary
from qkit.run.directory import Run
from qkit.server import lora

if TYPE_CHECKING:
    from markupsafe import Markup


Record = Mapping[str, Any]
SERVER = "vllm"  # the runtime that is deployed, drawn in the accent colour
WIDTH, HEIGHT, TALL = 800, 300, 460  # CSS pixels
MB = 1e6
MIN_KL = 1e-5
# The report's CSS for charts, for files that stand alone; light colours only.
STYLE = """
svg { background: #ffffff; font: 13px system-ui, "Helvetica Neue", "Liberation Sans", Arial, sans-serif; }
.label { fill: #1a1c1f; } .value { fill: #1a1c1f; font-weight: 600; } .tick { fill: #5b6167; font-size: 12px; }
.grid { stroke: #e3e5e7; fill: none; } .plain { stroke: #5b6167; stroke-width: 1.5; fill: none; } .dot { fill: #5b6167; }
.smooth { stroke: #0b6e66; stroke-width: 2.25; fill: none; } .end { fill: #0b6e66; } .front { stroke: #bfc5ca; fill: none; }
"""


def charts_of(run: Run) -> dict[str, tuple[str, Markup]]:
    """Every chart that the run has figures for, as file name -> (caption, chart)."""
    records = [files.read(path) for path in sorted(run.folder("bench").glob("*.json"))]
    figures = summary.summary(run)
    charts = {"quality": quality_chart(figures), "size": size_chart(run, figures)}
    return {**of_records(records), **{name: chart for name, chart in charts.items() if chart is not None}}


def of_records(records: Sequence[Record]) -> dict[str, tuple[str, Markup]]:
    """The charts that need bench records only, so also those of a server that does not belong to a run."""
    charts = {"latency": latency_chart(records), "memory-over-time": memory_chart(records)}
    return {name: chart for name, chart in charts.items() if chart is not None}


def latency_chart(records: Sequence[Record]) -> tuple[str, Markup] | None:
    """End-to-end latency over throughput: a line per artifact, a point per number of concurrent requests."""
    from qkit.report import svg as report_svg

    lines = []
    for artifact, group in _by_artifact(r for r in records if r["concurrency"]).items():
        ordered = sorted(group, key=lambda r: int(r["concurrency"]))
        points = [(r["output_tokens_per_second"], r["e2e_seconds"]["p50"]) for r in ordered]
        texts = [str(r["concurrency"]) for r in ordered]
        lines.append(report_svg.Line(artifact, points, texts, ordered[0]["runtime"] == SERVER))
    if not lines:
        return None
    unit = records[0].get("unit") or "tokens"
    description = "; ".join(
        f"{line.label}: "
        + ", ".join(
            f"{t} at once {x:.4g} {unit}/s, {y:.3g} s" for t, (x, y) in zip(line.texts, line.points, strict=True)
        )
        for line in lines
    )
    title = "Latency against throughput"
    axes = ("texts per second" if unit == "texts" else "output tokens per second", "end to end, seconds (median)")
    caption = "Latency against throughput; the number at a point is the number of concurrent requests."
    return caption, report_svg.plane("latency-chart", title, description, lines, axes=axes, width=WIDTH, height=HEIGHT)


def memory_chart(records: Sequence[Record]) -> tuple[str, Markup] | None:
    """Memory during the largest load of each artifact: the card's on a GPU, else the resident set."""
    from qkit.report import svg as report_svg

    lines = []
    for artifact, group in _by_artifact(r for r in records if r["concurrency"] and r.get("memory")).items():
        largest = max(group, key=lambda r: int(r["concurrency"]))
        series = largest["memory"]["device"] or largest["memory"]["rss_tree"]
        if len(series) > 1:
            points = [(seconds, count / GIB) for seconds, count in series]
            lines.append(
                report_svg.Line(f"{artifact} × {largest['concurrency']}", points, (), largest["runtime"] == SERVER)
            )
    if not lines:
        return None
    description = "; ".join(
        f"{line.label}: at most {max(y for _, y in line.points):.2f} GiB in {line.points[-1][0]:.0f} s"
        for line in lines
    )
    title = "Memory over time"
    chart = report_svg.plane(
        "memory-over-time-chart", title, description, lines, axes=("seconds", "GiB"), width=WIDTH, height=HEIGHT
    )
    return "Memory during the largest load of each artifact, from its first repeat on.", chart


def quality_chart(figures: summary.Summary) -> tuple[str, Markup] | None:
    """Score over the highest throughput of each artifact; the labels mark artifacts that another one beats."""
    from qkit.report import svg as report_svg

    points = _best(figures)
    if len(points) < 2:
        return None
    front = pareto(points)
    lines = [
        report_svg.Line(f"{name}{'' if name in front else ' (beaten)'}", [point], (), name in front)
        for name, point in points.items()
    ]
    description = "; ".join(f"{line.label}: {x:.4g} tokens/s, score {y:.4g}" for line in lines for x, y in line.points)
    axes = ("output tokens per second (highest of all loads)", f"{figures['metric'] or 'score'}, of 100")
    chart = report_svg.plane(
        "quality-chart",
        "Quality against speed",
        description,
        lines,
        axes=axes,
        width=WIDTH,
        height=HEIGHT,
        joined=False,
        lowest=None,
    )
    return (
        "Quality against speed; an artifact is marked as beaten if another one is better in one and at least equal in the other.",
        chart,
    )


def _best(figures: summary.Summary) -> dict[str, tuple[float, float]]:
    """Highest throughput and score of each artifact that has both."""
    speeds: dict[str, float] = {}
    for record in figures["bench"]:
        speeds[record["artifact"]] = max(speeds.get(record["artifact"], 0.0), record["output_tokens_per_second"] or 0.0)
    scores = {name: entry["score"] for name, entry in figures["scores"].items() if entry["score"] is not None}
    return {name: (speed, scores[name]) for name, speed in speeds.items() if name in scores}


def size_chart(run: Run, figures: summary.Summary) -> tuple[str, Markup] | None:
    """Closeness to the reference model over MB on disk, for every artifact that is a whole model and was verified."""
    parity = figures["parity"]
    folders = {name: run.folder("merge") if name == MERGED else run.folder("export") / name for name in parity}
    points = {
        name: (Artifact(name, folder).disk_bytes / MB, closeness(parity[name]["kl_mean"]))
        for name, folder in folders.items()
        if parity[name]["kl_mean"] is not None and folder.is_dir() and not lora.is_adapter(folder)
    }
    if len(points) < 2:
        return None
    caption = "Closeness to the trained model against size; no artifact beats those in the accent colour in both."
    return caption, against_size(points)


def against_size(points: Mapping[str, tuple[float, float]]) -> Markup:
    """The chart of export formats by size in MB (less is better) and closeness."""
    front = pareto({name: (-size, close) for name, (size, close) in points.items()})
    return closeness_chart("size", points, front, "MB on disk")


def closeness(kl: float) -> float:
    """-log10 of a mean KL. Values below MIN_KL count as equal, because the reference model computes in bf16."""
    return -log10(max(kl, MIN_KL))


def closeness_chart(name: str, points: Mapping[str, tuple[float, float]], front: set[str], x_label: str) -> Markup:
    """A chart of export formats by x (labelled `x_label`) and closeness to the trained model; those in `front` are highlighted."""
    from qkit.report import svg as report_svg

    lines = [report_svg.Line(label, [point], (), label in front) for label, point in points.items()]
    description = "; ".join(f"{label}: {x:.4g} {x_label}, {y:.2f}" for label, (x, y) in points.items())
    axes = (x_label, "closeness to the trained model: -log10 of mean KL")
    title = f"Closeness against {name}"
    return report_svg.plane(
        f"{name}-chart", title, description, lines, axes=axes, width=WIDTH, height=TALL, joined=False, lowest=None
    )


def pareto(points: Mapping[str, tuple[float, float]]) -> set[str]:
    """The names of the points that no other, different point equals or beats in both coordinates (more is better)."""

    def beaten(point: tuple[float, float]) -> bool:
        return any(
            all(b >= a for a, b in zip(point, other, strict=True)) and other != point for other in points.values()
        )

    return {name for name, point in points.items() if not beaten(point)}


def _by_artifact(records: Any) -> dict[str, list[Record]]:
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(record["artifact"], []).append(record)
    return groups


# --- files ------------------------------------------------------------------------------------------------------------


def write(run: Run, folder: Path, png: bool) -> list[Path]:
    """Write each chart as an SVG file, and with `png` as a PNG file as well; returns the files.

    Raises:
        MissingArtifact: the run has no bench records.
        MissingExtra: cairosvg, which writes PNG files, is not installed.
    """
    charts = charts_of(run)
    if not charts:
        raise MissingArtifact(
            f"{run.root} has no bench records to draw; run `qkit bench {run.root}` first", path=run.folder("bench")
        )
    return draw(charts, folder, png)


def draw(charts: Mapping[str, tuple[str, Markup]], folder: Path, png: bool) -> list[Path]:
    """Write charts, given as file name -> (caption, chart), to `folder`; returns the files.

    Raises:
        MissingExtra: cairosvg, which writes PNG files, is not installed.
    """
    make_folder(folder)
    written = []
    for name, (_, chart) in charts.items():
        written.append(folder / f"{name}.svg")
        write_text(written[-1], standalone(str(chart)))
        if png:
            written.append(_as_png(written[-1]))
    return written


def standalone(chart: str) -> str:
    """A chart of the report as a complete SVG document, with its style sheet."""
    width, height = re.findall(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', chart)[0]
    opening = f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
    return (
        chart.replace("<svg ", opening, 1).replace(">", f"><style>{html.escape(STYLE, quote=False)}</style>", 1) + "\n"
    )


def _as_png(svg: Path) -> Path:
    try:
        import cairosvg
    except (ImportError, OSError) as error:
        raise MissingExtra(
            f"--png needs cairosvg, but it cannot be loaded ({error}): run `pip install cairosvg`, and install the cairo library",
            package="cairosvg",
        ) from None
    target = svg.with_suffix(".png")
    cairosvg.svg2png(url=str(svg), write_to=str(target), scale=3)
    return target
