"""Trainers: one file each, whose name is what a task's TRAINER says. Each offers `build_trainer(run, folder, device, out)`.

In: RUN/data/train.parquet, the base, the task. Out: a transformers Trainer that is ready to run. Start with sft.py.
"""

from __future__ import annotations

import importlib
from typing import Any

from qkit.plugins.task import open_task


def open_trainer(task: str) -> Any:
    """The module that builds the trainer of a task."""
    return importlib.import_module(f"qkit.train.trainers.{open_task(task).TRAINER}")
