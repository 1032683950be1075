"""The stage `report`: one self-contained HTML page for a run.

The page uses no network, script or font file, so that it still opens years from now; a table that can be sorted brings its few lines of script
along. A section without data says so in one line.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qkit.core import figures as core_figures
from qkit.core import files
from qkit.core.files import write_text
from qkit.measure import candidates
from qkit.recipe.registry import BASELINES, TRAINED
from qkit.report import bench_charts, further, script, summary, training_curves
from qkit.report._templates import template
from qkit.report.bench_charts import SERVER
from qkit.report.summary import Summary
from qkit.report.training_curves import WIDE
from qkit.run.directory import Run

if TYPE_CHECKING:
    from markupsafe import Markup


EXAMPLES = 10
# The order in which kinds of example fill the page: failures are always among them, however good the run is.
TURNS = ("fixed", "fixed", "still wrong", "broken", "fixed", "fixed", "still wrong", "broken", "fixed", "still right")
HALF = 384  # CSS pixels of a chart of which two stand beside each other


Extent = tuple[float | None, float | None, float | None]  # value, and where its whisker begins and ends


@dataclass(frozen=True)
class Example:
    """One held-out row as the base model and the adapter answered it."""

    row: int
    prompt: str
    reference: str
    base: str
    adapter: str
    base_correct: bool
    adapter_correct: bool

    @property
    def kind(self) -> str:
        if self.adapter_correct:
            return "still right" if self.base_correct else "fixed"
        return "broken" if self.base_correct else "still wrong"


def run(run: Run, out: Path) -> None:
    """Write `out/index.html`.

    Raises:
        MissingArtifact: a file of the run is there and is damaged.
    """
    write_text(out / "index.html", page(run))


def page(run: Run) -> str:
    """The HTML of the page. The same run gives the same page: all times on it are those that the run recorded."""
    figures = summary.summary(run)
    sections = further.sections(run)
    manifest = run.manifest()
    data = files.read(run.folder("data") / "summary.json") or {}
    metrics = training_curves.steps(run)
    predictions = files.read_lines(run.folder("evaluate") / "predictions.jsonl")
    is_right_or_wrong = all(isinstance(line["correct"], bool) for line in predictions)  # and not more or less so
    examples = pair_up(predictions) if is_right_or_wrong else []
    memory = _memory(run, figures)
    return _render(
        run=run,
        figures=figures,
        stages={name: stage for name, stage in figures["stages"].items() if name != "report"},
        started=min((entry["started_at"] for entry in manifest["stages"].values()), default=None),
        data=data,
        lead=lead(run, figures, data),
        metrics=metrics,
        memory=memory,
        tiles=tiles(figures, metrics, memory),
        verdict=summary.verdict(figures),
        score_chart=score_chart(figures),
        merges=merges(run),
        training_charts=training_curves.charts(run),
        memory_chart=memory_chart(memory),
        speed_charts=speed_charts(figures["bench"]),
        bench_charts=bench_charts.charts_of(run),
        method=method(figures["bench"]),
        sections=sections,
        script=script.text() if script.is_needed(sections) else None,
        script_hash=script.content_hash(),
        labels=BASELINES[1] in figures["scores"],
        subject="adapter" if run.recipe.trained_as == "adapter" else "trained model",
        examples=choose(examples),
        kinds=_kinds(examples),
        is_right_or_wrong=is_right_or_wrong,
        server=_server_command(run),
        outputs=_outputs(manifest, figures["stages"]),
    )


def merges(run: Run) -> list[tuple[str, Mapping[str, Any]]]:
    """For the merged model, and for each format with several candidates: the measurements of the candidates, and which was chosen."""
    merged = files.read(run.folder("merge") / candidates.FILE)
    exports: Mapping[str, Any] = files.read(run.folder("export") / candidates.FILE) or {}
    return [*([("merged model", merged)] if merged else []), *exports.items()]


def _render(**values: Any) -> str:
    from qkit.report import section_charts, svg

    return template("report.html.j2").render(**values, show=summary, share=svg.share, draw=section_charts.drawn)


# --- text ------------------------------------------------------------------------------------------


def lead(run: Run, figures: Summary, data: Mapping[str, Any]) -> str:
    """One sentence: the model, the data and the device."""
    recipe = run.recipe
    weights = recipe.quantization.bnb_4bit_quant_type.upper() if recipe.quantization.load_in_4bit else "16-bit"
    rows = f" and {data['splits']['train']['rows']:,} rows of data" if data.get("splits") else ""
    device = figures["environment"]["device"].get("name")
    where = f", on {device}" if device else ""
    what = f"with {summary.trained_how(recipe)} on {weights} weights"
    if recipe.trained_as == "trained":
        what = f"training {summary.trained_how(recipe)}"
    how = f"trained for the task {recipe.task} {what}"
    return f"{recipe.model.source}, {how}{rows}{where}."


def tiles(
    figures: Summary, metrics: Sequence[Mapping[str, Any]], memory: Mapping[str, Any]
) -> list[tuple[str, str, str]]:
    """The key figures: (name, figure, note). Figures that were not measured are left out."""
    entries, bench = [], figures["bench"]
    if (seconds := figures["stages"]["train"]["seconds"]) is not None:
        note = f"{len(metrics)} logged steps, {metrics[-1]['tokens']:,} tokens" if metrics else ""
        entries.append(("Training", core_figures.seconds_text(seconds), note))
    if memory["measured"] is not None:
        entries.append(("Peak memory in training", core_figures.bytes_text(memory["measured"]), memory["against_plan"]))
    if (name := summary.farthest(figures)) is not None:
        distance = figures["parity"][name]
        note = f"mean KL {core_figures.kl_text(distance['kl_mean'])}, top-1 {core_figures.percent(distance['top1'])}"
        entries.append(("Farthest from the trained model", name, note))
    speeds = [(r["output_tokens_per_second"] or 0, load) for r, load in zip(bench, loads(bench), strict=True)]
    if speeds and max(speeds)[0]:
        entries.append(
            ("Highest throughput", f"{core_figures.fixed(max(speeds)[0])} {bench[0]['unit']}/s", max(speeds)[1])
        )
    return entries


def method(bench: Sequence[Mapping[str, Any]]) -> str:
    """The load of the bench; if records differ, all loads."""
    methods = []
    for record in bench:
        prompt = f"prompts of {record['prompt_tokens']:g} tokens (median), " if record["prompt_tokens"] else ""
        methods.append(f"{prompt}{record['output_tokens']} output tokens each, {record['repeats']} rounds")
    return "; or ".join(dict.fromkeys(methods))


def loads(bench: Sequence[Mapping[str, Any]]) -> list[str]:
    """A short name for each record, such as `onnx-int4 × 8`: runtime or artifact, whichever distinguishes it."""
    pairs = {(record["runtime"], record["artifact"]) for record in bench}
    return [f"{_distinct_name(r['runtime'], r['artifact'], pairs)} × {r['concurrency']}" for r in bench]


def _distinct_name(runtime: str, artifact: str, pairs: set[tuple[str, str]]) -> str:
    if sum(other == runtime for other, _ in pairs) == 1:
        return runtime
    return artifact if sum(other == artifact for _, other in pairs) == 1 else f"{artifact}, {runtime}"


def _memory(run: Run, figures: Summary) -> dict[str, Any]:
    """Memory of training in bytes: planned items, their sum, what was measured, and a comparison in words."""
    recorded = files.read(run.folder("train") / "memory.json") or {}
    peak = figures["stages"]["train"]["peak_bytes"]
    items = recorded.get("predicted") or {}
    planned = sum(items.values()) if items else peak["predicted"]
    measured = recorded.get("measured_peak_bytes", peak["measured"])
    return {
        "items": items,
        "alive": recorded.get("measured") or {},
        "step": recorded.get("step"),
        "planned": planned,
        "measured": measured,
        "meter": recorded.get("meter", peak["meter"]),
        "against_plan": _against(planned, measured),
    }


def _against(planned: int | None, measured: int | None) -> str:
    if not planned or measured is None:
        return ""
    percent = 100 * (measured - planned) / planned
    way = "above" if percent > 0 else "below"
    return (
        f"{abs(percent):.0f} % {way} the plan of {core_figures.bytes_text(planned)}" if round(percent) else "as planned"
    )


# --- charts ---------------------------------------------------------------------------------------------------------


def score_chart(figures: Summary) -> Markup | None:
    """Score of every artifact with its interval, from 0 to 100."""
    from qkit.report import svg

    rows = [
        svg.Bar(
            label=name,
            value=max(entry["score"], 0.0),  # R2 can be below 0, where the axis begins
            text=core_figures.fixed(entry["score"]),
            note=summary.interval_text(entry),
            low=_from_zero(entry["low"]),
            high=_from_zero(entry["high"]),
            strong=name in TRAINED,
        )
        for name, entry in figures["scores"].items()
        if entry["score"] is not None
    ]
    if not rows:
        return None
    description = "; ".join(f"{row.label} {row.text}, interval {row.note}" for row in rows)
    title = f"{figures['metric'] or 'Score'} of each artifact, 0 to 100"
    return svg.bars("score-chart", title, description, rows, top=100, width=WIDE, ticks=(0, 25, 50, 75, 100))


def _from_zero(end: float | None) -> float | None:
    return None if end is None else max(end, 0.0)


def memory_chart(memory: Mapping[str, Any]) -> Markup | None:
    """The plan's items stacked to their sum, and the measured peak below."""
    from qkit.report import svg

    items = [svg.WaterfallStep(name, count, core_figures.bytes_text(count)) for name, count in memory["items"].items()]
    ends = (("planned", memory["planned"]), ("measured", memory["measured"]))
    totals = [
        svg.WaterfallStep(name, count, core_figures.bytes_text(count), total=True)
        for name, count in ends
        if count is not None
    ]
    if not totals:
        return None
    description = "; ".join(f"{row.label} {row.text}" for row in (*items, *totals))
    title = "Memory of training, planned and measured"
    return svg.waterfall("memory-chart", title, description, [*items, *totals], width=WIDE)


