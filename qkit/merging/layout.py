"""How a checkpoint's tensors become a model's: transformers' own tables of names and conversions, read for one folder.

Many checkpoints hold other names than the model has in memory, and some hold its tensors in other pieces: one for each expert where the
model has one for all of them. Adapters, and what is known of quantized weights, go by the model's names.
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
    """Tensors of a checkpoint that become others together, by `conversion`, which is transformers' own.

    `target`: the first name of what they become. `sources`: the checkpoint's names by the pattern that they matched, in order.
    """

    target: str
    conversion: Any
    sources: dict[str, list[str]] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """The checkpoint's."""
        return [name for names in self.sources.values() for name in names]

    @property
    def by_expert(self) -> bool:
        """Whether the checkpoint has a tensor for each expert where the model has one for all, numbered by its first dimension."""
        from transformers.core_model_loading import MergeModulelist

        first = self.conversion.operations[0]
        return isinstance(first, MergeModulelist) and first.dim == 0 and len(self.conversion.target_patterns) == 1

    def place(self, name: str) -> tuple[str, int]:
        """The first name of a checkpoint's that matched the same pattern, and how many did before."""
        return next((names[0], names.index(name)) for names in self.sources.values() if name in names)


class Layout:
    """A folder's tensors and the model's: `names` of those that are one another's, and the `groups` that the others are in.

    `model`: without weights; None where its code is not transformers', and then every tensor goes by the checkpoint's name.
    """

    def __init__(self, folder: Path, specs: Mapping[str, Spec]):
        self.folder = folder
        self.model = _skeleton(folder)
        self.names: dict[str, str] = {name: name for name in specs}
        self.groups: dict[str, Group] = {}
        if self.model is not None:
            self._read(self.model, specs)

    def _read(self, model: PreTrainedModel, specs: Mapping[str, Spec]) -> None:
        """As transformers does when it loads (core_model_loading, convert_and_load_state_dict_in_model), by names alone."""
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

        tables = get_model_conversion_mapping(model)
        renamings = [entry for entry in tables if isinstance(entry, WeightRenaming)]
        conversions = [entry for entry in tables if isinstance(entry, WeightConverter)]
        by_pattern = {pattern: entry for entry in conversions for pattern in entry.source_patterns}
        known, prefix = model.state_dict(), model.base_model_prefix
        groups: dict[str, Group] = {}
        for name in sorted(specs, key=dot_natural_key):
            own, pattern = rename_source_key(name, renamings, conversions, prefix, known)
            if own not in known and name in known:
                own, pattern = rename_source_key(name, [], [], prefix, known)
            if own not in known:
                continue  # transformers does not load it
            if pattern is None:
                self.names[name] = own
            else:
                group = groups.setdefault(own, Group(own, by_pattern[pattern]))
                group.sources.setdefault(pattern, []).append(name)
                self.groups[name] = group
        model._weight_conversions = [entry for entry in tables if entry.was_used()]

    def on_disk(self, name: str) -> str:
        """What the checkpoint calls a tensor of the model; its own name where it has none."""
        return next((disk for disk, own in self.names.items() if own == name and disk not in self.groups), name)

    def loaded(self, group: Group, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The model's tensors, of all that the checkpoint has for them."""
        made = deepcopy(group.conversion)
        for pattern, names in group.sources.items():
            for name in names:
                made.add_tensor(group.target, name, pattern, tensors[name])
        return _single(made.convert(group.target, model=self.model, config=self._config))

    def saved(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The checkpoint's tensors, of the model's, by transformers' way back; of one expert's slice those of the first expert."""
        from transformers.core_model_loading import revert_weight_conversion

        assert self.model is not None
        return _single(revert_weight_conversion(self.model, dict(tensors)))

    def shape(self, name: str) -> Sequence[int]:
        """Of a tensor of the model."""
        assert self.model is not None
        return list(self.model.state_dict()[name].shape)

    @property
    def _config(self) -> Any:
        assert self.model is not None
        return self.model.config

    def targets(self, group: Group, specs: Mapping[str, Spec]) -> dict[str, Sequence[int]]:
        """Names and shapes of what a group becomes, after seeing that the way back gives the checkpoint's own.

        Raises:
            ModelError: it does not.
        """
        import torch

        empty = {name: torch.empty(specs[name]["shape"], device="meta") for name in group.names}
        made = self.loaded(group, empty)
        back = {name: list(tensor.shape) for name, tensor in self.saved(made).items()}
        if wrong := [name for name in group.names if back.get(name) != list(specs[name]["shape"])]:
            raise ModelError(
                f"{self.folder}: {wrong[0]} is loaded into {group.target} by a conversion of transformers' that has no way back to it, so that "
                "nothing can be merged into it; save the model with `save_pretrained` once and use that folder"
            )
        return {name: list(tensor.shape) for name, tensor in made.items()}


def _skeleton(folder: Path) -> PreTrainedModel | None:
    try:
        return added_tokens.skeleton(folder, False)
    except (OSError, ValueError, ImportError):  # a model of remote code
        return None


def _single(found: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    return {name: value[0] if isinstance(value, list) else value for name, value in found.items()}
