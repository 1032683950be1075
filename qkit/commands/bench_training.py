"""How fast a recipe trains here: real tokens per second, peak memory and MFU, at a few sizes of batch; each in a process of its own.

MFU is the arithmetic that training needs (roofline.flops_per_token, recomputed activations included where the recipe asks for them)
over what the device can do: a known card's bf16 peak, else the fastest bf16 matrix product that torch was seen to do in the same process.

    RUN/points/bN-lM/   a run directory for each point, with its data stage    RUN/train.json   the figures
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
from qkit.bench.meter import driver
from qkit.core.device import detect, limit_kernel_cache
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

FACTORS = (0.5, 1, 2)  # of the recipe's batch, where nothing else is asked for
SIDES = {"cuda": 8192}  # of the square matrices whose product is timed: enough for a card to be busy
SIDE = 2048  # on another device
PRODUCTS = 12


@dataclass(frozen=True)
class Point:
    """One size of batch: tokens, and the longest row that is taken."""

    batch_tokens: int
    max_length: int

    @property
    def name(self) -> str:
        return f"b{self.batch_tokens}-l{self.max_length}"


def points(how: Recipe, batch_tokens: Sequence[int], lengths: Sequence[int]) -> list[Point]:
    """The sweep: every batch with every length that fits it.

    Raises:
        RecipeError: no length fits a batch.
    """
    wanted = batch_tokens or [int(factor * how.data.batch_tokens) for factor in FACTORS]
    longest = lengths or [how.data.max_length]
    found = [Point(batch, length) for batch in wanted for length in longest if length <= batch]
    if not found:
        raise RecipeError(
            f"no batch of {', '.join(map(str, wanted))} tokens holds a row of {min(longest)}: raise --batch-tokens or lower --length"
        )
    return found


def bench(how: Recipe, sweep: Sequence[Point], steps: int, out: Path, progress: Progress) -> dict[str, Any]:
    """Train each point for a few steps, and write `out/train.json`. A point that fails, for want of memory as a rule, ends no sweep.

    Raises:
        StageFailed: every point's process died; the log of the first says why.
    """
    found: list[dict[str, Any]] = []
    failed: list[tuple[Point, StageFailed]] = []
    for point in progress.track(sweep, "bench train", len(sweep)):
        progress.say(f"bench train: batches of {point.batch_tokens} tokens, rows of up to {point.max_length}")
        try:
            found.append(_in_a_process(how, point, steps, out))
        except StageFailed as error:
            progress.say(str(error))
            failed.append((point, error))
    if not found:
        raise failed[0][1]
    record = {
        "schema_version": bench_record.SCHEMA_VERSION,
        "recipe_sha256": how.sha256(),
        "points": found,
        "failed": [{**asdict(point), "why": str(error)} for point, error in failed],
        "environment": bench_record.sealed({**environment(detect().to_dict()), "driver": driver()}),
    }
    write_json(out / "train.json", record)
    return record


def _in_a_process(how: Recipe, point: Point, steps: int, out: Path) -> dict[str, Any]:
    """Memory has to be measured from nothing, so each point has an interpreter to itself."""
    root = out / "points" / point.name
    make_folder(root)
    changed = how.model_dump(mode="json")
    changed["data"].update(batch_tokens=point.batch_tokens, max_length=point.max_length)
    # Speed depends on none of these, and a schedule for the whole training may be longer than a few steps.
    changed["train"].update(
        max_steps=steps + 1, num_train_epochs=1.0, warmup_steps=0, logging_steps=1, save_steps=steps + 1
    )
    changed["train"]["lr_scheduler_type"] = "constant"
    run = Run.create(root, from_dict(changed, (), str(root)))
    run.save_recipe()
    with run.log("bench-train").open("w") as log:
        status = subprocess.run(
            [sys.executable, "-m", "qkit.commands.bench_training", str(root)], stdout=log, stderr=log, check=False
        ).returncode
    if status:
        last = run.log("bench-train").read_text(errors="replace").strip().splitlines()[-1:]
        raise StageFailed("bench train", root, run.log("bench-train"), last[0] if last else f"status {status}")
    measured: dict[str, Any] = read_json(root / "point.json")
    return measured


def measure(run: Run) -> dict[str, Any]:
    """In the point's own process: tokenize, load, train; the first step warms up and is in no figure of speed."""
    limit_kernel_cache()
    device = detect()
    pipeline.execute(run, "data")
    how = plan_plan.decided(run.recipe, device)
    run = Run(run.root, how)
    meter = PeakMeter(device)
    trainer = sft.build_trainer(run, source.resolve(how.model), device, run.root / "train")
    clock = _clock(trainer)
    trainer.add_callback(clock)
    trainer.train()
    split = read_json(run.need("data", "summary.json"))["splits"]["train"]
    share = split["labelled_tokens"] / split["tokens"]
    speeds = [tokens / seconds for tokens, seconds in clock.steps[1:]]
    peak_bytes = meter.peak_bytes()  # before matrices are multiplied
    flops = median(speeds) * speed.flops_per_token(how, shape_of(how.model), share)
    best, against = achievable()
    return {
        "batch_tokens": how.data.batch_tokens,
        "max_length": how.data.max_length,
        "steps": len(speeds),
        "real_tokens_per_step": median(tokens for tokens, _ in clock.steps[1:]),
        "tokens_per_second": median(speeds),
        "tokens_per_second_range": [min(speeds), max(speeds)],
        "peak_bytes": peak_bytes,
        "meter": meter.meter,
        "flops_per_second": flops,
        "mfu": flops / best,
        "achievable_flops_per_second": best,
        "against": against,
    }


def _clock(trainer: Any) -> Any:
    """A callback that keeps (real tokens, seconds) of every optimizer step."""
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


def achievable() -> tuple[float, str]:
    """Operations per second that MFU is measured against, and where the figure is from."""
    card = gpus.find(detect())
    if card and card.bf16_flops:
        return card.bf16_flops, f"the {card.title}'s peak"
    import torch

    kind = detect().kind
    side = SIDES.get(kind, SIDE)
    a, b = (torch.randn(side, side, dtype=torch.bfloat16, device=kind) for _ in range(2))
    seconds = []
    for _ in range(PRODUCTS):
        begin = time.perf_counter()
        torch.mm(a, b)[0, 0].item()  # waits for the device
        seconds.append(time.perf_counter() - begin)
    best = 2 * side**3 / min(seconds)
    return best, f"{best / 1e9:,.0f} GFLOP/s of bf16 products here"


if __name__ == "__main__":
    _run = Run.open(Path(sys.argv[1]))
    write_json(_run.root / "point.json", measure(_run))
