"""Training that goes on from an adapter: the folder that lora.init_from names, and its weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qkit.core.errors import MissingArtifact, RecipeError
from qkit.model.adapters import sums
from qkit.recipe.schema import Lora
from qkit.tensors.lora_deltas import PREFIX, WEIGHTS

if TYPE_CHECKING:
    import torch
    from peft import PeftModel


def folder_of(named: str) -> Path:
    """The adapter's folder, given as such or as a run directory.

    Raises:
        MissingArtifact: there is no adapter.
    """
    given = Path(named).expanduser()
    folder = given / "train" / "adapter" if (given / "recipe.yaml").is_file() else given
    if not (folder / "adapter_config.json").is_file() or not (folder / WEIGHTS).is_file():
        several = (
            ": it holds a sum of several; merge it, and train on the merged model" if sums.is_several(folder) else ""
        )
        raise MissingArtifact(
            f"lora.init_from={named}: {folder} is not an adapter (it has no adapter_config.json and {WEIGHTS}){several}",
            path=folder,
        )
    return folder


def take(model: PeftModel, section: Lora) -> None:
    """Give a new adapter the weights of the earlier one, in place.

    Raises:
        RecipeError: the two do not have the same tensors.
    """
    from peft import get_peft_model_state_dict, set_peft_model_state_dict
    from safetensors.torch import load_file

    folder = folder_of(str(section.init_from))
    tensors, own = load_file(folder / WEIGHTS), get_peft_model_state_dict(model)
    if wrong := _other_tensors(tensors, own):
        raise RecipeError(f"lora.init_from={section.init_from}: {wrong}")
    set_peft_model_state_dict(model, tensors)


def _other_tensors(theirs: Mapping[str, torch.Tensor], own: Mapping[str, torch.Tensor]) -> str:
    """How the tensors of two adapters differ, and what to set; "" if they do not."""
    if theirs.keys() != own.keys():
        less, more = sorted(own.keys() - theirs.keys()), sorted(theirs.keys() - own.keys())
        first = f"lacks {_short(less[0])}" if less else f"also has {_short(more[0])}"
        kinds = _kinds(list(theirs))
        remedy = f"it changes {', '.join(kinds)}: set lora.target_modules=[{','.join(kinds)}]"
        return f"the adapter {first} and {len(less) + len(more) - 1} more tensors; {remedy}"
    shapes = [name for name in own if theirs[name].shape != own[name].shape]
    if shapes:
        name = shapes[0]
        return f"{_short(name)} has shape {list(theirs[name].shape)} in the adapter, and {list(own[name].shape)} in this model"
    return ""


def _short(name: str) -> str:
    return name.removeprefix(PREFIX)


def _kinds(names: Sequence[str]) -> list[str]:
    """The last part of the names of the modules that have factors."""
    modules = [name.partition(".lora_")[0] for name in names if ".lora_" in name]
    return sorted({module.rpartition(".")[2] for module in modules})
