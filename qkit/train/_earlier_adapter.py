"""What must fit for training to go on from an adapter (lora.init_from), checked before anything is loaded, and what is recorded of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from qkit.core.errors import RecipeError, as_yaml, listed
from qkit.core.files import read_json
from qkit.model import provenance
from qkit.model.adapters.earlier import folder_of
from qkit.plugins.task import read_labels
from qkit.recipe.schema import Lora

FIELDS = ("r", "lora_alpha", "use_rslora", "use_dora")  # of LoraConfig: the same in the recipe


def check(section: Lora, base: Path, data: Path, notify: Callable[[str], None]) -> None:
    """Check the adapter, if there is one, against the recipe, the base model and the labels in the folder `data`, before anything is loaded.
    Says if its base is unknown.

    Raises:
        MissingArtifact: there is no adapter.
        ModelError: it was trained on another base, or is already merged into this one.
        RecipeError: it is of another kind than the recipe's, or has other settings.
    """
    if section.init_from is None:
        return
    folder = folder_of(section.init_from)
    config: Mapping[str, Any] = read_json(folder / "adapter_config.json")
    if config.get("peft_type") != "LORA":
        raise RecipeError(f"lora.init_from={section.init_from}: an adapter of type {config.get('peft_type')}, not LORA")
    wrong = [name for name in FIELDS if config.get(name, False) != getattr(section, name)]
    if wrong:
        wanted = " ".join(f"lora.{name}={as_yaml(config.get(name, False))}" for name in wrong)
        written = ", ".join(f"{name}={as_yaml(getattr(section, name))}" for name in wrong)
        raise RecipeError(
            f"lora.init_from={section.init_from}: the recipe has {written}, and the adapter another: set {wanted}"
        )
    if patterns := [name for name in ("rank_pattern", "alpha_pattern") if config.get(name)]:
        raise RecipeError(
            f"lora.init_from={section.init_from}: the adapter has {' and '.join(patterns)}, ranks or scalings of single modules, which a "
            "recipe cannot say; merge it, and train on the merged model"
        )
    theirs, ours = read_labels(folder), read_labels(data)
    if theirs and theirs != ours:
        raise RecipeError(
            f"lora.init_from={section.init_from}: its head is for the labels {listed(theirs)} in this order, and the data have {listed(ours)}"
        )
    if (folder / provenance.NOTE).is_file():
        provenance.check_adapter(folder, base)
        return
    named = config.get("base_model_name_or_path")
    notify(
        f"train: warning: qkit did not make the adapter in {folder}, so its base is not checked: it names {named or 'none'}"
    )


def origin(section: Lora) -> Mapping[str, str] | None:
    """What to record of the adapter that training began with; None if it began with none."""
    if section.init_from is None:
        return None
    folder = folder_of(section.init_from)
    return {"folder": str(folder.resolve()), "sha256": provenance.adapter_sha256(folder)}
