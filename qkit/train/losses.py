"""Losses of tasks with labels, as a recipe's `loss` section names them.

A loss is a function (logits, labels) -> losses of the shape of the labels. The trainer adds them up and divides by the number of labels in the
whole accumulated batch, so that a loss of one's own needs to know nothing of accumulation:

    def my_loss(logits, labels):
        return torch.nn.functional.cross_entropy(logits, labels, reduction="none")

logits [n, classes] float32, labels [n]              one label each: n rows of `classify`, words of `tag`, begins and ends of `answer`
logits [rows, classes] float32, labels the same      `multi_label`, 0 or 1; `regress`, numbers. A row's loss is the mean over its labels.

The loss `crf` of `tag` is of whole sentences: its scores of neighbouring tags are weights of the model.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qkit.core.errors import RecipeError, nearest, short
from qkit.plugins.own_code import imported
from qkit.plugins.task import LABELS
from qkit.recipe import labels as sections
from qkit.tasks._encoder.tagging.transitions import SentenceLoss

if TYPE_CHECKING:
    import torch

    from qkit.plugins.task import Loss


def open_loss(section: sections.Loss, data: Path, model: Any = None) -> Loss:
    """The loss of a recipe. `data`: the folder that holds labels.json; `model`: that is trained, which holds the weights of `crf`.

    Raises:
        RecipeError: it does not exist, or its settings do not fit the labels.
    """
    if section.name == "crf":
        return SentenceLoss(model)
    weights = positive_weights(section, data) if section.name == "bce" else class_weights(section, data)
    if ":" not in section.name and section.name not in OWN:
        raise RecipeError(f"loss.name={short(section.name)}: must be {', '.join((*OWN, 'crf'))}, or module:function")
    if section.name in OWN:
        return OWN[section.name](weights, section)
    return _checked(section.name, imported(section.name, "loss.name"))


def class_weights(section: sections.Loss, data: Path) -> torch.Tensor | None:
    """A weight for each label, or None. Their mean over the training rows is 1, so that weights do not change the learning rate."""
    import torch

    if section.class_weights is None:
        return None
    labels = json.loads((data / LABELS).read_text(encoding="utf-8"))
    counts = torch.tensor([labels["rows"]["train"][name] for name in labels["names"]], dtype=torch.float32)
    if section.class_weights == "balanced":
        weights = 1 / counts.clamp_min(1)  # the inside of entities may have no word in training
    else:
        _need_labels(section.class_weights, labels["names"])
        weights = torch.tensor([section.class_weights.get(name, 1.0) for name in labels["names"]])
    return weights * counts.sum() / (weights * counts).sum()


def _need_labels(weighted: Mapping[str, float], names: Sequence[str]) -> None:
    if unknown := sorted(weighted.keys() - {*names}):
        raise RecipeError(
            f"loss.class_weights: there is no label {short(repr(unknown[0]))}{nearest(unknown[0], names)}"
        )


def _cross_entropy(weights: torch.Tensor | None, section: sections.Loss) -> Loss:
    from torch.nn.functional import cross_entropy

    def loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        losses = cross_entropy(logits, labels, reduction="none", label_smoothing=section.label_smoothing)
        return losses if weights is None else losses * weights.to(labels.device)[labels]

    return loss


def _focal(weights: torch.Tensor | None, section: sections.Loss) -> Loss:
    """(1 - p)^gamma times the cross-entropy, where p is the probability of the label (Lin et al., 2017)."""
    import torch

    def loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        logp = logits.log_softmax(-1).gather(1, labels[:, None])[:, 0]
        others = (-torch.expm1(logp)).clamp_min(torch.finfo(logp.dtype).tiny)  # at 0, a power below 1 has no gradient
        losses = -(others**section.gamma) * logp
        return losses if weights is None else losses * weights.to(labels.device)[labels]

    return loss


def positive_weights(section: sections.Loss, data: Path) -> torch.Tensor | None:
    """How much a row that has the label counts, against one that does not, by label. `balanced`: rows without it / rows with it."""
    import torch

    if section.class_weights is None:
        return None
    labels = json.loads((data / LABELS).read_text(encoding="utf-8"))
    if section.class_weights == "balanced":
        counts = torch.tensor([labels["rows"]["train"][name] for name in labels["names"]], dtype=torch.float32)
        # At least one: a label that every row has would have no weight, and its output would stay as it began
        return (labels["training_rows"] - counts).clamp_min(1) / counts
    _need_labels(section.class_weights, labels["names"])
    return torch.tensor([section.class_weights.get(name, 1.0) for name in labels["names"]])


def _bce(weights: torch.Tensor | None, section: sections.Loss) -> Loss:
    """The binary cross-entropy of each label; label smoothing moves 0 and 1 towards 1/2."""
    from torch.nn.functional import binary_cross_entropy_with_logits

    def loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        smooth = labels * (1 - section.label_smoothing) + section.label_smoothing / 2
        positive = None if weights is None else weights.to(labels.device)
        return binary_cross_entropy_with_logits(logits, smooth, reduction="none", pos_weight=positive)

    return loss


def _mse(weights: torch.Tensor | None, section: sections.Loss) -> Loss:
    def loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return (logits - labels) ** 2

    return loss


def _huber(weights: torch.Tensor | None, section: sections.Loss) -> Loss:
    """Half the squared error up to loss.delta, and linear beyond (Huber, 1964)."""
    from torch.nn.functional import huber_loss

    return partial(huber_loss, reduction="none", delta=section.delta)


OWN: Mapping[str, Callable[[torch.Tensor | None, sections.Loss], Loss]] = {
    "cross_entropy": _cross_entropy,
    "focal": _focal,
    "bce": _bce,
    "mse": _mse,
    "huber": _huber,
}


def _checked(name: str, function: Any) -> Loss:
    """A loss of one's own, whose results are checked: a mean instead of a loss for each label would be divided once more."""

    def loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        losses: torch.Tensor = function(logits, labels)
        if losses.shape != labels.shape:
            raise RecipeError(
                f"loss.name={short(name)}: returned a tensor of shape {tuple(losses.shape)} for labels of shape {tuple(labels.shape)}; it must "
                "return one loss for each (reduction='none')"
            )
        return losses

    return loss