def speed_charts(bench: Sequence[Mapping[str, Any]]) -> list[tuple[str, Markup]]:
    """Latency, throughput and memory of each runtime under each load: (heading, chart). The answer to a text has no tokens."""
    texts = bool(bench) and bench[0]["unit"] == "texts"
    tokens = {"ttft": "Time to first token, ms", "tpot": "Time per output token, ms"}
    titles = {"e2e": "Time to the answer, ms"} if texts else tokens
    speed = "Texts per second" if texts else "Output tokens per second"
    ms = core_figures.ms_text
    drawn = (
        *(_speed_chart(name, title, bench, ms, partial(_latency, name)) for name, title in titles.items()),
        _speed_chart("throughput", speed, bench, core_figures.fixed, _throughput),
        _speed_chart("peak", "Peak memory", bench, core_figures.bytes_text, lambda r: (r["peak_bytes"], None, None)),
    )
    return [chart for chart in drawn if chart is not None]


def _latency(name: str, record: Mapping[str, Any]) -> Extent:
    percentiles = record[f"{name}_seconds"]
    return percentiles["p50"], None, percentiles["p99"]


def _throughput(record: Mapping[str, Any]) -> Extent:
    low, high = record["output_tokens_per_second_range"] or (None, None)
    return record["output_tokens_per_second"], low, high


