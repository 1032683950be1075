"""The trackers that transformers has callbacks for: the package of each, where its files go, and how a run of it is continued.

Files go to RUN/trackers/NAME, beside the stages' folders: `evaluate` adds to them, and the results of `train` must not change after it.
An environment variable that the user has set is left as it is.
"""

from __future__ import annotations

import importlib.util
import netrc
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from qkit.core.errors import MissingExtra
from qkit.recipe.schema import Recipe

FOLDER = "trackers"  # in the run directory
MLFLOW_RETRIES = "2"  # mlflow's 7 wait four minutes for a server that is gone, before the first step and after the last
PROJECT = "qkit"  # the project or experiment, where the tracker's own variable names none
MODULES: Mapping[str, tuple[str, ...]] = {  # any of them will do; kubeflow's callback needs none
    "azure_ml": ("azureml.core",),
    "clearml": ("clearml",),
    "codecarbon": ("codecarbon",),
    "comet_ml": ("comet_ml",),
    "dagshub": ("dagshub",),
    "dvclive": ("dvclive",),
    "flyte": ("flytekit",),
    "kubeflow": (),
    "mlflow": ("mlflow",),
    "neptune": ("neptune",),
    "swanlab": ("swanlab",),
    "tensorboard": ("tensorboard", "tensorboardX"),
    "trackio": ("trackio",),
    "wandb": ("wandb",),
}
PACKAGES = {"azure_ml": "azureml-core", "comet_ml": "comet-ml", "flyte": "flytekit"}  # others are called as the tracker
PLACES = {  # the variable that says where a tracker's files go
    "comet_ml": "COMET_OFFLINE_DIRECTORY",
    "mlflow": "MLFLOW_TRACKING_URI",
    "swanlab": "SWANLAB_LOG_DIR",
    "trackio": "TRACKIO_DIR",
    "wandb": "WANDB_DIR",
}


def check(recipe: Recipe) -> None:
    """Check, before anything is loaded, that the packages of the recipe's trackers are installed.

    Raises:
        MissingExtra: one or more are not.
    """
    missing = [name for name in recipe.train.report_to if not _installed(name)]
    if missing:
        packages = [PACKAGES.get(name, name) for name in missing]
        raise MissingExtra(
            f"train.report_to=[{', '.join(recipe.train.report_to)}] needs {', '.join(packages)}: pip install {' '.join(packages)}",
            package=packages[0],
        )


def _installed(name: str) -> bool:
    modules = MODULES[name]
    return not modules or any(_importable(module) for module in modules)


def _importable(module: str) -> bool:
    """Whether a module is there; a mere folder of that name, such as the one that wandb writes, is not."""
    try:
        spec = importlib.util.find_spec(module)
    except ModuleNotFoundError:  # of the package that should contain it
        return False
    return spec is not None and spec.origin is not None


def variables(name: str, root: Path, run_id: str | None) -> dict[str, str]:
    """The environment variables of a tracker for a run directory. `run_id`: the run to continue, as the tracker names it; None: a new one."""
    folder = (root / FOLDER / name).absolute()
    if name == "tensorboard":
        return {"TENSORBOARD_LOGGING_DIR": str(folder / run_id)} if run_id else {}
    if name == "wandb":
        continued = {"WANDB_RUN_ID": run_id, "WANDB_RESUME": "allow"} if run_id else {}
        offline = {} if _wandb_is_configured() else {"WANDB_MODE": "offline"}
        return {"WANDB_DIR": str(folder), "WANDB_PROJECT": PROJECT, **offline, **continued}
    if name in ("mlflow", "dagshub"):
        store = {"MLFLOW_TRACKING_URI": f"sqlite:///{folder / 'mlflow.db'}", "MLFLOW_DISABLE_TELEMETRY": "true"}
        continued = {"MLFLOW_RUN_ID": run_id} if run_id else {}
        return {**({} if name == "dagshub" else store), "MLFLOW_EXPERIMENT_NAME": PROJECT, **continued}
    local = {
        "comet_ml": {"COMET_OFFLINE_DIRECTORY": str(folder), "COMET_PROJECT_NAME": PROJECT},
        "swanlab": {"SWANLAB_LOG_DIR": str(folder), "SWANLAB_PROJECT": PROJECT},
        "trackio": {"TRACKIO_DIR": str(folder)},
    }
    return local.get(name, {})


def _wandb_is_configured() -> bool:
    """Whether wandb knows where to send a run; otherwise it would ask for a key, and fail."""
    if any(os.environ.get(name) for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_IDENTITY_TOKEN_FILE")):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


@contextmanager
def environment(given: Mapping[str, str]) -> Iterator[None]:
    """Set these variables within the block, except those that are set already."""
    added = {name: value for name, value in given.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)
