"""The Trainer of transformers for rated answers: as for pairs, with another row's answer beside each."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from qkit.core.device import Device
from qkit.run.directory import Run
from qkit.train._preference import rated
from qkit.train.trainers import _shared, preference

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import Trainer

STORED = ("input_ids", "labels", "start", "desirable")


def build_trainer(run: Run, folder: Path, device: Device, out: Path) -> Trainer:
    """The trainer on the run's rated answers, with the reference's log-probabilities computed.

    Raises:
        RecipeError: the model does not support gradient checkpointing.
    """
    section = run.recipe.feedback

    def read(file: Path) -> Dataset:
        rows = _shared.training_rows(file, STORED)
        return rated.with_others(rows, run.recipe.seed, compares=section.loss_type == "kto")

    return preference.built(run, folder, device, out, preference.Kind(rated.trainer_class(), section, read))
