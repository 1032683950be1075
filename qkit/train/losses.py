"""Losses of tasks with labels, as a recipe's `loss` section names them.

A loss is a function (logits [rows, labels] float32, labels [rows]) -> losses [rows]. The trainer adds them up and divides by the number of
labels in the whole accumulated batch, so that a loss of one's own needs to know nothing of accumulation:

    def my_loss(logits, labels):
        return torch.nn.functional.cross_entropy(logits, labels, reduction="none")
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qkit.core.errors import RecipeError, nearest, short
from qkit.plugins.task import LABELS
from qkit.recipe import schema

if TYPE_CHECKING:
    import torch

    Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def open_loss(section: schema.Loss, data: Path) -> Loss:
    """The loss of a recipe. `data`: the folder that holds labels.json.

    Raises:
        RecipeError: it does not exist, or its settings do not fit the labels.
    """
    weights = class_weights(section, data)
    if section.name == "cross_entropy":
        return _cross_entropy(weights, section.label_smoothing)
    if section.name == "focal":
        return _focal(weights, section.gamma)
    return _checked(section.name, _imported(section.name))


def class_weights(section: schema.Loss, data: Path) -> torch.Tensor | None:
    """A weight for each label, or None. Their mean over the training rows is 1, so that weights do not change the learning rate."""
    import torch

    if section.class_weights is None:
        return None
    labels = json.loads((data / LABELS).read_text(encoding="utf-8"))
    counts = torch.tensor([labels["rows"]["train"][name] for name in labels["names"]], dtype=torch.float32)
    if section.class_weights == "balanced":
        weights = 1 / counts
    else:
        if unknown := sorted(section.class_weights.keys() - {*labels["names"]}):
            close = nearest(unknown[0], labels["names"])
            raise RecipeError(f"loss.class_weights: there is no label {short(repr(unknown[0]))}{close}")
        weights = torch.tensor([section.class_weights.get(name, 1.0) for name in labels["names"]])
    return weights * counts.sum() / (weights * counts).sum()


def _cross_entropy(weights: torch.Tensor | None, smoothing: float) -> Loss:
    from torch.nn.functional import cross_entropy

    def loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        losses = cross_entropy(logits, labels, reduction="none", label_smoothing=smoothing)
        return losses if weights is None else losses * weights.to(labels.device)[labels]

    return loss


def _focal(weights: torch.Tensor | None, gamma: float) -> Loss:
    """(1 - p)^gamma times the cross-entropy, where p is the probability of the label (Lin et al., 2017)."""
    import torch

    def loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        logp = logits.log_softmax(-1).gather(1, labels[:, None])[:, 0]
        others = (-torch.expm1(logp)).clamp_min(torch.finfo(logp.dtype).tiny)  # at 0, a power below 1 has no gradient
        losses = -(others**gamma) * logp
        return losses if weights is None else losses * weights.to(labels.device)[labels]

    return loss


def _imported(name: str) -> Any:
    module, colon, function = name.partition(":")
    if not colon:
        raise RecipeError(f"loss.name={short(name)}: must be cross_entropy, focal, or module:function")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise RecipeError(
            f"loss.name={short(name)}: {error}; the module must be importable, for example from PYTHONPATH"
        ) from error


def _checked(name: str, function: Any) -> Loss:
    """A loss of one's own, whose results are checked: a mean instead of a loss for each row would be divided once more."""

    def loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        losses: torch.Tensor = function(logits, labels)
        if losses.shape != labels.shape:
            raise RecipeError(
                f"loss.name={short(name)}: returned a tensor of shape {tuple(losses.shape)} for {len(labels)} rows; it must return one loss "
                "for each row (reduction='none')"
            )
        return losses

    return loss
