"""What was trained, as it was after the best step so far: train/best/step-N/, kept until no checkpoint refers to it.

A run that resumes from a checkpoint finds the best step that the checkpoint knows; later ones are evaluated again.
"""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

from qkit.core.errors import MissingArtifact
from qkit.core.files import read_json
from qkit.train import checkpoints

# Of the figure computed again. A forward pass gives the same bytes on a CPU; sums on a GPU may differ in their order.
CPU_TOLERANCE, GPU_TOLERANCE = 1e-9, 1e-4


def keep(trainer: Any) -> None:
    """Save what is trained as the best so far, as a checkpoint does."""
    folder = _folder(Path(trainer.args.output_dir)) / f"step-{trainer.state.global_step}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    trainer._save(str(folder))
    checkpoints.seal(folder)
    trainer.best_step_here = trainer.state.global_step
    thin(Path(trainer.args.output_dir), trainer.state.global_step)


def thin(checkpoint_folder: Path, best: int | None) -> None:
    """Delete the steps that are no longer the best for any checkpoint. `best`: the best so far."""
    states = [path / "trainer_state.json" for path in checkpoints.sealed(checkpoint_folder)]
    needed = {best, *(read_json(state).get("best_global_step") for state in states)}
    for path in _folder(checkpoint_folder).glob("step-*"):
        if checkpoints.step_of(path) not in needed:
            shutil.rmtree(path)


def drop_after(checkpoint_folder: Path, step: int) -> None:
    """Delete the steps after that which training resumes from: they run again."""
    for path in _folder(checkpoint_folder).glob("step-*"):
        if checkpoints.step_of(path) > step:
            shutil.rmtree(path)


def restore(trainer: Any) -> None:
    """Give the model what was trained at the best step.

    Raises:
        MissingArtifact: it is damaged, or not there.
    """
    folder = _folder(Path(trainer.args.output_dir)) / f"step-{trainer.state.best_global_step}"
    if why := checkpoints.damage(folder):
        raise MissingArtifact(f"{folder}: {why}; `qkit train` from the beginning makes it again")
    trainer._load_from_checkpoint(str(folder))


def is_same(figure: float, again: float, is_on_gpu: bool) -> bool:
    """Whether a figure computed again is that of before."""
    return math.isclose(figure, again, rel_tol=GPU_TOLERANCE if is_on_gpu else CPU_TOLERANCE, abs_tol=1e-12)


def _folder(checkpoint_folder: Path) -> Path:
    return checkpoint_folder.parent / "best"
