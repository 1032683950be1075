"""Every format of one run beside the others: bytes, load time, memory, speed, distance to what was trained, and score.

    qkit run recipes/quickstart.yaml --out runs/formats --set export.formats=all
    python benchmarks/formats.py runs/formats

Benches every export of the run (a few rounds each, at 1 and 8 requests at once), takes distance and score from its `verify`, and writes
benchmarks/results/formats.json, the table formats.md, and two charts: closeness against size and against speed. An artifact that no other
beats in both is on the front. Times to the first token and between tokens are those of one request at a time.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from markupsafe import Markup

from qkit import pipeline
from qkit.bench import stage as bench_stage
from qkit.core import figures as core_figures
from qkit.core.device import detect
from qkit.core.files import write_json, write_text
from qkit.measure.artifacts import artifacts
from qkit.recipe.load import load
from qkit.report import bench_charts, summary
from qkit.report.bench_charts import MB
from qkit.run.directory import Run
from qkit.run.environment import environment


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="a run directory whose stages up to verify are done")
    parser.add_argument("--set", action="append", default=["bench.repeats=2"], metavar="A.B=C")
    parser.add_argument("--artifact", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    run = Run(given.run, load(given.run / "recipe.yaml", given.set))
    if given.artifact:
        print(json.dumps(_bench(run, given.artifact)))
        return
    rows = [_row(run, name, records) for name, records in _benched(run, given.set).items()]
    result = {
        "what": "formats of one run: bytes, load, memory, speed, distance to the live adapter, score",
        "command": f"python benchmarks/formats.py {' '.join(sys.argv[1:])}",
        "date": dt.date.today().isoformat(),
        "formats": rows,
        "environment": environment(detect().to_dict()),
    }
    write_json(given.out / "formats.json", result)
    write_text(given.out / "formats.md", _markdown(rows))
    for name, chart in (("size", _against_size(rows)), ("speed", _against_speed(rows))):
        write_text(given.out / f"formats-{name}.svg", bench_charts.standalone(str(chart)))
    print(_markdown(rows))


def _benched(run: Run, settings: list[str]) -> dict[str, list[dict[str, Any]]]:
    """Bench records of each artifact, by name, each from a process of its own, so that its memory is its own."""
    found = {}
    for artifact in artifacts(run):
        print(f"formats: {artifact.name}", file=sys.stderr, flush=True)
        command = [sys.executable, __file__, str(run.root), "--artifact", artifact.name]
        command += [f"--set={text}" for text in settings]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode == 0:
            found[artifact.name] = json.loads(done.stdout.splitlines()[-1])
    return found


def _bench(run: Run, name: str) -> list[dict[str, Any]]:
    artifact = next(artifact for artifact in artifacts(run) if artifact.name == name)
    with tempfile.TemporaryDirectory() as folder:
        bench_stage.bench_artifact(run, artifact, bench_stage.held_out_prompts(run), Path(folder))
        return [json.loads(file.read_text(encoding="utf-8")) for file in sorted(Path(folder).glob("*.json"))]


def _row(run: Run, name: str, records: list[dict[str, Any]]) -> dict[str, Any]:
    figures = summary.summary(run, pipeline.statuses(run))
    parity, score = figures["parity"].get(name, {}), figures["scores"].get(name, {})
    fastest = max(records, key=lambda record: record["output_tokens_per_second"])
    single = min(records, key=lambda record: record["concurrency"])
    return {
        "format": name,
        "runtime": fastest["runtime"],
        "disk_bytes": fastest["disk_bytes"],
        "startup_seconds": fastest["startup_seconds"],
        "peak_bytes": max(record["peak_bytes"] for record in records),
        "tokens_per_second": fastest["output_tokens_per_second"],
        "at_once": fastest["concurrency"],
        "ttft_seconds": single["ttft_seconds"]["p50"],
        "tpot_seconds": single["tpot_seconds"]["p50"],
        **{key: parity.get(key) for key in ("kl_mean", "kl_p99", "top1", "status", "over")},
        **{key: score.get(key) for key in ("score", "low", "high", "heldout_loss")},
    }


def _against_size(rows: list[dict[str, Any]]) -> Markup:
    return bench_charts.against_size(_points(rows, lambda row: row["disk_bytes"] / MB))


def _against_speed(rows: list[dict[str, Any]]) -> Markup:
    points = _points(rows, lambda row: row["tokens_per_second"])
    return bench_charts.closeness_chart("speed", points, bench_charts.pareto(points), "output tokens per second")


def _points(rows: list[dict[str, Any]], cost: Callable[[Any], float]) -> dict[str, tuple[float, float]]:
    """Cost and closeness by format; an adapter apart has its base's weights elsewhere."""
    whole = [row for row in rows if row["kl_mean"] is not None and row["format"] != "vllm-adapter"]
    return {row["format"]: (cost(row), bench_charts.closeness(row["kl_mean"])) for row in whole}


def _markdown(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| format | runtime | MB | start s | peak GiB | TTFT ms | TPOT ms | tokens/s | mean KL | p99 KL | top-1 | held-out loss "
        "| score | gate |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|---|",
    ]
    for r in rows:
        cells = (
            r["format"],
            r["runtime"],
            core_figures.fixed(r["disk_bytes"] / MB, 0),
            core_figures.fixed(r["startup_seconds"]),
            core_figures.gib_text(r["peak_bytes"]),
            core_figures.ms_text(r["ttft_seconds"]),
            core_figures.ms_text(r["tpot_seconds"]),
            f"{core_figures.fixed(r['tokens_per_second'], 0)} (at {r['at_once']})",
            core_figures.kl_text(r["kl_mean"]),
            core_figures.fixed(r["kl_p99"], 3),
            core_figures.percent(r["top1"]),
            core_figures.fixed(r["heldout_loss"], 4),
            core_figures.fixed(r["score"], 0),
            r["status"] or core_figures.ABSENT,
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
