"""Combines several adapters into one with PEFT's methods."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qkit.core.errors import ModelError
from qkit.core.files import make_folder
from qkit.merging import distances
from qkit.model import added_tokens, load, provenance, source
from qkit.recipe.schema import Recipe
from qkit.run.directory import Run
from qkit.tensors.lora_deltas import Deltas

if TYPE_CHECKING:
    from transformers import PreTrainedModel


SUM = "sum"
# PEFT's methods, the combination_type of its add_weighted_adapter: those that keep every value, and those that drop some.
DENSE = ("linear", "cat", "svd")
SPARSE = ("ties", "dare_linear", "dare_ties", "magnitude_prune")
PEFT_METHODS = (*DENSE, *SPARSE, *(f"{name}_svd" for name in SPARSE))  # with _svd the ranks may differ
LEAST_DIFFERENCE = 1e-3  # as a share of the sum; a smaller difference is rounding
NOT_LOW_RANK = ("use_dora", "modules_to_save", "bias", "lora_bias", "trainable_token_indices", "target_parameters")


@dataclass(frozen=True)
class MergeRequest:
    """The arguments of `qkit merge --base`.

    `weights`: one for each adapter, or none, which means 1 each. `combine`: "sum" adds weight * delta of each adapter to the base, exactly;
    the other methods, and `density`, are those of PEFT's add_weighted_adapter. `rows`: a data set to measure on, in a format of `data.test`.
    """

    base: str
    adapters: Sequence[Path]
    out: Path
    weights: Sequence[float] = ()
    combine: str = SUM
    density: float = 0.5
    rows: str | None = None
    overrides: Sequence[str] = ()


def ensure_note(adapter: Path, folder: Path, recipe: Recipe) -> None:
    """Write qkit's note on the adapter's base, unless the adapter's folder has one."""
    if not (adapter / provenance.NOTE).is_file():
        names = _quantized(folder, recipe) if recipe.quantization.load_in_4bit else []
        provenance.write_adapter_note(adapter, folder, recipe, names)


def combined_adapter(
    request: MergeRequest, weights: Sequence[float], folder: Path, run: Run, recipe: Recipe
) -> list[str]:
    """Have PEFT make the run's one adapter. Returns a note on how far it is from the sum of its parts."""
    out = run.folder("train") / "adapter"
    combine(request, weights, folder, out, recipe.seed)
    ensure_note(out, folder, recipe)
    difference = distances.relative_difference(out, list(zip(request.adapters, weights, strict=True)))
    if difference < LEAST_DIFFERENCE:
        return []
    return [
        f"--combine {request.combine}: the combined change differs from the sum of weight * delta by {difference:.0%} of the size of that sum "
        f"(Frobenius norm over all weights); --combine {SUM}, the default, is that sum"
    ]


def combine(request: MergeRequest, weights: Sequence[float], folder: Path, out: Path, seed: int) -> None:
    """Combine several adapters into one in `out`, with PEFT; this needs no weights of the base.

    Raises:
        ModelError: PEFT cannot combine these adapters, or not with this method.
    """
    import torch
    from peft import PeftModel

    _need_low_rank(request.adapters)
    torch.manual_seed(seed)  # DARE drops at random
    names = [f"adapter{index}" for index in range(len(request.adapters))]
    try:
        model = PeftModel.from_pretrained(_shapes_only(folder), str(request.adapters[0]), adapter_name=names[0])
        for name, adapter in zip(names[1:], request.adapters[1:], strict=True):
            model.load_adapter(str(adapter), adapter_name=name)
        options = {} if request.combine in DENSE else {"density": request.density}
        model.add_weighted_adapter(names, list(weights), "combined", combination_type=request.combine, **options)
        model.peft_config["combined"].use_rslora = False  # the combined weights include each adapter's scaling
    except (ValueError, RuntimeError) as error:
        raise ModelError(
            f"PEFT cannot combine these adapters with {request.combine}: {str(error).splitlines()[0]}"
        ) from error
    make_folder(out.parent)
    with tempfile.TemporaryDirectory(dir=out.parent) as temporary:
        model.save_pretrained(temporary, selected_adapters=["combined"], save_embedding_layers=False)
        (Path(temporary) / "combined").rename(out)


def _need_low_rank(adapters: Sequence[Path]) -> None:
    """Raise ModelError if an adapter changes more than low-rank deltas: PEFT would silently use the first adapter's other changes, or zeros."""
    for adapter in adapters:
        config = Deltas(adapter).config
        others = [key for key in NOT_LOW_RANK if getattr(config, key, None) not in (None, False, [], {}, "none")]
        if others:
            raise ModelError(
                f"{adapter}: uses {', '.join(others)}, which PEFT cannot combine or weigh; --combine {SUM}, the default, adds up "
                "everything that each adapter changes",
                source=adapter,
            )


def _shapes_only(folder: Path) -> PreTrainedModel:
    """The model with one expanded zero for each weight, because PEFT reads only their shapes."""
    import torch

    model = added_tokens.skeleton(folder, False)
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            zero = torch.zeros((), dtype=torch.float32).expand(parameter.shape)
            setattr(module, name, torch.nn.Parameter(zero, requires_grad=False))
    return model


def _quantized(folder: Path, recipe: Recipe) -> list[str]:
    """Names of the weights that would be quantized to 4 bit: transformers decides, on a model without weights."""
    from transformers.quantizers import AutoHfQuantizer

    model = added_tokens.skeleton(folder, recipe.model.trust_remote_code)
    quantizer = AutoHfQuantizer.from_config(load.quantization_config(recipe.quantization), pre_quantized=False)
    quantizer.preprocess_model(model=model, device_map=None)
    return source.quantized_names(model)
