"""What of a model is trained: an adapter, all weights, or the new head alone."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qkit.model import added_tokens, tokenizer
from qkit.model.adapters import new_heads
from qkit.plugins.task import open_task
from qkit.recipe import schema
from qkit.recipe.schema import BOTTLENECKS, Recipe

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


def prepared(base: PreTrainedModel, folder: Path, recipe: Recipe) -> PreTrainedModel | PeftModel:
    """The model with what recipe.method trains, and nothing else, set to be trained. `folder`: of the base model.

    Raises:
        ModelError: the method has no place in this architecture.
    """
    return with_method(base, new_heads.of(base, folder), recipe, _added_rows(recipe.model))


def with_method(
    base: PreTrainedModel, new: Sequence[str], recipe: Recipe, added: Sequence[int] = ()
) -> PreTrainedModel | PeftModel:
    """The same, of a model that need not have weights. `new`: its new modules; `added`: rows of the embedding to train with an adapter.

    Raises:
        ModelError: as `prepared`.
    """
    if recipe.method == "lora":
        return _with_lora(base, new, recipe, added)
    if recipe.method in BOTTLENECKS:
        return _with_bottlenecks(base, new, recipe)
    for name, parameter in base.named_parameters():
        parameter.requires_grad_(recipe.method == "full" or name.startswith(tuple(f"{part}." for part in new)))
    return base


def _with_lora(base: PreTrainedModel, new: Sequence[str], recipe: Recipe, added: Sequence[int]) -> PeftModel:
    """A LoRA adapter on the base; the new modules are trained whole, and saved with it."""
    from peft import LoraConfig, get_peft_model

    fields = recipe.lora.model_dump(exclude={"target_modules", "target_parameters"})
    modules = recipe.lora.target_modules
    config = LoraConfig(
        task_type=open_task(recipe.task).HEAD.peft_task_type,
        target_modules=modules if isinstance(modules, str) else list(modules),
        target_parameters=list(recipe.lora.target_parameters) or None,
        exclude_modules="|".join(
            rf"{re.escape(name)}(\..*)?" for name in new
        ),  # all-linear would put LoRA on them, too
        modules_to_save=[*new],
        trainable_token_indices={added_tokens.names(base)[0]: [*added]} if added else None,
        **fields,
    )
    adapted: PeftModel = get_peft_model(base, config)
    return adapted


def _added_rows(section: schema.Model) -> list[int]:
    """The rows of the embedding that are trained with the adapter: those of model.add_tokens."""
    if not section.add_tokens:
        return []
    words = tokenizer.with_added_tokens(section)
    return sorted({int(words.convert_tokens_to_ids(token)) for token in section.add_tokens})


def _with_bottlenecks(base: PreTrainedModel, new: Sequence[str], recipe: Recipe) -> PeftModel:
    """Bottleneck adapters where recipe.method says; the new modules are trained whole, and saved with them."""
    from peft import get_peft_model

    from qkit.model.adapters.bottleneck import places, tuner

    config = tuner.register()(
        task_type=open_task(recipe.task).HEAD.peft_task_type,
        modules_to_save=[*new],
        **places.for_peft(base, recipe.method),
        **recipe.bottleneck.model_dump(),
    )
    adapted: PeftModel = get_peft_model(base, config)
    return adapted
