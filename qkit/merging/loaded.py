"""Merges an adapter of a model with a new head, loaded as a whole: its checkpoint does not have the names that the model has."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from qkit.core.device import detect
from qkit.core.files import make_folder
from qkit.model import provenance, source
from qkit.plugins.task import LABELS
from qkit.recipe.schema import Base
from qkit.recipe.section import Dtype
from qkit.run.directory import Run
from qkit.tensors.companions import copy_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def write_folder(run: Run, out: Path, base: Base, dtype: Dtype) -> None:
    """Write the model with the adapter in its weights to the new folder `out`; where all weights were trained, these are the model.

    `base`: the weights of the base to merge into. `dtype`: of the weights that are written.

    Raises:
        ModelError: the adapter does not belong to this base, or is of a kind that cannot be merged.
    """
    folder, trained = source.resolve(run.recipe.model), run.trained()
    provenance.check_adapter(trained, folder)
    make_folder(out)
    copy_tokenizer(folder, out)
    _merged(run, folder, trained, base, dtype).save_pretrained(str(out))
    (out / LABELS).write_bytes((trained / LABELS).read_bytes())
    provenance.write_merged(out, folder, run.recipe.model.source, base, {provenance.adapter_sha256(trained): 1.0})
    provenance.write_purpose(out, run.recipe, run.tuned())


def _merged(run: Run, folder: Path, trained: Path, base: Base, dtype: Dtype) -> PreTrainedModel:
    import torch

    from qkit.model.load import load_reference

    recipe = run.recipe
    if base == "16bit":
        section = recipe.quantization.model_copy(update={"load_in_4bit": False})
        recipe = recipe.model_copy(update={"quantization": section})
    model = load_reference(folder, recipe, detect(), trained)
    whole: PreTrainedModel = model.to(getattr(torch, dtype))
    with warnings.catch_warnings():  # the rows of added tokens are merged as soon as they are loaded
        warnings.filterwarnings("ignore", "All adapters are already merged")
        whole = whole.merge_and_unload() if hasattr(whole, "merge_and_unload") else whole
    if recipe.quantization.load_in_4bit:  # its weights are dequantized, but config.json would still call them 4-bit
        whole.hf_quantizer.remove_quantization_config(whole)
    return whole
