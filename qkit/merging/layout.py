"""Maps a checkpoint's tensors to the model's, by transformers' tables of names and conversions.

Many checkpoints use names that differ from those of the loaded model, and some split tensors differently: one per expert instead of one for
all experts. Adapters and the list of quantized weights use the model's names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qkit.core.errors import ModelError
from qkit.model import added_tokens
from qkit.tensors.shards import Spec

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Group:
    """Tensors of a checkpoint that transformers converts together, by its `conversion`.

    `target`: the name of the first resulting tensor. `sources`: the checkpoint's names, in order, by the pattern that they matched.
    """

    target: str
    conversion: Any
    sources: dict[str, list[str]] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """The checkpoint's names."""
        return [name for names in self.sources.values() for name in names]

    @property
    def by_expert(self) -> bool:
        """Whether the checkpoint has one tensor per expert and the model has one for all, indexed by its first dimension."""
        from transformers.core_model_loading import MergeModulelist

        first = self.conversion.operations[0]
        return isinstance(first, MergeModulelist) and first.dim == 0 and len(self.conversion.target_patterns) == 1

    def place(self, name: str) -> tuple[str, int]:
        """The first of the checkpoint's names that matched the same pattern as `name`, and the index of `name` among them."""
        return next((names[0], names.index(name)) for names in self.sources.values() if name in names)


class Layout:
    """How a folder's tensors map to the model's.

    `names`: model name by checkpoint name, for tensors that map one to one. `groups`: by checkpoint name, for all others. `model`: the model
    without weights; None if its code is not part of transformers, in which case the checkpoint's names are used unchanged.
    """

    def __init__(self, folder: Path, specs: Mapping[str, Spec]):
        self.folder = folder
        self.model = _skeleton(folder)
        self.names: dict[str, str] = {name: name for name in specs}
        self.groups: dict[str, Group] = {}
        if self.model is not None:
            self._read(self.model, specs)

    def _read(self, model: PreTrainedModel, specs: Mapping[str, Spec]) -> None:
        """Do what transformers does on loading (core_model_loading, convert_and_load_state_dict_in_model), with names only."""
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

        tables = get_model_conversion_mapping(model)
        renamings = [entry for entry in tables if isinstance(entry, WeightRenaming)]
        conversions = [entry for entry in tables if isinstance(entry, WeightConverter)]
        by_pattern = {pattern: entry for entry in conversions for pattern in entry.source_patterns}
        known, prefix = model.state_dict(), model.base_model_prefix
        groups: dict[str, Group] = {}
        for name in sorted(specs, key=dot_natural_key):
            target, pattern = rename_source_key(name, renamings, conversions, prefix, known)
            if target not in known and name in known:
                target, pattern = rename_source_key(name, [], [], prefix, known)
            if target not in known:
                continue  # transformers does not load it
            if pattern is None:
                self.names[name] = target
            else:
                group = groups.setdefault(target, Group(target, by_pattern[pattern]))
                group.sources.setdefault(pattern, []).append(name)
                self.groups[name] = group
        model._weight_conversions = [entry for entry in tables if entry.was_used()]

    def on_disk(self, name: str) -> str:
        """The checkpoint's name of a tensor of the model; `name` itself if the checkpoint has no such tensor."""
        return next((disk for disk, model in self.names.items() if model == name and disk not in self.groups), name)

    def loaded(self, group: Group, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The model's tensors, by name, converted from the checkpoint's `tensors` of the group."""
        conversion = deepcopy(group.conversion)
        for pattern, names in group.sources.items():
            for name in names:
                conversion.add_tensor(group.target, name, pattern, tensors[name])
        return _single(conversion.convert(group.target, model=self.model, config=self._config))

    def saved(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The checkpoint's tensors, by name, converted back from the model's; for a slice of one expert, those of the first expert."""
        from transformers.core_model_loading import revert_weight_conversion

        assert self.model is not None
        return _single(revert_weight_conversion(self.model, dict(tensors)))

    def shape(self, name: str) -> Sequence[int]:
        """The shape of the model's tensor `name`."""
        assert self.model is not None
        return list(self.model.state_dict()[name].shape)

    @property
    def _config(self) -> Any:
        assert self.model is not None
        return self.model.config

    def targets(self, group: Group, specs: Mapping[str, Spec]) -> dict[str, Sequence[int]]:
        """Names and shapes of the model's tensors that a group becomes, after checking that the conversion can be reverted.

        Raises:
            ModelError: reverting the conversion does not give the checkpoint's tensors.
        """
        import torch

        empty = {name: torch.empty(specs[name]["shape"], device="meta") for name in group.names}
        tensors = self.loaded(group, empty)
        back = {name: list(tensor.shape) for name, tensor in self.saved(tensors).items()}
        if wrong := [name for name in group.names if back.get(name) != list(specs[name]["shape"])]:
            raise ModelError(
                f"{self.folder}: transformers loads {wrong[0]} into {group.target} by a conversion that cannot be reverted, so an adapter "
                "cannot be merged into it; save the model with `save_pretrained` once and use that folder"
            )
        return {name: list(tensor.shape) for name, tensor in tensors.items()}


def _skeleton(folder: Path) -> PreTrainedModel | None:
    try:
        return added_tokens.skeleton(folder, False)
    except (OSError, ValueError, ImportError):  # a model with remote code
        return None


def _single(tensors: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    return {name: value[0] if isinstance(value, list) else value for name, value in tensors.items()}
