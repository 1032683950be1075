"""The figures of a run as one document: `qkit show RUN --json`.

`summary` is public and versioned, and show.schema.json describes it. Keys may be added under the same `schema_version`;
none is removed or changes its meaning. Every file may be missing: an unfinished run has a summary too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qkit.core.figures import ABSENT, trimmed
from qkit.core.files import read
from qkit.measure.evidence import STALE, cost_of, read_evidence
from qkit.recipe.registry import BASELINES, MERGED, TRAINED, is_unmerged
from qkit.recipe.schema import Recipe
from qkit.report.further import figures_of
from qkit.run.directory import Run
from qkit.run.stages import STAGES

SCHEMA_VERSION = 1
SCORE_KEYS = ("score", "low", "high", "rows", "heldout_loss")
PARITY_KEYS = ("kl_mean", "kl_p99", "top1", "status", "failed", "tokens", "over")
LATENCY_KEYS = ("ttft_seconds", "tpot_seconds", "e2e_seconds")
LOAD_KEYS = ("runtime", "artifact", "concurrency")
THROUGHPUT_KEYS = ("output_tokens_per_second", "output_tokens_per_second_range")
COST_KEYS = ("peak_bytes", "meter", "startup_seconds", "disk_bytes")
METHOD_KEYS = ("repeats", "prompts", "prompt_tokens", "output_tokens")
NO_ENVIRONMENT: Mapping[str, Any] = {"python": None, "platform": None, "packages": {}, "git": None, "device": {}}


Summary = dict[str, Any]


# --- the document ---------------------------------------------------------------------------------------------------


def summary(run: Run, statuses: Mapping[str, str] | None = None) -> Summary:
    """The public summary of a run: bytes and seconds are numbers; figures that were not measured are null.

    An artifact that has changed since `verify` measured it has the status `stale`, and its figures are null.

    `statuses`: the status of stages, in place of the manifest's, which does not know `stale`.

    Raises:
        MissingArtifact: a file is there and is damaged.
    """
    manifest = run.manifest()
    evidence = read_evidence(run.root)
    stale = {name: {"status": STALE, "failed": []} for name in evidence.stale}
    return {
        "schema_version": SCHEMA_VERSION,
        "recipe_sha256": manifest.get("recipe_sha256"),
        "seed": manifest.get("seed"),
        "stages": {name: _stage(name, manifest["stages"].get(name), statuses or {}) for name in STAGES},
        "metric": evidence.metric,
        "confidence": evidence.confidence,
        "interval": evidence.interval,
        "validation": _validation(run),
        "scores": _scores(run, evidence.scores),
        "parity": _by_artifact(run, {**evidence.parity, **stale}, PARITY_KEYS),
        "bench": _bench(run),
        "bench_open": _bench_open(run),
        "environment": {**NO_ENVIRONMENT, **manifest.get("environment", {})},
    }


def _stage(name: str, entry: Mapping[str, Any] | None, statuses: Mapping[str, str]) -> dict[str, Any]:
    recorded = (entry or {}).get("status", "missing")
    return {"status": statuses.get(name, recorded), **cost_of(entry)}


def _validation(run: Run) -> dict[str, Any] | None:
    """The best step of training by its validation rows; null if it evaluated none."""
    recorded = read(run.folder("train") / "validation.json")
    if not recorded:
        return None
    kept = {key: recorded[key] for key in ("metric", "restored", "last_step", "steps", "rows")}
    return {**kept, "best_step": recorded["best"]["step"], "value": recorded["best"]["value"]}


def _scores(run: Run, entries: Mapping[str, Any]) -> dict[str, Any]:
    """Scores by artifact, with the task's further figures where it has any."""
    scores = _by_artifact(run, entries, SCORE_KEYS)
    return {name: {**score, **figures_of(run, name, entries[name])} for name, score in scores.items()}


