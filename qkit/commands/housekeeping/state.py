"""How far a run has come: read from its files, without opening anything that is heavy."""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from qkit.core.errors import QkitError, UserError
from qkit.core.files import read_json
from qkit.recipe.schema import Recipe
from qkit.run.directory import Run
from qkit.run.stages import stages_of

DONE, STOPPED, RUNNING, UNREADABLE = "done", "stopped", "running", "unreadable"
SEAL = "files.json"  # written last into a checkpoint: train/checkpoints.py


@dataclass(frozen=True)
class State:
    """`kind`: done, stopped, running, or unreadable with `why`. `stage`: the first that is not done.

    `step`, `steps`: of the newest checkpoint of an unfinished training, and of all; None without one.
    """

    kind: str
    stage: str | None = None
    step: int | None = None
    steps: int | None = None
    why: str = ""

    @property
    def text(self) -> str:
        """`stopped: train 40/100`."""
        if self.kind == UNREADABLE or self.stage is None:
            return self.kind
        at = "" if self.step is None else f" {self.step}{'' if self.steps is None else f'/{self.steps}'}"
        return f"{self.kind}: {self.stage}{at}"


def is_run(root: Path) -> bool:
    """Whether a folder is a run directory, and not one that somebody else keeps a recipe.yaml in."""
    return (root / "recipe.yaml").is_file() and any((root / sign).exists() for sign in ("run.json", ".lock", "logs"))


def locked(root: Path) -> AbstractContextManager[None]:
    """The lock of a run directory, whose recipe may be one that cannot be read.

    Raises:
        RunBusy: another process holds it.
    """
    return Run(root, Recipe.model_construct()).locked()  # type: ignore[call-arg]  # of the recipe nothing is read


def is_running(root: Path) -> bool:
    """Whether a process holds the lock of a run directory."""
    import filelock

    lock = root / ".lock"
    if not lock.exists():
        return False
    probe = filelock.FileLock(lock)
    try:
        probe.acquire(timeout=0)
    except filelock.Timeout:
        return True
    except OSError:  # a folder of somebody else: nothing of ours runs there
        return False
    probe.release()
    return False


def state_of(run: Run) -> State:
    """How far a run has come. Changed recipes and sources are not looked at: `qkit show` does that.

    Raises:
        MissingArtifact: its manifest is damaged.
    """
    recorded = run.manifest()["stages"]
    missing = [
        stage.name
        for stage in stages_of(run.recipe)
        if stage.name not in recorded or not run.folder(stage.name).is_dir()
    ]
    kind = RUNNING if is_running(run.root) else STOPPED if missing else DONE
    stage = missing[0] if missing else None
    if stage != "train":
        return State(kind, stage)
    return State(kind, stage, *progress_of(run.root / ".work" / "train" / "checkpoints"))


def progress_of(folder: Path) -> tuple[int | None, int | None]:
    """The step of the newest complete checkpoint, and the number of all steps; None where that is unknown."""
    steps = {
        int(match[1]): path
        for path in folder.glob("checkpoint-*")
        if (match := re.fullmatch(r"checkpoint-(\d+)", path.name))
    }
    sealed = [step for step, path in steps.items() if (path / SEAL).is_file()]
    if not sealed:
        return None, None
    return max(sealed), _steps_in_all(steps[max(sealed)] / "trainer_state.json")


def _steps_in_all(file: Path) -> int | None:
    try:
        steps = read_json(file).get("max_steps")
    except (FileNotFoundError, ValueError):
        return None
    return steps if isinstance(steps, int) and steps > 0 else None


def opened(root: Path) -> Run | State:
    """A run, or why it cannot be read: a list shows the others all the same."""
    try:
        return Run(root, _written(root / "recipe.yaml"))
    except (OSError, ValueError, yaml.YAMLError):  # wrong, or of another version: `load` says what it is
        pass
    try:
        return Run.open(root)
    except UserError as error:
        return State(UNREADABLE, why=str(error))


def _written(file: Path) -> Recipe:
    """The recipe that a run has written itself: complete, so it is read in a tenth of the time that `load` takes to check one.

    Raises:
        ValueError, yaml.YAMLError: it is not such a recipe.
    """
    loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    return Recipe.model_validate(yaml.load(file.read_text(encoding="utf-8"), Loader=loader))


def stages_recorded(run: Run) -> Mapping[str, Any]:
    """The manifest's entries by stage; empty if it is damaged."""
    try:
        stages: Mapping[str, Any] = run.manifest()["stages"]
    except (QkitError, KeyError):
        return {}
    return stages
