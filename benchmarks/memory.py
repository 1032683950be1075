"""Memory: what qkit plans for a training step against what the step takes, over shapes, quantizations and batches.

    python benchmarks/memory.py                 every CPU point, each in a process of its own
    python benchmarks/memory.py --only 7B       the points whose name holds a word
    python benchmarks/memory.py --gpu           the points for a CUDA card of 24 GB and more

A point is a model of a real shape with random weights, two steps of qkit's own trainer, and three figures beside each other: the plan; what
the plan's meter read (resident set, or CUDA's allocator) over the whole process; and the tensors alive at the peak of the second step,
line by line. A process starts bare, so nothing that an earlier point left behind is counted. Points that are in the results already are
kept, unless --again is given.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from memory_plot import plot
from memory_points import cpu_points, gpu_points, recipe_of

OUT = Path("benchmarks/results")
NICENESS = 15


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--only", default="", help="a part of the names of the points to measure")
    parser.add_argument("--again", action="store_true", help="measure points anew that are in the results already")
    parser.add_argument("--plan-only", action="store_true", help="keep the measurements, plan them anew")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--point", help=argparse.SUPPRESS)
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    if given.point:
        print(json.dumps(measure(json.loads(given.point))))
        return
    file = given.out / ("memory-gpu.json" if given.gpu else "memory.json")
    chosen = [p for p in (gpu_points() if given.gpu else cpu_points()) if given.only in p["name"]]
    _sweep(file, chosen, given)


def _sweep(file: Path, chosen: list[dict[str, Any]], given: argparse.Namespace) -> None:
    results = {r["name"]: r for r in json.loads(file.read_text())["points"]} if file.exists() else {}
    for point in chosen:
        if not given.plan_only and (given.again or point["name"] not in results):
            measured = _in_own_process(point, given.gpu)
            if measured is None:
                continue
            results[point["name"]] = {**point, **measured, **_where_and_when()}
        if point["name"] in results:
            results[point["name"]] |= planned(results[point["name"]])
            _say(results[point["name"]])
            _write(file, list(results.values()))


def _where_and_when() -> dict[str, str]:
    """What a measurement depends on: points are measured on different machines, on different days."""
    from qkit.core.device import detect

    return {"hardware": detect().name, "date": dt.date.today().isoformat()}


def _in_own_process(point: dict[str, Any], gpu: bool) -> dict[str, Any] | None:
    """A point's figures; None when it failed, with its words on stderr."""
    command = ["nice", "-n", str(NICENESS), sys.executable, __file__, "--point", json.dumps(point)]
    # Threads that wait asleep: beside other work on the machine, spinning ones slow a step down tenfold.
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "passive"}
    if not gpu:
        environment["QKIT_DEVICE"] = "cpu"
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        print(f"{point['name']}: failed\n{done.stderr[-2000:]}", file=sys.stderr, flush=True)
        return None
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return figures


def measure(point: dict[str, Any]) -> dict[str, Any]:
    """Two steps of one point, in this process."""
    from qkit.core.device import detect, limit_kernel_cache
    from qkit.core.memory_meter import PeakMeter

    limit_kernel_cache()
    device = detect()
    meter = PeakMeter(device)
    with tempfile.TemporaryDirectory() as scratch:
        begin = time.perf_counter()
        trainer, watcher = _trainer(point, Path(scratch), device)
        built = time.perf_counter()
        before = meter.readings()
        trainer.train()
        done = time.perf_counter()
    items = watcher.alive.items()
    return {
        "meter": meter.meter,
        "measured_peak_bytes": meter.peak_bytes(),
        "readings": meter.readings(),
        "readings_before_training": before,
        "tensors_alive": {"peak_bytes": sum(items.values()), "items": items},
        "build_seconds": built - begin,
        "two_steps_seconds": done - built,
        "labelled_tokens": point["rows"] * (point["length"] - _start(point)),
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
    }


