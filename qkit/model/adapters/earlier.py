"""Training that goes on from an adapter: the folder that lora.init_from names, what must fit, and its weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qkit.core.errors import MissingArtifact, RecipeError
from qkit.core.files import read_json
from qkit.model import provenance
from qkit.model.adapters import sums
from qkit.recipe.schema import Lora
from qkit.tensors.lora_deltas import PREFIX, WEIGHTS

if TYPE_CHECKING:
    import torch
    from peft import PeftModel

FIELDS = ("r", "lora_alpha", "use_rslora", "use_dora")  # of LoraConfig: the same in the recipe


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


def check(section: Lora, base: Path) -> str:
    """Check the adapter against the recipe and the base model, before anything is loaded. Returns what to know of its base, or "".

    Raises:
        MissingArtifact: there is no adapter.
        ModelError: it was trained on another base, or is already merged into this one.
        RecipeError: it is of another kind than the recipe's, or has other settings.
    """
    folder = folder_of(str(section.init_from))
    config: Mapping[str, Any] = read_json(folder / "adapter_config.json")
    if config.get("peft_type") != "LORA":
        raise RecipeError(f"lora.init_from={section.init_from}: an adapter of type {config.get('peft_type')}, not LORA")
    wrong = [name for name in FIELDS if config.get(name, False) != getattr(section, name)]
    if wrong:
        theirs = " ".join(f"lora.{name}={_as_yaml(config.get(name, False))}" for name in wrong)
        ours = ", ".join(f"{name}={_as_yaml(getattr(section, name))}" for name in wrong)
        raise RecipeError(
            f"lora.init_from={section.init_from}: the recipe has {ours}, and the adapter another: set {theirs}"
        )
    if (folder / provenance.NOTE).is_file():
        provenance.check_adapter(folder, base)
        return ""
    named = config.get("base_model_name_or_path")
    return f"qkit did not make the adapter in {folder}, so its base is not checked: it names {named or 'none'}"


def origin(section: Lora) -> Mapping[str, str] | None:
    """What to record of the adapter that training began with; None if it began with none."""
    if section.init_from is None:
        return None
    folder = folder_of(section.init_from)
    return {"folder": str(folder.resolve()), "sha256": provenance.adapter_sha256(folder)}


def _as_yaml(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


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
