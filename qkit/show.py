"""What a run came to: its figures as one document (`qkit show RUN --json`), and the same document as one screen.

`summary` is public and versioned, and show.schema.json describes it. Keys may be added under the same `schema_version`;
none is taken away and none changes its meaning. Every file may be absent: a run that is half way has a summary too.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qkit.bench_record import steady
from qkit.candidates import APART
from qkit.errors import MissingArtifact
from qkit.run import Run

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table
    from rich.text import Text

SCHEMA_VERSION = 1
SCORE_KEYS = ("score", "low", "high", "rows", "heldout_loss")
PARITY_KEYS = ("kl_mean", "kl_p99", "top1", "status", "failed", "tokens", "over")
LATENCY_KEYS = ("ttft_seconds", "tpot_seconds", "e2e_seconds")
LOAD_KEYS = ("runtime", "artifact", "concurrency")
THROUGHPUT_KEYS = ("output_tokens_per_second", "output_tokens_per_second_range")
COST_KEYS = ("peak_bytes", "meter", "startup_seconds", "disk_bytes")
METHOD_KEYS = ("repeats", "prompts", "prompt_tokens", "output_tokens")
NO_ENVIRONMENT: Mapping[str, Any] = {"python": None, "platform": None, "packages": {}, "git": None, "device": {}}
ABSENT = "–"

Summary = dict[str, Any]


# --- the document ---------------------------------------------------------------------------------------------------


def summary(run: Run, statuses: Mapping[str, str] | None = None) -> Summary:
    """The public summary of a run: bytes and seconds are numbers, what was not measured is null.

    `statuses` says better than the manifest how stages stand (`stale` is known only to who can compare the keys).

    Raises:
        MissingArtifact: a file is there and is damaged.
    """
    from qkit.pipeline import STAGES

    manifest = run.manifest()
    evaluated = read(run.folder("evaluate") / "scores.json") or {}
    verified = read(run.folder("verify") / "parity.json") or {}
    return {
        "schema_version": SCHEMA_VERSION,
        "recipe_sha256": manifest.get("recipe_sha256"),
        "seed": manifest.get("seed"),
        "stages": {name: _stage(name, manifest["stages"].get(name), statuses or {}) for name in STAGES},
        "metric": evaluated.get("metric"),
        "confidence": evaluated.get("confidence"),
        "interval": evaluated.get("interval"),
        "scores": _by_artifact(run, {**verified.get("scores", {}), **evaluated.get("scores", {})}, SCORE_KEYS),
        "parity": _by_artifact(run, verified.get("parity", {}), PARITY_KEYS),
        "bench": _bench(run),
        "bench_open": _bench_open(run),
        "environment": {**NO_ENVIRONMENT, **manifest.get("environment", {})},
    }


def read(path: Path) -> Any:
    """A JSON document, None when it is absent. NaN and infinities become null: no JSON reader but Python's takes them.

    Raises:
        MissingArtifact: it is not JSON.
    """
    return _parse(path.read_text(encoding="utf-8"), path) if path.exists() else None


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The documents of a JSON lines file, as `read` reads them; none when it is absent.

    Raises:
        MissingArtifact: a line is not JSON.
    """
    if not path.exists():
        return []
    return [_parse(line, path) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]


def _parse(text: str, path: Path) -> Any:
    try:
        return json.loads(text, parse_constant=lambda _: None)
    except json.JSONDecodeError as error:
        raise MissingArtifact(f"{path} is damaged ({error}); delete its folder and run the stage again") from None


def _stage(name: str, entry: Mapping[str, Any] | None, statuses: Mapping[str, str]) -> dict[str, Any]:
    recorded = entry or {"status": "missing", "seconds": None, "peak_bytes": {}}
    return {
        "status": statuses.get(name, recorded["status"]),
        "seconds": recorded["seconds"],
        "peak_bytes": {
            **{key: recorded["peak_bytes"].get(key) for key in ("predicted", "measured", "meter")},
            "lines": recorded["peak_bytes"].get("lines") or {},
        },
    }


