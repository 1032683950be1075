"""Training that really runs out of memory: what it says, and that `--fit` goes on from the last checkpoint to the same losses."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from helpers.tiny import tiny_settings
from qkit import pipeline
from qkit.core.device import Device, detect, out_of_memory
from qkit.core.errors import OutOfMemory, RecipeError
from qkit.plan import fit
from qkit.recipe.load import load
from qkit.run.directory import Run
from qkit.train.trainer import Counted

pytestmark = pytest.mark.slow

# A device with a small budget. Python imports it first in every process; only the one that trains changes: from step 3 on it may hold so
# many bytes of tensors alive, and when batches come in two parts its process is killed at step 5, as the kernel does it.
BUDGET = """
import os, signal, sys

if "train" in sys.orig_argv:
    from torch.utils._python_dispatch import TorchDispatchMode

    from qkit.core.memory_watch import watching
    from qkit.train.trainer import Counted

    def limited(self, model, inputs, items=None, whole=Counted.training_step):
        step = self.state.global_step
        with open(os.environ["TOLD"], "a") as told:
            print(self.micro_batches, step, file=told)
        if step == 5 and self.micro_batches == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        if step < 3:
            return whole(self, model, inputs, items)
        with watching(model, self.optimizer) as alive:
            class Budget(TorchDispatchMode):
                def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                    out = func(*args, **(kwargs or {}))
                    if alive.alive_bytes() > int(os.environ["BUDGET"]):
                        import torch

                        raise torch.OutOfMemoryError("out of memory: the budget of this device is used up")
                    return out

            with Budget():
                return whole(self, model, inputs, items)

    Counted.training_step = limited
elif {"evaluate", "merge", "export", "serve", "verify", "bench", "report"} & set(sys.orig_argv):
    os._exit(0)  # what comes after training is not what is tested
