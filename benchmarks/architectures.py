"""Twelve architectures, tiny, in 4 and in 16 bit, through every stage: is what was planned what was trained, and was every refusal said before?

    python benchmarks/architectures.py
    python benchmarks/architectures.py --only mixtral --only gpt2      a part; what the results file has of the others stays

Each is a model of two layers, hidden 64, built from its config with random weights
(tests/helpers/tiny_models.py), and a default recipe of few steps.
The formats are one or two of each exporter's that the plan does not refuse, or those of --format; those for vLLM are left out, since each would
need a server of its own to be verified. A row is about a minute on two idle cores, half of it ONNX.
A row is right where the plan's adapter bytes are the trained ones, and every stage ended well that no refusal was said for.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "tests"))

from helpers.tiny_models import ARCHITECTURES, build  # noqa: E402
from qkit import pipeline  # noqa: E402
from qkit.core.device import detect  # noqa: E402
from qkit.core.errors import QkitError  # noqa: E402
from qkit.core.files import read_json, write_json  # noqa: E402
from qkit.model.config import shape_of  # noqa: E402
from qkit.plan import deployable, stage_memory  # noqa: E402
from qkit.recipe.load import from_dict  # noqa: E402
from qkit.recipe.registry import format_names  # noqa: E402
from qkit.recipe.schema import Recipe  # noqa: E402
from qkit.run.directory import Run  # noqa: E402
from qkit.run.environment import environment  # noqa: E402
from qkit.tensors.shards import tensor_specs  # noqa: E402

STAGES = ("data", "train", "evaluate", "merge", "export", "verify")
WORDS = ("red", "green", "blue", "grey", "pink", "teal", "gold", "lime")
REASON = 160  # characters
SPREAD = 0.05  # of the random weights: larger ones magnify every rounding
STEPS = 4
FORMATS = ("safetensors", "safetensors-fp16", "gguf-f16", "gguf-q8_0", "onnx-fp32", "bnb-nf4")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", action="append", choices=tuple(ARCHITECTURES), default=[])
    parser.add_argument("--format", action="append", choices=tuple(format_names()), default=[])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "architectures.json")
    given = parser.parse_args()
    rows = {} if not given.out.is_file() else {_key(row): row for row in read_json(given.out)["rows"]}
    for name in given.only or ARCHITECTURES:
        for quantization in ("nf4", "bf16"):
            with tempfile.TemporaryDirectory() as work:
                row = _row(Path(work), name, quantization, given.format or FORMATS)
            rows[_key(row)] = row
            print(json.dumps(row), flush=True)
            _write(given.out, [rows[key] for key in sorted(rows)], given.format)
    if wrong := [" ".join(_key(row)) for row in rows.values() if not row["right"]]:
        sys.exit(f"not right: {', '.join(wrong)}")


def _key(row: dict[str, Any]) -> tuple[str, str]:
    return row["architecture"], row["quantization"]


def _row(work: Path, name: str, quantization: str, formats: Sequence[str]) -> dict[str, Any]:
    how, refused = _recipe(build(work / "model", name, spread=SPREAD), work, quantization, formats)
    run, begin = Run.create(work / "run", how), time.perf_counter()
    items = stage_memory.train_items(how, shape_of(how.model), detect(), None)
    planned = next(item.bytes for item in items if item.name == "adapter")
    ended: dict[str, str] = {}
    for stage in STAGES:
        ended[stage] = _ended(run, stage)
        if ended[stage] != "ok" and stage != "verify":
            break
    trained = _trained_bytes(run)
    return {
        "architecture": name,
        "quantization": quantization,
        "planned_adapter_bytes": planned,
        "trained_adapter_bytes": trained,
        "stages": ended,
        "formats": list(how.export.formats),
        "refused": refused,
        "seconds": round(time.perf_counter() - begin, 1),
        "right": planned == trained and list(ended.values()) == ["ok"] * len(STAGES),
    }


def _recipe(model: Path, work: Path, quantization: str, formats: Sequence[str]) -> tuple[Recipe, dict[str, str]]:
    """The default recipe with a few rows and steps, those of `formats` that can be had, and the first words of why others cannot."""
    turns = [
        [{"role": "user", "content": f"say {word} {n}"}, {"role": "assistant", "content": word}]
        for n in range(4)
        for word in WORDS
    ]
    file = work / "rows.jsonl"
    file.write_text("".join(json.dumps({"messages": pair}) + "\n" for pair in turns), encoding="utf-8")
    raw: dict[str, Any] = {
        "task": "chat",
        "model": {"source": str(model)},
        "data": {"train": [{"source": str(file), "rows": "8:"}], "test": [{"source": str(file), "rows": ":8"}]},
        "train": {"max_steps": STEPS},
        "evaluate": {"max_new_tokens": 8},
        "quantization": {"load_in_4bit": quantization == "nf4"},
        "export": {"formats": list(format_names()), "method": "round-to-nearest"},
        "bench": {"runtimes": ["transformers"]},
    }
    refused = {
        refusal.format: refusal.reason[:REASON] for refusal in deployable.refusals(from_dict(raw, [], "benchmarks"))
    }
    raw["export"]["formats"] = [name for name in formats if name not in refused and not name.startswith("vllm")]
    return from_dict(raw, [], "benchmarks"), refused


def _ended(run: Run, stage: str) -> str:
    try:
        pipeline.execute(run, stage)
    except QkitError as error:
        return str(error).splitlines()[0]
    return "ok"


def _trained_bytes(run: Run) -> int | None:
    """Of the adapter that was trained, in the fp32 that training holds it in."""
    file = run.folder("train") / "adapter" / "adapter_model.safetensors"
    if not file.is_file():
        return None
    shapes: Sequence[Sequence[int]] = [spec["shape"] for spec in tensor_specs(file).values()]
    return 4 * sum(_product(shape) for shape in shapes)


def _product(sizes: Sequence[int]) -> int:
    total = 1
    for size in sizes:
        total *= size
    return total


def _write(out: Path, rows: Sequence[dict[str, Any]], formats: Sequence[str]) -> None:
    write_json(
        out,
        {
            "what": "planned and trained adapter bytes, and how every stage ended, by architecture and quantization",
            "command": " ".join(["python benchmarks/architectures.py", *(f"--format {name}" for name in formats)]),
            "date": dt.date.today().isoformat(),
            "environment": environment(detect().to_dict()),
            "rows": list(rows),
        },
    )


if __name__ == "__main__":
    main()
