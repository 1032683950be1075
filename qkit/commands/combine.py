"""Several adapters as one: summed, or thinned by PEFT's methods."""

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
# PEFT's ways, its add_weighted_adapter's combination_type: those that keep every value, and those that drop some.
WHOLE = ("linear", "cat", "svd")
THINNED = ("ties", "dare_linear", "dare_ties", "magnitude_prune")
PEFTS = (*WHOLE, *THINNED, *(f"{name}_svd" for name in THINNED))  # with svd: whatever the ranks
SHOWN_APART = 1e-3  # of the change: less is rounding
BESIDE_DELTAS = ("use_dora", "modules_to_save", "bias", "lora_bias", "trainable_token_indices", "target_parameters")


@dataclass(frozen=True)
class Wish:
    """What to merge. `weights`: one for each adapter, or none: 1 each.

    `combine`: "sum" adds weight * delta of each to the base, exactly; the others, and `density`, are PEFT's add_weighted_adapter's.

    `rows`: a data set to measure on, in the formats of `data.test`.
    """

    base: str
    adapters: Sequence[Path]
    out: Path
    weights: Sequence[float] = ()
    combine: str = SUM
    density: float = 0.5
    rows: str | None = None
    overrides: Sequence[str] = ()


def combination_note(out: Path, folder: Path, how: Recipe) -> None:
    if not (out / provenance.NOTE).is_file():
        names = _quantized(folder, how) if how.quantization.load_in_4bit else []
        provenance.write_adapter_note(out, folder, how, names)


def combined_adapter(wish: Wish, weights: Sequence[float], folder: Path, run: Run, how: Recipe) -> list[str]:
    """Have PEFT make the run's one adapter; how far it is from the sum of what it was made of, whatever rows there are."""
    out = run.folder("train") / "adapter"
    combine(wish, weights, folder, out, how.seed)
    combination_note(out, folder, how)
    apart = distances.apart(out, list(zip(wish.adapters, weights, strict=True)))
    if apart < SHOWN_APART:
        return []
    return [
        f"--combine {wish.combine}: what it changes differs from the sum of weight * delta by {apart:.0%} of that sum's size (Frobenius "
        f"norm over all weights); --combine {SUM}, the default, is that sum"
    ]


def combine(wish: Wish, weights: Sequence[float], folder: Path, out: Path, seed: int) -> None:
    """One adapter of several, by PEFT; the base's weights are not needed for it.

    Raises:
        ModelError: PEFT does not combine these, or not in this way.
    """
    import torch
    from peft import PeftModel

    _need_plain(wish.adapters)
    torch.manual_seed(seed)  # DARE drops at random
    names = [f"adapter{index}" for index in range(len(wish.adapters))]
    try:
        held = PeftModel.from_pretrained(_weightless(folder), str(wish.adapters[0]), adapter_name=names[0])
        for name, adapter in zip(names[1:], wish.adapters[1:], strict=True):
            held.load_adapter(str(adapter), adapter_name=name)
        options = {} if wish.combine in WHOLE else {"density": wish.density}
        held.add_weighted_adapter(names, list(weights), "combined", combination_type=wish.combine, **options)
        held.peft_config["combined"].use_rslora = False  # each one's scaling is in the sum already
    except (ValueError, RuntimeError) as error:
        raise ModelError(
            f"PEFT does not combine these adapters by {wish.combine}: {str(error).splitlines()[0]}"
        ) from error
    with tempfile.TemporaryDirectory(dir=_parent(out)) as temporary:
        held.save_pretrained(temporary, selected_adapters=["combined"], save_embedding_layers=False)
        (Path(temporary) / "combined").rename(out)


def _need_plain(adapters: Sequence[Path]) -> None:
    """PEFT sums low-rank deltas; of what else an adapter has it takes the first one's, or zeros, without a word.

    Raises:
        ModelError: one of them has more than such deltas.
    """
    for adapter in adapters:
        config = Deltas(adapter).config
        odd = [key for key in BESIDE_DELTAS if getattr(config, key, None) not in (None, False, [], {}, "none")]
        if odd:
            raise ModelError(
                f"{adapter}: has {', '.join(odd)}, which PEFT does not combine or weigh: --combine {SUM}, the default, adds "
                "up what each adapter changes"
            )


def _parent(out: Path) -> Path:
    make_folder(out.parent)
    return out.parent


def _weightless(folder: Path) -> PreTrainedModel:
    """The model with weights of one zero each, that are as wide as the real ones: PEFT asks for shapes alone."""
    import torch

    made = added_tokens.skeleton(folder, False)
    for module in made.modules():
        for name, held in list(module.named_parameters(recurse=False)):
            zero = torch.zeros((), dtype=torch.float32).expand(held.shape)
            setattr(module, name, torch.nn.Parameter(zero, requires_grad=False))
    return made


def _quantized(folder: Path, how: Recipe) -> list[str]:
    """The weights that would be held in 4 bit: transformers decides, on a model without weights."""
    from transformers.quantizers import AutoHfQuantizer

    made = added_tokens.skeleton(folder, how.model.trust_remote_code)
    quantizer = AutoHfQuantizer.from_config(load.quantization_config(how.quantization), pre_quantized=False)
    quantizer.preprocess_model(model=made, device_map=None)
    return source.quantized_names(made)
