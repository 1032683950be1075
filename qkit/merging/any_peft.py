"""Merges an adapter of any kind that PEFT merges: by PEFT's own arithmetic, a module at a time in fp32, and rounded once."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from qkit.core.device import detect
from qkit.core.errors import ModelError
from qkit.merging.sizes import OutputShape, write_config
from qkit.recipe import schema
from qkit.recipe.schema import Base, Recipe

if TYPE_CHECKING:
    import torch


def write_merged(folder: Path, adapter: Path, out: Path, base: Base, recipe: Recipe, section: schema.Merge) -> None:
    """Write the weights of the model in `folder` with the adapter in them, and config.json, to `out`.

    `base`: which weights to merge into. The whole model is in memory, in 16 bits.

    Raises:
        ModelError: the adapter is of a kind that PEFT does not merge, or belongs to another base.
    """
    import torch

    from qkit.model.load import load_reference

    if base == "16bit":
        quantization = recipe.quantization.model_copy(update={"load_in_4bit": False})
        recipe = recipe.model_copy(update={"quantization": quantization})
    model: Any = load_reference(folder, recipe, detect(), adapter)
    if (
        recipe.quantization.load_in_4bit
    ):  # its weights are dequantized, but PEFT and config.json would still call them 4-bit
        base_model = model.get_base_model()
        base_model.hf_quantizer.remove_quantization_config(base_model)
        base_model.is_loaded_in_4bit = False
    try:
        _merge(model, getattr(torch, section.dtypes[0]))
        whole = model.base_model.unload()
    except (ValueError, NotImplementedError, AttributeError) as error:
        kind = model.active_peft_config.peft_type
        raise ModelError(f"{adapter}: PEFT cannot merge an adapter of type {kind}: {error}", source=adapter) from error
    whole.to(getattr(torch, section.dtypes[0]))
    if wrong := [name for name, tensor in whole.named_parameters() if not bool(tensor.isfinite().all())]:
        raise ModelError(
            f"{adapter}: the merged {wrong[0]} contains NaN or infinite values: set merge.dtype to bfloat16 or float32, or train with a lower "
            "rate",
            source=adapter,
        )
    whole.save_pretrained(str(out), max_shard_size=section.max_shard_bytes)
    write_config(folder, out, section.dtypes[0], OutputShape(untied=False, vocabulary=None))


def _merge(model: Any, dtype: torch.dtype) -> None:
    """Merge every layer with an adapter, in place. `dtype`: of the merged weights."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for layer in [module for module in model.modules() if isinstance(module, BaseTunerLayer)]:
        tensors = list(layer.get_base_layer().parameters())
        for tensor in tensors:
            tensor.data = tensor.data.float()
        if not layer.merged:
            layer.merge()
        for tensor in layer.get_base_layer().parameters():
            tensor.data = tensor.data.to(dtype)
