"""What of a model is trained: an adapter, all weights, or the new head alone."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qkit.core.errors import ModelError, RecipeError, nearest, short
from qkit.model import added_tokens, tokenizer
from qkit.model.adapters import new_heads, starts, trainable
from qkit.plugins.task import open_task
from qkit.recipe import schema
from qkit.recipe.schema import BOTTLENECKS, Recipe

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


UNTRAINABLE = {
    "ADALORA": "it needs a call after each step that the trainer does not make; use LORA",
    "ADAPTION_PROMPT": "it is for causal language models only; use IA3, or method=lora",
    "CPT": "it is for causal language models only; use PROMPT_TUNING, or method=lora",
    "CARTRIDGE": "it is for causal language models only; use PREFIX_TUNING, or method=lora",
    "P_TUNING": "PEFT saves what its encoder computes and not the encoder, so a killed training could not go on; use PROMPT_TUNING",
    "POLY": "it needs the number of each row's task, which rows do not have; use LORA",
    "XLORA": "it mixes adapters that were trained before; use LORA",
    "MULTITASK_PROMPT_TUNING": "it needs the number of each row's task, which rows do not have; use PROMPT_TUNING",
}


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
        return new_heads.with_token_types(_with_lora(base, new, recipe, added))
    if recipe.method in BOTTLENECKS:
        return new_heads.with_token_types(_with_bottlenecks(base, new, recipe))
    if recipe.method == "peft":
        return new_heads.with_token_types(_with_any(base, new, recipe))
    trainable.choose(base, new, recipe)
    return base


def _with_lora(base: PreTrainedModel, new: Sequence[str], recipe: Recipe, added: Sequence[int]) -> PeftModel:
    """A LoRA adapter on the base; the new modules are trained whole, and saved with it."""
    from peft import LoraConfig

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
        **starts.fields(recipe.lora),
    )
    return starts.put(base, config)


def _check_prompt(fields: Mapping[str, Any]) -> None:
    """Raise RecipeError for a prompt that a killed training could not go on from."""
    if fields.get("prefix_projection"):
        raise RecipeError(
            "peft.prefix_projection=true: PEFT saves what the projection computes and not the projection, so a killed training could not go "
            "on; remove it"
        )


def _with_any(base: PreTrainedModel, new: Sequence[str], recipe: Recipe) -> PeftModel:
    """An adapter of the kind that the section `peft` names, by PEFT's own configuration of it.

    Raises:
        RecipeError: PEFT does not know the kind or a field, or cannot put it on this model.
    """
    from peft import PromptLearningConfig, get_peft_model

    config_class = peft_config_class(recipe.peft["peft_type"])
    fields = {name: value for name, value in recipe.peft.items() if name != "peft_type"}
    known = {field.name for field in dataclasses.fields(config_class)}
    if unknown := sorted(fields.keys() - known):
        raise RecipeError(
            f"peft.{short(unknown[0])}: {config_class.__name__} has no such field{nearest(unknown[0], sorted(known))}"
        )
    _check_prompt(fields)
    of_head = {
        "modules_to_save": [*new] or None,
        "exclude_modules": "|".join(rf"{re.escape(name)}(\..*)?" for name in new) or None,
        "task_type": open_task(recipe.task).HEAD.peft_task_type,
    }
    if issubclass(config_class, PromptLearningConfig) and _finds_tokens(base):
        raise RecipeError(
            f"peft.peft_type={recipe.peft['peft_type']}: the head of {type(base).__name__} looks for tokens by their place in a row, and would "
            "read padding behind a prompt that was learned; use a kind of adapter that changes layers, such as IA3"
        )
    kind = recipe.peft["peft_type"]
    try:
        config = config_class(**{**{name: value for name, value in of_head.items() if name in known}, **fields})
        adapted: PeftModel = get_peft_model(base, config)
    except (ValueError, TypeError, NotImplementedError) as error:
        if isinstance(error, NotImplementedError) and base.device.type == "meta":
            raise ModelError(
                f"peft.peft_type={kind} reads the weights when it is made, so its memory cannot be planned"
            ) from error
        raise RecipeError(f"peft: {config_class.__name__} refuses its settings for this model: {error}") from error
    return adapted


def _finds_tokens(base: PreTrainedModel) -> bool:
    """Whether the head reads the last token of a decoder, or pools all tokens."""
    return hasattr(base, "score") or hasattr(base.config, "pooled_head")


def peft_config_class(kind: str) -> Any:
    """PEFT's configuration of a kind of adapter, such as IA3.

    Raises:
        RecipeError: there is none, or qkit cannot train it.
    """
    from peft import PeftType
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    names = [one.name for one in PeftType if one.name not in UNTRAINABLE]
    if kind in UNTRAINABLE:
        raise RecipeError(f"peft.peft_type={kind}: {UNTRAINABLE[kind]}")
    if kind not in names:
        raise RecipeError(f"peft.peft_type={short(str(kind))} is none of {', '.join(names)}{nearest(str(kind), names)}")
    return PEFT_TYPE_TO_CONFIG_MAPPING[PeftType[kind]]


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
