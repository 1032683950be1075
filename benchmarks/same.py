"""Does a change of the code change what it makes? Records what one checkout makes, and compares two records.

    python benchmarks/same.py record --checkout ../before --work /tmp/before
    python benchmarks/same.py record --checkout . --work /tmp/after --reopen /tmp/before
    python benchmarks/same.py compare /tmp/before /tmp/after
    python benchmarks/same.py time /tmp/before /tmp/after --pairs 5

Recorded: token ids, labels and ledger of the quickstart's data; the adapter of a training of six steps, its losses and the merged weights;
`qkit show --json` of that run; `qkit plan --json` of every recipe; the golden files; the help of every verb. `--reopen` has the checkout
open the run of another record: `show` must say the same, and that every stage is done.
`time` runs that training again in both checkouts, in alternating pairs, and prints the ratio of each pair and their median.
Only the command line is used, so any two commits can be compared.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

VERBS = ("run", "plan", "inspect", "data", "train", "evaluate", "merge", "export")
VERBS += ("serve", "verify", "bench", "report", "show", "push", "doctor", "adapters")
STAGES = ("data", "train", "evaluate", "merge")  # of the small run
CHANGING = re.compile(r"second|time|created|bytes|path|folder|started|finished|commit|git|host|versions|free|run\b")


def main() -> None:
    """Record or compare, as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    recorder = verbs.add_parser("record")
    recorder.add_argument("--checkout", type=Path, required=True)
    recorder.add_argument("--work", type=Path, required=True)
    recorder.add_argument("--reopen", type=Path, help="another record's folder")
    comparer = verbs.add_parser("compare")
    comparer.add_argument("before", type=Path)
    comparer.add_argument("after", type=Path)
    timer = verbs.add_parser("time")
    timer.add_argument("before", type=Path)
    timer.add_argument("after", type=Path)
    timer.add_argument("--pairs", type=int, default=5)
    given = parser.parse_args()
    if given.verb == "record":
        record(given.checkout.resolve(), given.work.resolve(), given.reopen)
    elif given.verb == "time":
        time_training(given.before, given.after, given.pairs)
    else:
        sys.exit(compare(given.before, given.after))


def record(checkout: Path, work: Path, reopen: Path | None) -> None:
    """Write `work/record.json`: what the checkout makes, by name."""
    work.mkdir(parents=True, exist_ok=True)
    made: dict[str, Any] = {"checkout": str(checkout)}
    recipes = {path.stem: path for path in sorted((checkout / "recipes").glob("*.yaml"))}
    for name, path in recipes.items():
        text = qkit(checkout, "plan", path, "--json", "--set", "serve.port=8000", check=False)
        made[f"plan {name}"] = steady(json.loads(text)) if text.startswith("{") else text
    for verb in VERBS:
        made[f"help {verb}"] = " ".join(qkit(checkout, verb, "--help").split())
    golden = sorted((checkout / "tests" / "golden").glob("*"))
    made["golden files"] = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in golden}

    qkit(checkout, "data", recipes["quickstart"], "--out", work / "whole")
    made["quickstart data"] = tables(work / "whole" / "data")

    small = work / "small.yaml"
    text = recipes["quickstart"].read_text().replace('rows: ":100"', 'rows: ":6"')
    small.write_text(text)
    changes = ["train.max_steps=6", "evaluate.max_new_tokens=8", "export.formats=[safetensors]", "bench.runtimes=[]"]
    for verb in STAGES:
        where = small if verb == "data" else work / "run"
        options = [option for change in changes for option in ("--set", change)] if verb == "data" else []
        qkit(checkout, verb, where, *(["--out", work / "run"] if verb == "data" else []), *options)
    run = work / "run"
    made["training rows"] = tables(run / "data")
    made["adapter"] = hashes(run / "train", "adapter*.safetensors")
    losses = [json.loads(line) for line in (run / "train" / "metrics.jsonl").read_text().splitlines()]
    made["losses"] = [row.get("loss") for row in losses]
    made["merged weights"] = hashes(run / "merge", "*.safetensors")
    made["scores"] = steady(json.loads((run / "evaluate" / "scores.json").read_text()))
    made["show"] = steady(json.loads(qkit(checkout, "show", run, "--json")))
    if reopen:
        made["show of the other's run"] = steady(json.loads(qkit(checkout, "show", reopen / "run", "--json")))
        stages = json.loads(qkit(checkout, "show", reopen / "run", "--json"))["stages"]
        made["nothing to do in the other's run"] = [stages[name]["status"] for name in STAGES]
    (work / "record.json").write_text(json.dumps(made, indent=1, sort_keys=True))


