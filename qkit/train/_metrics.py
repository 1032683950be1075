"""train/metrics.jsonl: a line for each logged step, and for each evaluation of the validation rows."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from qkit.core.memory_meter import PeakMeter
from qkit.core.progress import Bar
from qkit.train import validation


def recorder(file: Path, bar: Bar, meter: PeakMeter, trainer: Any, resumed_at: int) -> Any:
    """A callback that writes metrics.jsonl and advances the bar. Lines after the checkpoint that training resumes from are removed."""
    from transformers import TrainerCallback

    earlier = [line for line in lines(file) if line["step"] <= resumed_at] if resumed_at else []
    file.write_text("".join(json.dumps(line) + "\n" for line in earlier), encoding="utf-8")
    steps_before = [line for line in earlier if "loss" in line]
    tokens_before = steps_before[-1]["tokens"] if steps_before else 0
    seconds_before = steps_before[-1]["seconds"] if steps_before else 0.0
    begin = time.perf_counter()

    class Recorder(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if "eval_loss" in logs:
                validation.record(file, state.global_step, logs, trainer)
            if "loss" not in logs:
                return
            seconds = time.perf_counter() - begin
            line = {
                "step": state.global_step,
                "epoch": logs["epoch"],
                "loss": float(logs["loss"]),
                "learning_rate": float(logs["learning_rate"]),
                "grad_norm": float(logs["grad_norm"]),
                "tokens": tokens_before + trainer.real_tokens,
                "tokens_per_second": trainer.real_tokens / (seconds - trainer.evaluation_seconds),
                "peak_bytes": meter.peak_bytes(),
                "seconds": seconds_before + seconds,
            }
            with file.open("a", encoding="utf-8") as sink:
                sink.write(json.dumps(line) + "\n")
            logs |= {name: line[name] for name in ("tokens", "tokens_per_second", "peak_bytes")}  # for the trackers
            bar.advance(args.logging_steps, loss=line["loss"], tokens_per_second=line["tokens_per_second"])

    return Recorder()


def lines(file: Path) -> list[dict[str, Any]]:
    """The whole lines of metrics.jsonl; none if it is not there. A kill may have cut the last."""
    if not file.exists():
        return []
    whole = [line for line in file.read_text(encoding="utf-8").split("\n")[:-1] if line]
    return [json.loads(line) for line in whole]
