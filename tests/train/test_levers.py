"""Noise on embeddings through a whole stage: on 4-bit weights, after a kill, and for tasks with labels."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from helpers.tiny_labelled import build_model, labelled_run
from helpers.training import Heard, _json, _losses, _run
from qkit import pipeline
from qkit.run.directory import Run
from qkit.train import stage as train_stage

pytestmark = pytest.mark.slow

ADAPTER = Path("adapter", "adapter_model.safetensors")


def _killed(root: Path, steps: int) -> None:
    """Train in a process that is killed in the step after so many."""
    code = (
        "import os, signal, sys; from pathlib import Path; import transformers\n"
        "from qkit.run.directory import Run; from qkit.train import stage\n"
        "step = transformers.Trainer.training_step\n"
        "def training_step(self, *given):\n"
        f"    if self.state.global_step == {steps}: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return step(self, *given)\n"
        "transformers.Trainer.training_step = training_step\n"
        f"root = Path({str(root)!r}); stage.run(Run.open(root), root / 'train')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr


@pytest.mark.parametrize("packing", [False, True])
def test_noise_goes_on_after_a_kill_as_if_there_had_been_none(tiny_model: Path, tmp_path: Path, packing: bool) -> None:
    """On 4-bit weights, which the recipe has unless it says otherwise."""
    settings: dict[str, Any] = {
        "data": {"packing": packing},
        "ledger": {"losses": True},
        "train": {"max_steps": 7, "save_steps": 3, "gradient_accumulation_steps": 2, "neftune_noise_alpha": 5.0},
    }
    run, straight = _run(tmp_path / "straight", tiny_model, **settings)
    assert run.recipe.quantization.load_in_4bit
    train_stage.run(run, straight)
    killed, out = _run(tmp_path / "cut", tiny_model, **settings)
    _killed(killed.root, steps=5)
    heard = Heard()
    train_stage.run(Run(killed.root, killed.recipe, heard), out)
    assert "train: resuming from checkpoint-3" in heard.lines
    assert (out / ADAPTER).read_bytes() == (straight / ADAPTER).read_bytes()
    assert _losses(out) == _losses(straight) and _json(out / "sums.json") == _json(straight / "sums.json")
    settings["train"] |= {"neftune_noise_alpha": None}
    quiet, without = _run(tmp_path / "quiet", tiny_model, **settings)
    train_stage.run(quiet, without)
    assert (without / ADAPTER).read_bytes() != (straight / ADAPTER).read_bytes()
    before = [[row["loss_before"] for row in _losses(folder)] for folder in (straight, without)]
    assert before[0] == before[1]


def test_noise_of_a_task_with_labels_changes_its_training_alone(tmp_path: Path) -> None:
    folder = build_model(tmp_path / "bert", "bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    weights, first = [], []
    for name, alpha in (("loud", 5.0), ("again", 5.0), ("quiet", None)):
        (tmp_path / name).mkdir()
        train = {"max_steps": 3, "neftune_noise_alpha": alpha}
        run = labelled_run(tmp_path / name, folder, train=train, ledger={"losses": True})
        for stage in ("data", "train"):
            pipeline.execute(run, stage)
        weights.append((run.folder("train") / ADAPTER).read_bytes())
        first.append([row["loss_before"] for row in _losses(run.folder("train"))])
    assert weights[0] == weights[1] != weights[2] and first[0] == first[1] == first[2]


@pytest.mark.parametrize(
    ("train", "remark"),
    [
        ({"loss_type": "dft"}, "train: the logged loss is that of train.loss_type=dft"),
        ({"label_smoothing_factor": 0.1}, "train: the logged loss is smoothed (train.label_smoothing_factor=0.1)"),
    ],
)
def test_losses_of_rows_are_plain_and_it_is_said(
    tiny_model: Path, tmp_path: Path, train: dict[str, Any], remark: str
) -> None:
    first = []
    for name, given in (("plain", {}), ("other", train)):
        heard = Heard()
        run, out = _run(tmp_path / name, tiny_model, heard, ledger={"losses": True}, train={"max_steps": 2, **given})
        train_stage.run(run, out)
        first.append([row["loss_before"] for row in _losses(out)])
        assert any(line.startswith(remark) for line in heard.lines) is bool(given)
        assert _json(out / "sums.json")["divided_by"] == _json(out / "sums.json")["in_batches"]
    assert first[0] == first[1]