def _speed_chart(
    name: str,
    title: str,
    bench: Sequence[Mapping[str, Any]],
    text: Callable[[float | None], str],
    extent: Callable[[Mapping[str, Any]], Extent],
) -> tuple[str, Markup] | None:
    """One bar for each record, scaled to the longest bar or whisker; None when nothing was measured."""
    from qkit.report import svg

    rows = []
    for record, load in zip(bench, loads(bench), strict=True):
        value, low, high = extent(record)
        if value is not None:
            rows.append(svg.Bar(load, value, text(value), low=low, high=high, strong=record["runtime"] == SERVER))
    if not rows:
        return None
    top = max(max(row.value, row.high or 0) for row in rows)
    description = "; ".join(f"{row.label} {row.text}" for row in rows)
    return title, svg.bars(f"{name}-chart", title, description, rows, top=top, width=HALF)


# --- examples -------------------------------------------------------------------------------------------------------


def pair_up(predictions: Iterable[Mapping[str, Any]]) -> list[Example]:
    """Base model's and adapter's answers to the same row, in the order of the rows; rows with only one of them are left out."""
    answers: dict[int, dict[str, Mapping[str, Any]]] = {}
    for line in predictions:
        answers.setdefault(line["row"], {})[line["artifact"]] = line
    pairs = [
        (row, [a[name] for name in BASELINES if name in a], [a[name] for name in TRAINED if name in a])
        for row, a in sorted(answers.items())
    ]
    return [
        Example(
            row=row,
            prompt=base["prompt"],
            reference=base["reference"],
            base=base["prediction"],
            adapter=adapter["prediction"],
            base_correct=base["correct"],
            adapter_correct=adapter["correct"],
        )
        for row, [base, *_], [adapter, *_] in (pair for pair in pairs if pair[1] and pair[2])
    ]


def choose(examples: Sequence[Example]) -> list[Example]:
    """Ten rows, the first of each kind in the order of TURNS: those that changed first, failures among them."""
    waiting = {kind: [e for e in examples if e.kind == kind] for kind in TURNS}
    chosen: list[Example] = []
    while len(chosen) < min(EXAMPLES, len(examples)):
        for kind in TURNS:
            if waiting[kind] and len(chosen) < EXAMPLES:
                chosen.append(waiting[kind].pop(0))
    return sorted(chosen, key=lambda e: (TURNS.index(e.kind), e.row))


def _kinds(examples: Sequence[Example]) -> dict[str, int]:
    """The number of rows of each kind. The ten rows on the page are not a random sample."""
    return {kind: sum(e.kind == kind for e in examples) for kind in dict.fromkeys(TURNS)}


# --- provenance -----------------------------------------------------------------------------------------------------


def _server_command(run: Run) -> str | None:
    server = files.read(run.folder("serve") / "server.json")
    return shlex.join(server["argv"]) if server and server.get("argv") else None


def _outputs(manifest: Mapping[str, Any], order: Iterable[str]) -> list[tuple[str, int, str]]:
    """Every output file of a stage: name, bytes, sha256."""
    stages = (manifest["stages"][name] for name in order if name in manifest["stages"] and name != "report")
    return [(name, o["bytes"], o["sha256"]) for stage in stages for name, o in stage["outputs"].items()]