def _by_artifact(run: Run, entries: Mapping[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    names = sorted(entries, key=lambda name: _rank(run, name))
    return {name: {key: entries[name].get(key) for key in keys} for name in names}


def _rank(run: Run, artifact: str) -> tuple[int, str]:
    """The order in which artifacts come to be: the base, what was trained, what was made of it."""
    order = ("base", "adapter", "merged", *run.recipe.export.formats)
    return (order.index(artifact) if artifact in order else len(order)), artifact


def _raw_bench(run: Run) -> list[dict[str, Any]]:
    return [read(path) for path in sorted(run.folder("bench").glob("*.json"))]


def _bench(run: Run) -> list[dict[str, Any]]:
    records = [_bench_record(raw) for raw in _raw_bench(run) if raw["concurrency"] is not None]
    return sorted(records, key=lambda r: (_rank(run, r["artifact"]), r["runtime"], r["concurrency"]))


def _bench_open(run: Run) -> list[dict[str, Any]]:
    """Loads whose requests arrive by themselves, the slowest first."""
    records = [
        {
            **{key: raw[key] for key in ("runtime", "artifact")},
            **{key: raw["load"][key] for key in ("request_rate", "share")},
            **_latencies(raw),
            **{key: raw.get(key) for key in (*THROUGHPUT_KEYS, "requests_per_second", "goodput_per_second")},
            "doubts": raw.get("doubts") or [],
        }
        for raw in _raw_bench(run)
        if raw["concurrency"] is None
    ]
    return sorted(records, key=lambda r: (_rank(run, r["artifact"]), r["request_rate"]))


def _latencies(raw: Mapping[str, Any]) -> dict[str, Any]:
    return {key: {p: (raw.get(key) or {}).get(p) for p in ("p50", "p99")} for key in LATENCY_KEYS}


def _bench_record(raw: Mapping[str, Any]) -> dict[str, Any]:
    named = {key: raw[key] for key in LOAD_KEYS}
    return {
        **named,
        **_latencies(raw),
        **{key: raw.get(key) for key in (*THROUGHPUT_KEYS, *COST_KEYS, *METHOD_KEYS)},
        "tool": (raw.get("load") or {}).get("tool"),
        "doubts": raw.get("doubts") or [],
    }


def quality(figures: Summary) -> list[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Score and parity of every artifact that has either: (name, score, parity), nulls where one is absent."""
    scores, parity = figures["scores"], figures["parity"]
    names = [*scores, *(name for name in parity if name not in scores)]
    nothing: tuple[dict[str, Any], dict[str, Any]] = dict.fromkeys(SCORE_KEYS), dict.fromkeys(PARITY_KEYS)
    return [(name, scores.get(name, nothing[0]), parity.get(name, nothing[1])) for name in names]


def doubts(figures: Summary) -> list[str]:
    """What is odd about a bench's timings, so that its figures may be wrong."""
    closed = [(f"{r['artifact']} × {r['concurrency']}", r) for r in figures["bench"]]
    opened = [(f"{r['artifact']}, {r['request_rate']:.3g} a second", r) for r in figures["bench_open"]]
    return [f"{load}: {doubt}" for load, record in (*closed, *opened) for doubt in record["doubts"]]


def verdict(figures: Summary) -> str:
    """Whether the change of the score is more than chance, as far as two intervals can tell."""
    base, adapter = figures["scores"].get("base"), figures["scores"].get("adapter")
    if not base or not adapter or base["low"] is None or adapter["low"] is None:
        return ""
    if adapter["low"] > base["high"]:
        return "The adapter is better than the base model: their intervals do not meet."
    if adapter["high"] < base["low"]:
        return "The adapter is worse than the base model: their intervals do not meet."
    return "The intervals of base model and adapter overlap: the difference may be chance."


def refused(figures: Summary) -> list[tuple[str, str]]:
    """(artifact, why) for every limit that one did not keep."""
    from qkit.gates import Breach

    marked = ((name, breach) for name, parity in figures["parity"].items() for breach in parity["failed"] or ())
    return [(name, Breach(**breach).words) for name, breach in marked]


def remarks(figures: Summary) -> list[tuple[str, str]]:
    """(artifact, what to know about its distance) where the runtime that measured it is not the one that will run it."""
    from qkit.export._job import remark

    return [
        (name, words)
        for name, found in figures["parity"].items()
        if found["kl_mean"] is not None and (words := remark(name))
    ]


def farthest(figures: Summary) -> str | None:
    """The artifact with the largest mean distance to what was trained; the adapter's own row is what bf16 makes of it."""
    judged = {name: p for name, p in figures["parity"].items() if name != APART}
    distances = {name: p["kl_mean"] for name, p in judged.items() if p["kl_mean"] is not None}
    return max(distances, key=lambda name: distances[name], default=None)


# --- figures as text: the only place where numbers get units --------------------------------------------------------


def headline(figures: Summary) -> str:
    """The result in one line, such as `call match: 0 → 52 of 100 (95 % interval 42–62)`."""
    after = figures["scores"].get("adapter")
    if after is None:
        return "not evaluated yet"
    before = figures["scores"].get("base")
    change = f"{trimmed(before['score'])} → " if before else ""
    interval = f" ({interval_name(figures)} {interval_text(after)})" if after["low"] is not None else ""
    return f"{figures['metric'] or 'score'}: {change}{trimmed(after['score'])} of 100{interval}"


def interval_name(figures: Summary) -> str:
    """`95 % interval`, or `interval` when the run does not say how wide."""
    return f"{100 * figures['confidence']:g} % interval" if figures["confidence"] else "interval"


def interval_text(entry: Mapping[str, Any]) -> str:
    """`42–62`."""
    return ABSENT if entry["low"] is None else f"{trimmed(entry['low'])}–{trimmed(entry['high'])}"


def trimmed(value: float | None) -> str:
    """At most one decimal, none where it would be 0."""
    return ABSENT if value is None else f"{value:.1f}".removesuffix(".0")


def fixed(value: float | None, decimals: int = 1) -> str:
    """Always the same decimals, so that columns line up; from 1,000 on with separators."""
    return ABSENT if value is None else f"{value:,.{decimals}f}"


def percent(fraction: float | None) -> str:
    """0.978 as `97.8 %`."""
    return ABSENT if fraction is None else f"{100 * fraction:.1f} %"


def kl_text(value: float | None) -> str:
    """A divergence in nats; what four decimals cannot show is said to be less, not 0."""
    return "< 0.0001" if value is not None and 0 < value < 0.00005 else fixed(value, 4)


def speed_text(record: Mapping[str, Any]) -> str:
    """Output tokens per second; where repeats lie too far apart for one figure, the slowest and the fastest."""
    speed, ends = record["output_tokens_per_second"], record["output_tokens_per_second_range"]
    if speed is None or ends is None or steady([ends[0], speed, ends[1]]):
        return fixed(speed)
    return f"{ends[0]:,.0f}–{ends[1]:,.0f}"


def ms_text(seconds: float | None) -> str:
    """Milliseconds, the unit left to the heading."""
    return ABSENT if seconds is None else fixed(seconds * 1000, 1 if seconds < 0.1 else 0)


def gib_text(count: float | None) -> str:
    """GiB, the unit left to the heading."""
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


# What the templates of report.py and modelcard.py call them.
TEXTS: Mapping[str, Callable[..., str]] = {
    text.__name__: text for text in (bytes_text, seconds_text, ms_text, gib_text, kl_text, percent, fixed, speed_text)
}


# --- the screen -----------------------------------------------------------------------------------------------------

STYLES = {"done": "green", "missing": "dim", "stale": "yellow", "failed": "bold red"}


def screen(figures: Summary) -> RenderableType:
    """The summary for a terminal of 80 x 24: stages beside quality, speed below."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    beside = Table.grid(padding=(0, 3, 0, 0))
    beside.add_row(_stages_table(figures), *([_quality_table(figures)] if quality(figures) else []))
    parts: list[RenderableType] = [Text(headline(figures), style="bold"), Text(), beside]
    parts += [Text(f"{name} failed its gate: {why}", style=STYLES["failed"]) for name, why in refused(figures)]
    parts += [Text(f"{name}: {words}", style="dim") for name, words in remarks(figures)]
    if figures["bench"]:
        parts += [Text(), _bench_table(figures)]
    parts += [Text(doubt, style=STYLES["stale"]) for doubt in doubts(figures)]
    return Group(*parts)


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
        style = STYLES["failed"] if parity["status"] == "failed" else ""
        scored = (name, fixed(score["score"]), interval_text(score))
        table.add_row(*_cells(*scored, kl_text(parity["kl_mean"]), fixed(_times(parity["top1"], 100)), style=style))
    return table


def _bench_table(figures: Summary) -> Table:
    table = _table("runtime", "artifact", "at once", "TTFT ms", "TPOT ms", "E2E ms", "tokens/s", "GiB", "start s")
    for record in figures["bench"]:
        latency = [ms_text(record[key]["p50"]) for key in LATENCY_KEYS]
        load = (record["runtime"], record["artifact"], str(record["concurrency"]))
        speed = speed_text(record)
        cost = (gib_text(record["peak_bytes"]), fixed(record["startup_seconds"]))
        table.add_row(*_cells(*load, *latency, speed, *cost))
    return table


def _table(*columns: str) -> Table:
    """A table without rules: a name on the left, figures on the right."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="dim")
    for column in columns:
        named = column in ("", "stage", "artifact", "runtime")
        table.add_column(column, justify="left" if named else "right", no_wrap=True)
    return table


def _cells(*texts: str, style: str = "") -> Iterable[Text]:
    """Texts as they are: a plain string would be read for rich's own markup."""
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