def compare(before: Path, after: Path) -> int:
    """Print what differs; the exit status tells whether anything does."""
    old, new = (json.loads((folder / "record.json").read_text()) for folder in (before, after))
    if "show of the other's run" in new:
        old["show of the other's run"] = old["show"]
        old["nothing to do in the other's run"] = ["done" for _ in STAGES]
    del old["checkout"], new["checkout"]
    differing = [name for name in sorted(old.keys() | new.keys()) if old.get(name) != new.get(name)]
    for name in sorted(old):
        print("DIFFERS" if name in differing else "same   ", name)
        if name in differing:
            print("   before:", json.dumps(old.get(name))[:600], "\n   after: ", json.dumps(new.get(name))[:600])
    return 1 if differing else 0


def time_training(before: Path, after: Path, pairs: int) -> None:
    """Print the seconds of the training of six steps in both records' checkouts, one after the other, the first of a pair in turn."""
    ratios = []
    for pair in range(pairs):
        order = (before, after) if pair % 2 == 0 else (after, before)
        seconds = {work: _training_seconds(work) for work in order}
        ratios.append(seconds[after] / seconds[before])
        print(f"before {seconds[before]:.2f} s, after {seconds[after]:.2f} s, ratio {ratios[-1]:.3f}", flush=True)
    print(f"median ratio {statistics.median(ratios):.3f}")


def _training_seconds(work: Path) -> float:
    checkout = Path(json.loads((work / "record.json").read_text())["checkout"])
    shutil.rmtree(work / "run" / "train")
    qkit(checkout, "train", work / "run", "--quiet")
    last = (work / "run" / "train" / "metrics.jsonl").read_text().splitlines()[-1]
    return float(json.loads(last)["seconds"])


def qkit(checkout: Path, *arguments: Any, check: bool = True) -> str:
    """What one `qkit` command of the checkout prints."""
    environment = {**os.environ, "PYTHONPATH": str(checkout), "COLUMNS": "120", "OMP_WAIT_POLICY": "PASSIVE"}
    done = subprocess.run(
        [sys.executable, "-m", "qkit", *map(str, arguments)],
        env=environment,
        cwd=checkout,
        text=True,
        capture_output=True,
        check=False,
    )
    if check and done.returncode:
        sys.exit(f"qkit {' '.join(map(str, arguments))} in {checkout}:\n{done.stderr[-3000:]}")
    return done.stdout


def tables(folder: Path) -> dict[str, str]:
    """A hash of the rows of each Parquet file."""
    import pyarrow.parquet as pq

    rows = {file.name: pq.read_table(file).to_pylist() for file in sorted(folder.glob("*.parquet"))}
    return {name: hashlib.sha256(json.dumps(found, default=str).encode()).hexdigest() for name, found in rows.items()}


def hashes(folder: Path, pattern: str) -> dict[str, str]:
    """The sha256 of each file below a folder."""
    found = sorted(folder.rglob(pattern))
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in found}


def steady(value: Any) -> Any:
    """A document without what differs between two runs of the same code: times, bytes measured, places."""
    if isinstance(value, dict):
        return {key: steady(item) for key, item in value.items() if not CHANGING.search(key)}
    if isinstance(value, list):
        return [steady(item) for item in value]
    return value


if __name__ == "__main__":
    main()
