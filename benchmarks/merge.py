"""Ways to merge an adapter that was trained on a 4-bit base, each against the live model: which rule wins when.

    python benchmarks/merge.py runs/quickstart runs/rank-8 runs/rank-64 --rows 32

Each run directory holds the stages data and train (such as `qkit train recipes/quickstart.yaml --set lora.r=8`). Beside qkit's two merges stand
the rules of others, rebuilt from what they document and run on the same adapter:
    peft, 4-bit           merge_and_unload on the quantized model: the delta is added and the sum quantized again
    peft, after a forward the same on a CPU whose first forward has repacked the 4-bit weights
    peft, 16-bit          merge_and_unload on the base in bf16
    axolotl               the delta, in bf16, added to the dequantized weights in bf16
    unsloth               the delta added to the base's 16-bit weights in fp32 by one addmm, rounded once
and the two merges quantized to NF4 again, as one does who serves in 4 bit. Figures are per completion token of the first held-out rows.
"""

from __future__ import annotations

import argparse
import datetime as dt
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from qkit.core.device import detect
from qkit.core.files import write_json
from qkit.core.memory_meter import PeakMeter
from qkit.measure import held_out, parity, scores
from qkit.measure import reference as measure_reference
from qkit.merging.folder import write_folder
from qkit.model import load, source
from qkit.run.directory import Run
from qkit.run.environment import environment
from qkit.runtimes.transformers import TransformersRuntime
from qkit.tensors.lora_deltas import Deltas

IDS = 16  # tokens of the forward that repacks the weights


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "runs", type=Path, nargs="+", help="run directories; the first one with every rule, others with the first four"
    )
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {
        "what": "mean and p99 KL(live || merged), top-1 agreement, held-out loss; nats per completion token",
        "command": f"python benchmarks/merge.py {' '.join(run.name for run in given.runs)} --rows {given.rows}",
        "date": dt.date.today().isoformat(),
        "environment": environment(detect().to_dict()),
        "runs": [],
    }
    for index, folder in enumerate(given.runs):
        result["runs"].append(_measured(Run.open(folder), given.rows, every_rule=index == 0))
        write_json(given.out / "merge.json", result)
    print(_table(result))


def _measured(run: Run, count: int, every_rule: bool) -> dict[str, Any]:
    rows = held_out.held_out_of(run).rows[:count]
    reference = measure_reference.recorded(run, rows)
    how = run.recipe
    described = {
        "name": run.root.name,
        "r": how.lora.r,
        "lora_alpha": how.lora.lora_alpha,
        "learning_rate": how.train.learning_rate,
        "steps": how.train.max_steps,
        "live_loss": scores.mean_loss([row.targets for row in reference.scores]),
        "base": parity.measure(reference, reference.base).to_dict(),
        "rules": {},
    }
    with tempfile.TemporaryDirectory(dir=run.root) as work:
        for name, make in _rules(run, Path(work), every_rule):
            print(f"{run.root.name}: {name}", file=sys.stderr, flush=True)
            runtime = TransformersRuntime(make().eval(), PeakMeter(detect()))
            found = parity.measure(reference, runtime.score(rows))
            described["rules"][name] = {**found.to_dict(), "lost": found.lost}
            runtime.close()
    measure_reference.forget(run)
    return described


def _rules(run: Run, work: Path, every_rule: bool) -> Iterator[tuple[str, Callable[[], Any]]]:
    for base in ("dequantized", "16bit"):
        write_folder(run, work / base, base)
        yield base, lambda base=base: _opened(work / base)
        yield f"{base}, then NF4", lambda base=base: _requantized(run, work / base)
    if every_rule:
        yield "peft, 4-bit", lambda: _peft_on_4_bit(run, forward=False)
        yield "peft, after a forward", lambda: _peft_on_4_bit(run, forward=True)
        yield "peft, 16-bit", lambda: PeftModel.from_pretrained(_opened(_base(run)), _adapter(run)).merge_and_unload()
        yield "axolotl", lambda: _added(run, _dequantized(run), _in_bf16)
        yield "unsloth", lambda: _added(run, _opened(_base(run)), _by_addmm)


def _base(run: Run) -> Path:
    return source.resolve(run.recipe.model)


def _adapter(run: Run) -> str:
    return str(run.need("train", "adapter"))


def _opened(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.bfloat16)


def _requantized(run: Run, folder: Path) -> Any:
    loaded = load.load_base(folder, run.recipe, detect())
    source.dequantize(loaded)
    return loaded


def _dequantized(run: Run) -> Any:
    return _requantized(run, _base(run))


def _peft_on_4_bit(run: Run, forward: bool) -> Any:
    """PEFT's merge of the quantized model, dequantized before it is asked anything: the same numbers, sooner."""
    live_model = PeftModel.from_pretrained(load.load_base(_base(run), run.recipe, detect()), _adapter(run)).eval()
    if forward:
        with torch.inference_mode():
            live_model(torch.arange(IDS)[None])
    merged = live_model.merge_and_unload()
    source.dequantize(merged)
    return merged


def _added(run: Run, loaded: Any, add: Callable[[torch.Tensor, Any], torch.Tensor]) -> Any:
    deltas = Deltas(Path(_adapter(run)))
    with torch.no_grad():
        for name, parameter in loaded.named_parameters():
            if (change := deltas.low_rank(name, transposed=False)) is not None:
                parameter.data = add(parameter.data, change)
    deltas.check_all_used()
    return loaded


def _in_bf16(weight: torch.Tensor, change: Any) -> torch.Tensor:
    return weight + ((change.up @ change.down) * change.scaling).to(weight.dtype)


def _by_addmm(weight: torch.Tensor, change: Any) -> torch.Tensor:
    return torch.addmm(weight.float(), change.up, change.down, alpha=change.scaling).to(weight.dtype)


def _table(result: dict[str, Any]) -> str:
    lines = []
    for run in result["runs"]:
        lines += [
            f"\n{run['name']}: rank {run['r']}, learning rate {run['learning_rate']:g}, {run['steps']} steps",
            f"held-out loss {run['live_loss']:.4f} live, {run['base']['heldout_loss']:.4f} base\n",
            "| merge | mean KL | p99 KL | top-1 | held-out loss | |",
            "|---|---|---|---|---|---|",
        ]
        for name, found in run["rules"].items():
            figures = (
                f"{found['kl_mean']:.4f} | {found['kl_p99']:.3f} | {found['top1']:.3f} | {found['heldout_loss']:.4f}"
            )
            lines.append(f"| {name} | {figures} | {'lost' if found['lost'] else ''} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