def _trainer(point: dict[str, Any], scratch: Path, device: Any) -> tuple[Any, Any]:
    """qkit's trainer on random rows, and the callback that watches its second step."""
    import random_model

    from qkit.core import memory_watch
    from qkit.model.adapters import methods
    from qkit.plugins.task import open_task
    from qkit.train.fast.heap import trim_between_layers
    from qkit.train.trainer import trainer_class
    from qkit.train.trainers import sft

    how = recipe_of(point, random_model.write_config(point["config"], scratch / "model"))
    config = sft.sft_config(how, device, scratch)
    config.save_strategy = "no"
    base = random_model.build(scratch / "model", how, device)
    if how.method == "full":
        methods.with_method(base, (), how)
    trainer = trainer_class()(
        model=base,
        args=config,
        train_dataset=_rows(point),
        processing_class=_tokenizer(),
        peft_config=sft.lora_config(how, base) if how.method == "lora" else None,
        pad=0,
        batch_tokens=how.data.batch_tokens,
        collator=open_task(how.task).collate,
        labelled_head=point.get("labelled_head", device.uses_labelled_head),
    )
    if device.frees_through_malloc:
        trim_between_layers(trainer.base_model)
    watcher = memory_watch.step_watcher()
    trainer.add_callback(watcher)
    return trainer, watcher


def _rows(point: dict[str, Any]) -> Any:
    """Rows of random ids for two batches, of which the last part carries loss."""
    import random

    from datasets import Dataset

    draw = random.Random(0)
    length, count = point["length"], 2 * point["rows"] * point.get("accumulation", 1)
    start, vocabulary = _start(point), point["config"]["vocab_size"]
    rows = [[draw.randrange(1, vocabulary) for _ in range(length)] for _ in range(count)]
    return Dataset.from_dict({"input_ids": rows, "labels": [[-100] * start + ids[start:] for ids in rows]})


def _start(point: dict[str, Any]) -> int:
    """Where the loss of a row begins; never at its first token, which nothing predicts."""
    return max(1, point["length"] - round(point["length"] * point["labelled"]))


def _tokenizer() -> Any:
    """The trainer wants one; nothing is tokenized."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<pad>": 0, "<end>": 1}, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<end>")


def planned(result: dict[str, Any]) -> dict[str, Any]:
    """The plan for a point that was measured, and its error against the meter that it predicts."""
    import random_model

    from qkit.core.device import detect
    from qkit.plan import plan as plan_plan
    from qkit.plan._known import Known
    from qkit.plan._overhead import KERNELS

    with tempfile.TemporaryDirectory() as scratch:
        how = recipe_of(result, random_model.write_config(result["config"], Path(scratch)))
        items = plan_plan.predicted_items(how, detect(), Known(result["labelled_tokens"]))
    items.pop(KERNELS, None)  # a point's batches are all of one shape
    peak = sum(items.values())
    return {
        "predicted": items,
        "predicted_peak_bytes": peak,
        "error": peak / result["measured_peak_bytes"] - 1,
    }


def _say(result: dict[str, Any]) -> None:
    figures = [result[key] / 2**30 for key in ("predicted_peak_bytes", "measured_peak_bytes")]
    alive = result["tensors_alive"]["peak_bytes"] / 2**30
    print(
        f"{result['name']}: plan {figures[0]:.3f}, measured {figures[1]:.3f} GiB ({result['error']:+.1%}); "
        f"tensors {alive:.3f} GiB; {result['two_steps_seconds']:.0f} s",
        file=sys.stderr,
        flush=True,
    )


def _write(file: Path, points: list[dict[str, Any]]) -> None:
    from qkit.core.device import detect
    from qkit.run.environment import environment

    errors = [point["error"] for point in points]
    result = {
        "what": "peak memory of training: planned, read off the meter, and of the tensors alive, by line",
        "command": f"python benchmarks/memory.py{' --gpu' if 'gpu' in file.name else ''}",
        "measured_on": sorted({point["hardware"] for point in points}),
        "planned_on": dt.date.today().isoformat(),
        "median_error": median(map(abs, errors)),
        "worst_over": max(errors),
        "worst_under": min(errors),
        "points": points,
        "environment": environment(detect().to_dict()),
    }
    file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    file.with_suffix(".svg").write_text(plot(points), encoding="utf-8")


if __name__ == "__main__":
    main()
