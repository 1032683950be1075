"""The modules of a model whose weights are not in its checkpoint, because a task puts a new head on the base model."""

from __future__ import annotations

from pathlib import Path
from types import MethodType
from typing import TYPE_CHECKING, Any

from qkit.plugins.task import ModelHead
from qkit.tensors.shards import shards, tensor_specs

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

POOLER = "pooler"  # of BERT and its kin, between the encoder and a head on whole texts: some checkpoints have it


def of(model: PreTrainedModel, folder: Path | None) -> list[str]:
    """Names of the new modules of a model that was loaded from `folder`: the head, and the pooler if the checkpoint has none.

    None: the checkpoint is not here; a pooler counts as new then.
    """
    prefix = model.base_model_prefix
    parts = [name for name, child in model.named_children() if name != prefix and any(True for _ in child.parameters())]
    stored = {name for shard in shards(folder) for name in tensor_specs(shard)} if folder else set()
    body = getattr(model, prefix, None)
    if getattr(body, POOLER, None) is not None and not any(POOLER in name for name in stored):
        parts.append(f"{prefix}.{POOLER}")
    return parts


def stored(model: PreTrainedModel, folder: Path) -> list[str]:
    """Names of the modules of the head whose weights are all in the checkpoint: it was trained for labels already.

    A part alone does not say so: the head of ModernBERT for masked words has a module of the same name as that for labels.
    """
    parts = [name for name in of(model, folder) if name != f"{model.base_model_prefix}.{POOLER}"]
    names = {name for shard in shards(folder) for name in tensor_specs(shard)}
    needed = [name for name, _ in model.named_parameters() if name.startswith(tuple(f"{part}." for part in parts))]
    return parts if names >= {*needed} else []


def names_of(folder: Path, head: ModelHead) -> list[str]:
    """The same before the weights are loaded; none for a head that the base model has."""
    if head.generates:
        return []
    import torch
    import transformers

    config = transformers.AutoConfig.from_pretrained(str(folder))
    with torch.device("meta"):
        return of(getattr(transformers, head.auto_class).from_config(config), folder)


def with_token_types(model: PeftModel) -> PeftModel:
    """The same model, which now reads token types whatever its head.

    PEFT 0.21 takes `token_type_ids` of a model that answers questions and drops them (PeftModelForQuestionAnswering.forward): the adapter
    would be trained without, and the merged model would read what it was never trained on.
    """
    from peft import PeftModelForQuestionAnswering

    if isinstance(model, PeftModelForQuestionAnswering) and not model.active_peft_config.is_prompt_learning:
        model.forward = MethodType(_forward, model)
    return model


def _forward(self: Any, *args: Any, **inputs: Any) -> Any:
    return self.base_model(*args, **inputs)