"""


@pytest.fixture
def recipe_file(tmp_path: Path, tiny_model: Path) -> Path:
    """Two batches an epoch, of 170 rows each: their activations are worth dividing."""
    turns = [("user", "say {0:03d} {0:x} " + "please " * 8), ("assistant", "{0:03d} {0:x}")]
    rows = [{"messages": [{"role": role, "content": text.format(i)} for role, text in turns]} for i in range(344)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    settings = tiny_settings(tiny_model, tmp_path / "rows.jsonl")
    settings["data"] |= {"batch_tokens": 16384}
    settings["train"] |= {"max_steps": 7, "save_steps": 2}
    settings["export"], settings["bench"] = {"formats": []}, {"runtimes": ["transformers"]}
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(settings), encoding="utf-8")
    return file


def _metrics(run: Run) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run.folder("train") / "metrics.jsonl").read_text().splitlines()]


def test_a_run_goes_on_from_its_checkpoint_at_the_same_batches(recipe_file: Path, tmp_path: Path) -> None:
    straight = Run.create(tmp_path / "straight", load(recipe_file))
    for stage in ("data", "train"):
        pipeline.execute(straight, stage)
    (tmp_path / "sitecustomize.py").write_text(BUDGET, encoding="utf-8")
    # less than a batch holds whole, and more than it holds in two parts
    peak = sum(json.loads((straight.folder("train") / "memory.json").read_text())["measured"].values())
    environment = {
        "PYTHONPATH": f"{tmp_path}:{Path.cwd()}",
        "TOLD": str(tmp_path / "told"),
        "BUDGET": str(peak * 4 // 5),
    }
    command = [sys.executable, "-m", "qkit", "run", str(recipe_file), "--out", str(tmp_path / "cut"), "--fit", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **environment})
    assert done.returncode == 0, done.stderr
    assert "resuming from the last checkpoint with micro_batches=2" in done.stderr
    assert "SIGKILL" in done.stderr and "micro_batches=4" in done.stderr
    steps = [tuple(map(int, line.split())) for line in (tmp_path / "told").read_text().splitlines()]
    assert steps == [*((1, n) for n in (0, 1, 2, 3)), *((2, n) for n in (2, 3, 4, 5)), *((4, n) for n in (4, 5, 6))]
    cut = Run.open(tmp_path / "cut")
    assert cut.recipe.micro_batches == 4 and cut.recipe.data == straight.recipe.data
    assert json.loads(done.stdout)["stages"]["train"]["status"] == "done"
    assert [line["tokens"] for line in _metrics(cut)] == [line["tokens"] for line in _metrics(straight)]
    losses, wanted = ([line["loss"] for line in _metrics(run)] for run in (cut, straight))
    assert losses == pytest.approx(wanted, rel=2e-3) and losses[:2] == wanted[:2]
    again = fit.fitted(Run(cut.root, load(recipe_file)))
    assert pipeline.statuses(again)["train"] == "done"  # the same command finds nothing to do


def test_memory_that_the_system_refuses(recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run.create(tmp_path / "run", load(recipe_file))
    pipeline.execute(run, "data")
    limited = _limited(Counted.training_step, 16 << 20)
    monkeypatch.setattr(Counted, "training_step", limited)
    with pytest.raises(OutOfMemory) as raised:
        pipeline.execute(run, "train")
    text = str(raised.value)
    assert "out of memory: " in text and "allocate memory" in text
    assert "the plan was" in text and ("more than the" in text or "no item exceeded its plan" in text)
    assert "try --set micro_batches=2 (-" in text and "qkit run --fit" in text
    assert pipeline.statuses(run)["train"] == "missing" and raised.value.exit_code == 3


def _limited(whole: Callable[..., Any], spare_bytes: int) -> Callable[..., Any]:
    """A training step in which the process may map so many bytes more and no others."""

    def step(*args: Any, **kwargs: Any) -> Any:
        soft, hard = resource.getrlimit(resource.RLIMIT_AS)
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + spare_bytes, hard))
        try:
            torch.empty(256 * spare_bytes, dtype=torch.uint8)  # smaller tensors may find room that the heap has free
            return whole(*args, **kwargs)
        finally:
            resource.setrlimit(resource.RLIMIT_AS, (soft, hard))

    return step


@pytest.mark.parametrize("code", [3, -9])
def test_a_process_that_lacked_memory(tiny_recipe: Path, tmp_path: Path, code: int) -> None:
    run = Run(tmp_path, load(tiny_recipe))
    with pytest.raises(OutOfMemory) as raised:
        pipeline._raise_for("train", run, code)
    assert ("SIGKILL" in str(raised.value)) == (code == -9)  # the other has said it itself


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), True),
        (RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"), True),
        (OSError(12, "Cannot allocate memory"), True),
        (ImportError("cannot allocate memory in static TLS block"), False),
        (ValueError("memory of a goldfish"), False),
    ],
)
def test_what_counts_as_out_of_memory(error: Exception, expected: bool) -> None:
    assert out_of_memory(error) is expected


def test_offloading_is_refused_where_there_is_nothing_to_offload_to(tiny_recipe: Path, tmp_path: Path) -> None:
    run = Run.create(tmp_path / "run", load(tiny_recipe, ["train.activation_offloading=true"]))
    with pytest.raises(RecipeError, match="activation_offloading=false"):
        pipeline.run_all(run)
    assert not (run.root / "data").exists()
    fit.check(run.recipe, Device("cuda", "a card", 24 << 30, 2))


def test_the_line_that_was_over_is_named_with_its_excess() -> None:
    gib = 2**30
    text = fit.over({"weights": gib, "logits": gib}, {"weights": gib, "logits": 3 * gib, "other": 9 * gib})
    assert text == "logits took 3.0 GiB, 2.0 GiB more than the 1.0 GiB planned"
    assert fit.over({"weights": gib}, {"weights": gib}) == "no item exceeded its plan"


def test_a_stage_without_a_remedy_says_what_is_left(tiny_recipe: Path) -> None:
    assert "use a smaller model or a larger device" in fit.shortage(load(tiny_recipe), "merge", detect())
