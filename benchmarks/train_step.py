"""Training speed: qkit's batches and head against TRL's own paths, on the quickstart's model and rows, in turn in one process.

    python benchmarks/train_step.py runs/quickstart --steps 4 --repeats 3

Three ways train the same rows on the same NF4 base with the same adapter:
    qkit        rows of like length by token budget, no mask, head on labelled positions
    trl-padded  TRL's collator and head, the same batches of rows, with its masks
    trl-packed  TRL's packing (best-fit decreasing), the same tokens a step
A figure is real tokens per second of one optimizer step, the median over steps and repeats; the way that goes first changes every repeat.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from qkit.core.batching import IGNORED, TokenBudgetBatches
from qkit.core.device import detect
from qkit.core.files import read_json
from qkit.model import load, source, tokenizer
from qkit.run.directory import Run
from qkit.run.environment import environment
from qkit.tasks._conversation.collate import collate
from qkit.train.trainers import sft

WAYS = ("qkit", "trl-padded", "trl-packed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="a run directory whose stage `data` is done")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    run = Run.open(given.run)
    speeds: dict[str, list[float]] = {way: [] for way in WAYS}
    for repeat in range(given.repeats):
        for way in WAYS[repeat % 3 :] + WAYS[: repeat % 3]:
            speeds[way] += _speeds(run, way, given.steps)
            print(f"{way}: {median(speeds[way]):.0f} tokens/s", file=sys.stderr, flush=True)
    _write(given.out / "train_step.json", run, speeds, given)


def _speeds(run: Run, way: str, steps: int) -> list[float]:
    """Tokens per second of each step after the first, which warms up."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = _trainer(run, way, Path(folder))
        trainer.model.train()
        optimizer = trainer.create_optimizer()
        seconds = [_step(trainer, optimizer, batch) for batch in _batches(run, trainer, way, steps + 1)]
    return [tokens / spent for tokens, spent in seconds[1:]]


def _step(trainer: Any, optimizer: Any, batch: dict[str, Any]) -> tuple[int, float]:
    tokens = int(batch.pop("real"))
    items = (batch["labels"] != IGNORED).sum()
    begin = time.perf_counter()
    with trainer.accelerator.autocast():
        loss = trainer.compute_loss(trainer.model, batch, num_items_in_batch=items)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return tokens, time.perf_counter() - begin


def _trainer(run: Run, way: str, out: Path) -> Any:
    from datasets import Dataset
    from trl import SFTTrainer

    if way == "qkit":
        return sft.build_trainer(run, source.resolve(run.recipe.model), detect(), out)
    config = sft.sft_config(run.recipe, detect(), out)
    if way == "trl-packed":
        config.packing, config.max_length = True, run.recipe.data.batch_tokens
        config.dataset_kwargs = None
    base = load.load_base(source.resolve(run.recipe.model), run.recipe, detect())
    return SFTTrainer(
        model=base,
        args=config,
        train_dataset=Dataset.from_list(_rows(run)),
        processing_class=tokenizer.tokenizer_of(run.recipe.model),
        peft_config=sft.lora_config(run.recipe, base),
    )


def _batches(run: Run, trainer: Any, way: str, count: int) -> list[dict[str, Any]]:
    """`count` batches, each with its number of real tokens."""
    if way == "trl-packed":
        packs = [trainer.data_collator([dict(trainer.train_dataset[i])]) for i in range(count)]
        return [{**pack, "real": pack["input_ids"].numel()} for pack in packs]
    rows = _rows(run)
    chosen = list(
        TokenBudgetBatches([len(r["input_ids"]) for r in rows], run.recipe.data.batch_tokens, run.recipe.seed)
    )
    pad = read_json(run.need("data", "tokens.json"))["pad"]
    batches = []
    for indices in chosen[:count]:
        picked = [rows[i] for i in indices]
        batch = collate(picked, pad) if way == "qkit" else trainer.data_collator(picked)
        batches.append({**batch, "real": sum(len(r["input_ids"]) for r in picked)})
    return batches


def _rows(run: Run) -> list[dict[str, Any]]:
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(run.need("data", "train.parquet"), columns=["input_ids", "labels"])
    rows: list[dict[str, Any]] = table.to_pylist()
    return rows


def _write(file: Path, run: Run, speeds: dict[str, list[float]], given: argparse.Namespace) -> None:
    medians = {way: median(values) for way, values in speeds.items()}
    result = {
        "what": "training, real tokens per second of an optimizer step",
        "command": f"python benchmarks/train_step.py {given.run} --steps {given.steps} --repeats {given.repeats}",
        "date": dt.date.today().isoformat(),
        "batch_tokens": run.recipe.data.batch_tokens,
        "tokens_per_second": medians,
        "spread": {way: [min(values), max(values)] for way, values in speeds.items()},
        "times_as_fast": {way: medians["qkit"] / medians[way] for way in WAYS[1:]},
        "environment": environment(detect().to_dict()),
    }
    file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result["times_as_fast"]))


if __name__ == "__main__":
    main()
