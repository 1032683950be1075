"""A model with a new head, as a plan reads it: its config.json, the dtype of its checkpoint, and what the data stage knows."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qkit.core.errors import ModelError
from qkit.core.sources import HubId, locate, unzipped
from qkit.model.config import config_of, known_models
from qkit.plan._known import NOTHING, Known
from qkit.plugins.task import open_task
from qkit.recipe import schema
from qkit.recipe.schema import Recipe
from qkit.tensors.shards import SHARDS, TORCH_NAMES, shards, tensor_specs

ASSUMED_LABELS = 10  # until the data stage has counted them; a hundred more take well below a MiB


@dataclass(frozen=True)
class NewHead:
    """A base model for a task that gives it a new head. `config`: config.json as text. `folder`: None if only that is here.

    `dtype`: of the checkpoint, as torch names it. `known`: what the data stage knows.
    """

    source: str
    config: str
    folder: Path | None
    dtype: str
    known: Known

    @property
    def architecture(self) -> str:
        return str(self.settings.get("model_type", "unknown"))

    @property
    def settings(self) -> dict[str, Any]:
        """The keys of config.json."""
        settings: dict[str, Any] = json.loads(self.config)
        return settings

    @property
    def labels(self) -> int:
        """The number of labels, or ASSUMED_LABELS."""
        return ASSUMED_LABELS if self.known.labels is None else self.known.labels

    @property
    def exact(self) -> bool:
        """Whether the number of parameters is certain: the labels are counted, and the checkpoint shows which modules are new."""
        return self.known.labels is not None and self.folder is not None

    @property
    def positions(self) -> int | None:
        """The longest row, if the model has a limit."""
        longest = self.settings.get("max_position_embeddings")
        return int(longest) if longest else None


def new_head(recipe: Recipe, known: Known = NOTHING) -> NewHead:
    """The base model of a recipe.

    Raises:
        ModelError: the model cannot be found.
    """
    outputs = open_task(recipe.task).head_outputs(recipe, 0)
    if known.labels is None and outputs > 1:  # the task has as many outputs whatever the data are
        known = replace(known, labels=outputs)
    return model_of(recipe.model, known)


def model_of(section: schema.Model, known: Known = NOTHING) -> NewHead:
    """A base model.

    Raises:
        ModelError: the model cannot be found.
    """
    config, folder = config_of(section), _folder(section)
    text = json.dumps(dict(config), sort_keys=True)
    return NewHead(section.source, text, folder, _dtype(config, folder), known)


def _folder(section: schema.Model) -> Path | None:
    """The folder with the checkpoint, if it is on this machine."""
    if section.source in known_models() and not Path(section.source).exists():
        return None
    location = locate(section.source, sha256=section.sha256, kind=ModelError)
    if isinstance(location, HubId):
        return None
    folder = unzipped(location, ModelError)
    return folder if folder.is_dir() and _has_weights(folder) else None


def _has_weights(folder: Path) -> bool:
    return next(iter(folder.glob(SHARDS)), None) is not None


def _dtype(config: Any, folder: Path | None) -> str:
    """The dtype that transformers loads the checkpoint in: that of config.json, else that of the first tensor."""
    if named := config.get("dtype") or config.get("torch_dtype"):
        return str(named).removeprefix("torch.")
    stored = (spec["dtype"] for shard in (shards(folder) if folder else ()) for spec in tensor_specs(shard).values())
    return next((TORCH_NAMES[name] for name in stored if name in ("F32", "F16", "BF16")), "float32")