def _by_artifact(run: Run, entries: Mapping[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    names = sorted(entries, key=lambda name: _rank(run, name))
    return {name: {key: entries[name].get(key) for key in keys} for name in names}


def _rank(run: Run, artifact: str) -> tuple[int, str]:
    """The order of artifacts: the base, the adapter, the merged model, the exports."""
    order = (*BASELINES, *TRAINED, MERGED, *run.recipe.export.formats)
    return (order.index(artifact) if artifact in order else len(order)), artifact


def _raw_bench(run: Run) -> list[dict[str, Any]]:
    return [read(path) for path in sorted(run.folder("bench").glob("*.json"))]


def _bench(run: Run) -> list[dict[str, Any]]:
    records = [_bench_record(raw) for raw in _raw_bench(run) if raw["concurrency"] is not None]
    return sorted(records, key=lambda r: (_rank(run, r["artifact"]), r["runtime"], r["concurrency"]))


def _bench_open(run: Run) -> list[dict[str, Any]]:
    """Open-loop loads, by request rate."""
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
        "unit": raw.get("unit") or "tokens",
        "doubts": raw.get("doubts") or [],
    }


def quality(figures: Summary) -> list[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Score and parity of every artifact that has either: (name, score, parity), with nulls if one is missing."""
    scores, parity = figures["scores"], figures["parity"]
    names = [*scores, *(name for name in parity if name not in scores)]
    nothing: tuple[dict[str, Any], dict[str, Any]] = dict.fromkeys(SCORE_KEYS), dict.fromkeys(PARITY_KEYS)
    return [(name, scores.get(name, nothing[0]), parity.get(name, nothing[1])) for name in names]


def doubts(figures: Summary) -> list[str]:
    """Reasons why figures of a bench may be wrong."""
    closed = [(f"{r['artifact']} × {r['concurrency']}", r) for r in figures["bench"]]
    opened = [(f"{r['artifact']}, {r['request_rate']:.3g} a second", r) for r in figures["bench_open"]]
    return [f"{load}: {doubt}" for load, record in (*closed, *opened) for doubt in record["doubts"]]


def verdict(figures: Summary) -> str:
    """Whether the score changed significantly, judged by the two intervals."""
    base, adapter = (scored(figures, names) for names in (BASELINES, TRAINED))
    if not base or not adapter or base["low"] is None or adapter["low"] is None:
        return ""
    what = "adapter" if "adapter" in figures["scores"] else "trained model"
    than = "base model" if "base" in figures["scores"] else "baseline"
    if adapter["low"] > base["high"]:
        return f"The {what} is better than the {than}: the intervals do not overlap."
    if adapter["high"] < base["low"]:
        return f"The {what} is worse than the {than}: the intervals do not overlap."
    return f"The intervals of the {than} and the {what} overlap: the difference may be chance."


def trained_how(recipe: Recipe) -> str:
    """What was trained, for people: `an adapter of rank 16`, `all weights`."""
    if recipe.method == "peft":
        return f"an adapter of PEFT's kind {recipe.peft['peft_type']}"
    if is_unmerged(recipe):
        return f"{recipe.method} bottleneck adapters (reduction factor {recipe.bottleneck.reduction_factor})"
    return {"full": "all weights", "head": "its new head alone"}.get(
        recipe.method, f"an adapter of rank {recipe.lora.r}"
    )


def scored(figures: Summary, names: Sequence[str]) -> dict[str, Any] | None:
    """The score of the first of these artifacts that has one."""
    return next((figures["scores"][name] for name in names if name in figures["scores"]), None)


def refused(figures: Summary) -> list[tuple[str, str]]:
    """(artifact, reason) for every gate that failed."""
    from qkit.measure.evidence import Breach

    marked = ((name, breach) for name, parity in figures["parity"].items() for breach in parity["failed"] or ())
    return [(name, Breach(**breach).message) for name, breach in marked]


def outdated(figures: Summary) -> list[str]:
    """Artifacts that have changed since `verify` measured them."""
    return [name for name, parity in figures["parity"].items() if parity["status"] == STALE]


def remarks(figures: Summary) -> list[tuple[str, str]]:
    """(artifact, note on its distance) for artifacts measured with another runtime than the one that will run them."""
    from qkit.plugins.exporter import remark

    return [
        (name, text)
        for name, entry in figures["parity"].items()
        if entry["kl_mean"] is not None and (text := remark(name))
    ]


NOTHING = 1e-7  # nats: what sums of rounded probabilities that are equal come to


def farthest(figures: Summary) -> str | None:
    """The artifact with the largest mean distance to the trained model. The adapter itself, whose distance is bf16 rounding, does not count."""
    judged = {name: p for name, p in figures["parity"].items() if name not in TRAINED}
    distances = {name: p["kl_mean"] for name, p in judged.items() if p["kl_mean"] is not None}
    farthest = max(distances, key=lambda name: distances[name], default=None)
    return farthest if farthest is not None and distances[farthest] > NOTHING else None


# --- figures as text --------------------------------------------------------


def headline(figures: Summary) -> str:
    """The result in one line, such as `call match: 0 → 52 of 100 (95 % interval 42–62)`."""
    after = scored(figures, TRAINED)
    if after is None:
        return "not evaluated yet"
    before = scored(figures, BASELINES)
    change = f"{trimmed(before['score'])} → " if before else ""
    interval = f" ({interval_name(figures)} {interval_text(after)})" if after["low"] is not None else ""
    return f"{figures['metric'] or 'score'}: {change}{trimmed(after['score'])} of 100{interval}"


def interval_name(figures: Summary) -> str:
    """`95 % interval`, or `interval` if the run does not record its width."""
    return f"{100 * figures['confidence']:g} % interval" if figures["confidence"] else "interval"


def interval_text(entry: Mapping[str, Any]) -> str:
    """`42–62`."""
    return ABSENT if entry["low"] is None else f"{trimmed(entry['low'])}–{trimmed(entry['high'])}"
