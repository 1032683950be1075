"""Measures how fast a recipe trains on this machine: tokens per second, peak memory and MFU at a few batch sizes.

MFU is the arithmetic that training needs per second (speed.flops_per_token, with recomputed activations if the recipe uses them) divided by
what the device can do: a known card's bf16 peak, or else the fastest bf16 matrix product that torch reached in the same process.

    RUN/points/bN-lM/   a run directory per point, with its data stage    RUN/train.json   the figures
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from qkit import pipeline
from qkit.bench import record as bench_record
from qkit.bench.meter import driver_version
from qkit.core.device import Device, detect, limit_kernel_cache
from qkit.core.errors import RecipeError, StageFailed
from qkit.core.files import make_folder, read_json, write_json
from qkit.core.memory_meter import PeakMeter
from qkit.core.progress import Progress
from qkit.model import source
from qkit.model.config import shape_of
from qkit.plan import gpus, speed
from qkit.plan import plan as plan_plan
from qkit.recipe.load import from_dict
from qkit.recipe.schema import Recipe
from qkit.run.directory import Run
from qkit.run.environment import environment
from qkit.train.trainers import sft

FACTORS = (0.5, 1, 2)  # the default sweep, as multiples of the recipe's data.batch_tokens
MATRIX_PRODUCTS = 12  # timed; the fastest counts


@dataclass(frozen=True)
class Point:
    """A point of the sweep: data.batch_tokens and data.max_length."""

    batch_tokens: int
    max_length: int

    @property
    def name(self) -> str:
        return f"b{self.batch_tokens}-l{self.max_length}"


def points(recipe: Recipe, batch_tokens: Sequence[int], lengths: Sequence[int]) -> list[Point]:
    """The points of the sweep: every batch size with every row length that fits it. Empty sequences stand for the defaults.

    Raises:
        RecipeError: no row length fits a batch.
    """
    batches = batch_tokens or [int(factor * recipe.data.batch_tokens) for factor in FACTORS]
    max_lengths = lengths or [recipe.data.max_length]
    sweep = [Point(batch, length) for batch in batches for length in max_lengths if length <= batch]
    if not sweep:
        raise RecipeError(
            f"a row of {min(max_lengths)} tokens does not fit a batch of {', '.join(map(str, batches))} tokens; raise --batch-tokens or lower "
            "--length"
        )
    return sweep


def bench(recipe: Recipe, sweep: Sequence[Point], steps: int, out: Path, progress: Progress) -> dict[str, Any]:
    """Train each point for a few steps, and write `out/train.json`. The sweep continues after a point that fails (out of memory, as a rule).

    Raises:
        StageFailed: every point failed; the error is that of the first.
    """
    results: list[dict[str, Any]] = []
    failed: list[tuple[Point, StageFailed]] = []
    for point in progress.track(sweep, "bench train", len(sweep)):
        progress.notify(f"bench train: batches of {point.batch_tokens} tokens, rows of up to {point.max_length} tokens")
        try:
            results.append(_in_a_process(recipe, point, steps, out))
        except StageFailed as error:
            progress.notify(str(error))
            failed.append((point, error))
    if not results:
        raise failed[0][1]
    record = {
        "schema_version": bench_record.SCHEMA_VERSION,
        "recipe_sha256": recipe.sha256(),
        "points": results,
        "failed": [{**asdict(point), "why": str(error)} for point, error in failed],
        "environment": bench_record.with_hash({**environment(detect().to_dict()), "driver": driver_version()}),
    }
    write_json(out / "train.json", record)
    return record


def _in_a_process(recipe: Recipe, point: Point, steps: int, out: Path) -> dict[str, Any]:
    """Train a point in a new process, so that its peak memory includes nothing of the points before."""
    root = out / "points" / point.name
    make_folder(root)
    settings = recipe.model_dump(mode="json")
    settings["data"].update(batch_tokens=point.batch_tokens, max_length=point.max_length)
    # These settings do not affect the speed, and the recipe's schedule may need more steps than are run.
    settings["train"].update(
        max_steps=steps + 1, num_train_epochs=1.0, warmup_steps=0, logging_steps=1, save_steps=steps + 1
    )
    settings["train"]["lr_scheduler_type"] = "constant"
    run = Run.create(root, from_dict(settings, (), str(root)))
    run.save_recipe()
    with run.log("bench-train").open("w") as log:
        status = subprocess.run(
            [sys.executable, "-m", "qkit.commands.bench_training", str(root)], stdout=log, stderr=log, check=False
        ).returncode
    if status:
        last = run.log("bench-train").read_text(errors="replace").strip().splitlines()[-1:]
        raise StageFailed("bench train", root, run.log("bench-train"), last[0] if last else f"status {status}")
    result: dict[str, Any] = read_json(root / "point.json")
    return result


def measure(run: Run) -> dict[str, Any]:
    """Measure a point in its own process: tokenize, load and train. The first step is a warm-up and is not counted."""
    limit_kernel_cache()
    device = detect()
    pipeline.execute(run, "data")
    recipe = plan_plan.decided(run.recipe, device)
    run = Run(run.root, recipe)
    meter = PeakMeter(device)
    trainer = sft.build_trainer(run, source.resolve(recipe.model), device, run.root / "train")
    clock = _clock(trainer)
    trainer.add_callback(clock)
    trainer.train()
    split = read_json(run.need("data", "summary.json"))["splits"]["train"]
    share = split["labelled_tokens"] / split["tokens"]
    speeds = [tokens / seconds for tokens, seconds in clock.steps[1:]]
    peak_bytes = meter.peak_bytes()  # before the matrix products, which allocate too
    flops = median(speeds) * speed.flops_per_token(recipe, shape_of(recipe.model), share)
    achievable, reference = achievable_flops(device)
    return {
        "batch_tokens": recipe.data.batch_tokens,
        "max_length": recipe.data.max_length,
        "steps": len(speeds),
        "real_tokens_per_step": median(tokens for tokens, _ in clock.steps[1:]),
        "tokens_per_second": median(speeds),
        "tokens_per_second_range": [min(speeds), max(speeds)],
        "peak_bytes": peak_bytes,
        "meter": meter.meter,
        "flops_per_second": flops,
        "mfu": flops / achievable,
        "achievable_flops_per_second": achievable,
        "against": reference,
    }


def _clock(trainer: Any) -> Any:
    """A trainer callback that records (tokens without padding, seconds) of every optimizer step in `steps`."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.steps: list[tuple[int, float]] = []
            self.begin, self.tokens = 0.0, 0

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.begin, self.tokens = time.perf_counter(), trainer.real_tokens

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.steps.append((trainer.real_tokens - self.tokens, time.perf_counter() - self.begin))

    return Clock()


def achievable_flops(device: Device) -> tuple[float, str]:
    """The floating-point operations per second that MFU is relative to, and a description of their source."""
    card = gpus.find(device)
    if card and card.bf16_flops:
        return card.bf16_flops, f"the {card.title}'s peak"
    import torch

    side = device.busy_matrix_side
    a, b = (torch.randn(side, side, dtype=torch.bfloat16, device=device.torch_device) for _ in range(2))
    seconds = []
    for _ in range(MATRIX_PRODUCTS):
        begin = time.perf_counter()
        torch.mm(a, b)[0, 0].item()  # waits for the device
        seconds.append(time.perf_counter() - begin)
    flops = 2 * side**3 / min(seconds)
    return flops, f"{flops / 1e9:,.0f} GFLOP/s of bf16 products here"


if __name__ == "__main__":
    _run = Run.open(Path(sys.argv[1]))
    write_json(_run.root / "point.json", measure(_run))
