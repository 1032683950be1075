"""The transition scores of a CRF beside a model's head: made, trained, saved with its weights, and read again.

They are a module `crf` of the model. So an adapter and a whole model hold them among their weights, as crf.pairs, crf.start and crf.end, and a
checkpoint of training does too. transformers and PEFT ignore them when they load such a folder; a graph has no place for them, so an ONNX
folder has them in a file of its own, transitions.json.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qkit.core.batching import IGNORED
from qkit.core.errors import ModelError
from qkit.tasks._encoder.tagging.crf import Transitions, chain_crf
from qkit.tensors.shards import SHARDS, shards, tensor_specs
from qkit.tensors.shards import read as read_tensors

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray
    from transformers import PreTrainedModel

MODULE = "crf"  # of the model
FILE = "transitions.json"  # pairs [labels, labels], start [labels] and end [labels]
NAMES = tuple(field.name for field in fields(Transitions))


def add(model: PreTrainedModel, folder: Path) -> None:
    """Give the model a CRF over its labels, with the scores that the weights in `folder` hold, or 0.

    Raises:
        ModelError: the stored scores are of another number of labels.
    """
    module: Any = chain_crf(model.config.num_labels).to(model.device)  # type: ignore[attr-defined]
    if stored := _stored(folder):
        if len(stored["start"]) != model.config.num_labels:
            raise ModelError(
                f"{folder}: its CRF has {len(stored['start'])} labels, and the data {model.config.num_labels}; use the model that it was "
                "trained from",
                source=folder,
            )
        module.load_state_dict(stored)
    model.add_module(MODULE, module)


def add_stored(model: PreTrainedModel, folder: Path) -> None:
    """The same, if the weights in `folder` hold any scores."""
    if _stored(folder):
        add(model, folder)


def _stored(folder: Path) -> dict[str, torch.Tensor]:
    names = [f"{MODULE}.{name}" for name in NAMES]
    if not all(name in {name for shard in shards(folder) for name in tensor_specs(shard)} for name in names):
        return {}
    return {name.removeprefix(f"{MODULE}."): tensor.float() for name, tensor in read_tensors(folder, names)}


def of(model: Any) -> Mapping[str, NDArray[np.float32]] | None:
    """The scores of a model, by name; also of one that PEFT has wrapped. None if it has no CRF."""
    module = getattr(model, MODULE, None)
    if module is None:
        return None
    return {name: getattr(module, name).detach().float().cpu().numpy() for name in NAMES}


def write(model: Any, folder: Path) -> None:
    """Write the scores of a model, if it has any, to a file of their own."""
    if (scores := of(model)) is not None:
        content = {name: array.tolist() for name, array in scores.items()}
        (folder / FILE).write_text(json.dumps(content), encoding="utf-8")


def read(folder: Path) -> Mapping[str, NDArray[np.float32]] | None:
    """The scores that `write` wrote to a folder, or None."""
    import numpy as np

    file = folder / FILE
    if not file.is_file():
        return None
    content = json.loads(file.read_text(encoding="utf-8"))
    return {name: np.array(content[name], np.float32) for name in NAMES}


def in_folder(folder: Path) -> Mapping[str, NDArray[np.float32]] | None:
    """The scores that an artifact holds, in a file of their own or among its weights."""
    if (folder / FILE).is_file() or not any(folder.glob(SHARDS)):
        return read(folder)
    return {name: tensor.numpy() for name, tensor in _stored(folder).items()} or None


@dataclass(frozen=True)
class SentenceLoss:
    """The loss `crf` of a model with a CRF: the negative log-likelihood of a sentence's tags.

    It needs whole sentences; other losses take each word alone.
    """

    model: Any

    def __call__(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The loss of each row, [rows]. `logits` [rows, tokens, labels]; `labels` [rows, tokens], -100 at tokens without a tag."""
        emissions, tags, lengths = gathered(logits, labels)
        likelihood: torch.Tensor = getattr(self.model, MODULE).log_likelihood(emissions, tags, lengths)
        return -likelihood


def gathered(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The positions with a tag, moved together: logits [rows, most words, labels], tags [rows, most words], and words of each row [rows].

    What comes after a row's last word has no meaning.
    """
    tagged = labels != IGNORED
    lengths = tagged.sum(1)
    order = (~tagged).to(labels.dtype).argsort(dim=1, stable=True)[:, : int(lengths.max())]
    emissions = logits.gather(1, order[..., None].expand(-1, -1, logits.shape[-1]))
    return emissions, labels.gather(1, order), lengths


def losses(logits: torch.Tensor, labels: torch.Tensor, loss: Any) -> torch.Tensor:
    """The loss of each row, summed over its words, [rows]: of whole sentences, or of each word alone."""
    if isinstance(loss, SentenceLoss):
        return loss(logits, labels)
    tagged = labels != IGNORED
    of_words = loss(logits[tagged], labels[tagged])
    rows = tagged.nonzero()[:, 0]
    return of_words.new_zeros(len(labels)).index_add(0, rows, of_words)
