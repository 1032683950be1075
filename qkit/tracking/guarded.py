"""One tracker, behind a guard: what it raises is said once, and it then receives no more.

transformers calls a tracker's callback within its training loop, where an error (a server that is gone, a full disk) would end the training.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from qkit.core.files import make_folder
from qkit.run.directory import Run
from qkit.tracking import trackers


class Guarded:
    """A tracker's callback of transformers. `run_id`: the run that it continues, None for a new one; known once training has begun."""

    def __init__(self, name: str, run: Run, stage: str, run_id: str | None = None):
        self.name = name
        self.run_id = run_id
        self._run = run
        self._stage = stage
        self._callback: Any = None
        self._failed = False

    @property
    def run_name(self) -> str:
        """The name of the run in the tracker; trackio knows a run by nothing else."""
        return self.run_id if self.name == "trackio" and self.run_id else wanted_name(self._run)

    def open(self, done: int | None) -> None:
        """Open the callback. `done`: steps before the training goes on, None if only scores are to come.

        tensorboard and trackio, which know runs by name, get a name that no other run has.
        """
        place = trackers.PLACES.get(self.name)
        if place and place not in os.environ:
            make_folder(self._run.root / trackers.FOLDER / self.name)
        if self.name in ("mlflow", "dagshub"):  # for mlflow's own thread, too
            os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", trackers.MLFLOW_RETRIES)
        self._do(self._open, done)

    def handles(self, event: str) -> bool:
        """Whether the callback does anything at an event: most of a step's are nothing to a tracker."""
        from transformers import TrainerCallback

        return not self._failed and getattr(type(self._callback), event) is not getattr(TrainerCallback, event)

    def handle(self, event: str, args: Any, state: Any, control: Any, given: Mapping[str, Any]) -> None:
        """Let the callback handle an event of the trainer."""
        self._do(lambda: getattr(self._callback, event)(args, state, control, **given))
        if event == "on_train_begin" and self.run_id is None:
            self.run_id = self._do(self._opened_id)

    def close(self) -> None:
        """Write what wandb still holds; the other callbacks do it when training ends."""
        if self.name == "wandb":
            self._do(lambda: importlib.import_module("wandb").finish())

    def _do(self, action: Callable[..., Any], *given: Any) -> Any:
        """What `action` returns, in the tracker's environment; None if it fails, or something did before."""
        if self._failed:
            return None
        try:
            with trackers.environment(trackers.variables(self.name, self._run.root, self.run_id)):
                return action(*given)
        except Exception as error:
            self._failed = True
            reason = (str(error) or type(error).__name__).splitlines()[0]
            self._run.progress.notify(
                f"{self._stage}: warning: the tracker {self.name} failed and receives no more: {reason}; "
                f"nothing else changes, and every figure is in {self._run.root}"
            )
            return None

    def _open(self, done: int | None) -> None:
        from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

        if self.name == "tensorboard":
            folder, void = self._run.root.absolute() / trackers.FOLDER / self.name, done if self.run_id else None
            self.run_id = self.run_id or _free(wanted_name(self._run), lambda name: (folder / name).exists())
            self._callback = INTEGRATION_TO_CALLBACK[self.name](_writer(folder / self.run_id, void))
            return
        self._callback = INTEGRATION_TO_CALLBACK[self.name]()
        if self.name == "trackio":
            self.run_id = self.run_id or _free(wanted_name(self._run), _in_trackio)

    def _opened_id(self) -> str | None:
        """What mlflow or wandb calls the run that it has begun; None for others."""
        if self.name == "wandb":
            return str(importlib.import_module("wandb").run.id)
        if self.name == "mlflow":
            return str(importlib.import_module("mlflow").active_run().info.run_id)
        return None


def wanted_name(run: Run) -> str:
    """The name that a run should have in a tracker."""
    return run.recipe.train.run_name or run.root.absolute().name


def _free(name: str, taken: Callable[[str], bool]) -> str:
    """The name, with an ending if another run has it: transformers' callbacks would continue that one."""
    name = name.replace("/", "_")
    return f"{name}-{secrets.token_hex(4)}" if taken(name) else name


def _in_trackio(name: str) -> bool:
    """Whether trackio has a run of this name, or may have it in a place that is not on this machine."""
    if any(os.environ.get(variable) for variable in ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL")):
        return True
    try:
        return any(run.name == name for run in importlib.import_module("trackio").Api().runs(trackers.PROJECT))
    except ValueError:  # there is no such project yet
        return False


def _writer(folder: Path, done: int | None) -> Any:
    """A writer of event files. `done`: the steps after which TensorBoard leaves out what was written before a kill; None: nothing.

    In a folder of the user's own there may be other runs, whose steps have the same numbers.
    """
    module = "torch.utils.tensorboard" if importlib.util.find_spec("tensorboard") else "tensorboardX"
    where = Path(os.environ.get("TENSORBOARD_LOGGING_DIR", folder)).expanduser()
    void = None if done is None or where != folder else done + 1
    return importlib.import_module(module).SummaryWriter(log_dir=str(where), purge_step=void)
