"""Where bottleneck adapters go in a layer, and how many parameters they have.

`houlsby`: after the attention's output projection, and after the MLP. `pfeiffer`: after the MLP only. `parallel`: beside the MLP; the adapter
reads what the MLP reads. All three add to what the block computes, before the block adds its own input and, in a BERT, applies LayerNorm.
The library `adapters` computes the same with its configs double_seq_bn, seq_bn with original_ln_before=False, and par_bn, with two
exceptions: its seq_bn alone applies a BERT's LayerNorm before the adapter too, and in a decoder its par_bn reads what the norm before the MLP
reads, where this one reads the norm's output.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qkit.core.errors import ModelError, RecipeError, nearest
from qkit.model.adapters.bottleneck.layer import bottleneck_width

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

ADAPTERS_PER_LAYER = {"houlsby": 2, "pfeiffer": 1, "parallel": 1}  # by placement


@dataclass(frozen=True)
class Layout:
    """The modules of a layer, by their names in it."""

    attention: str  # the last matrix of the attention
    mlp_end: str  # returns the MLP's output
    mlp: str  # reads the MLP's input and returns its output


# In this order: a layer has the first layout whose modules it has.
LAYOUTS = (
    Layout("attention.output.dense", "output.dense", "output"),  # BERT, RoBERTa, XLM-R, ELECTRA, DeBERTa
    Layout("attention.attn.o", "output.dense", "output"),  # MPNet
    Layout("attention.out_lin", "ffn.lin2", "ffn"),  # DistilBERT
    Layout("attn.Wo", "mlp.Wo", "mlp"),  # ModernBERT
    Layout("self_attn.o_proj", "mlp.down_proj", "mlp"),  # Llama, Qwen, Mistral, Gemma, Phi-3, OLMo 2
    Layout("self_attn.o_proj", "mlp.c_proj", "mlp"),  # StarCoder2
    Layout("self_attn.o_proj", "mlp", "mlp"),  # mixtures of experts
    Layout("attn.c_proj", "mlp.c_proj", "mlp"),  # GPT-2
    Layout("attention.dense", "mlp.dense_4h_to_h", "mlp"),  # GPT-NeoX
)


def for_peft(model: PreTrainedModel, placement: str) -> dict[str, Any]:
    """Return the fields of BottleneckConfig that select the modules of a placement in this model, which has no adapters yet.

    Raises:
        ModelError, RecipeError: as `target_modules`.
    """
    return {"target_modules": target_modules(model, placement), "parallel": placement == "parallel"}


def target_modules(model: PreTrainedModel, placement: str) -> list[str]:
    """Return the full names of the modules that get an adapter, layer by layer.

    Args:
        model: a loaded transformers model without adapters.
        placement: a key of ADAPTERS_PER_LAYER.

    Raises:
        ModelError: the layers are of an unknown kind, or the model has several stacks of them.
        RecipeError: there is no such placement.
    """
    need_placement(placement)
    targets = []
    for name, layout in _layers(model).items():
        kinds = {
            "houlsby": (layout.attention, layout.mlp_end),
            "pfeiffer": (layout.mlp_end,),
            "parallel": (layout.mlp,),
        }
        targets += [f"{name}.{kind}" for kind in kinds[placement]]
    return targets


def need_placement(placement: str) -> None:
    """Raise RecipeError if there is no such placement."""
    if placement not in ADAPTERS_PER_LAYER:
        known = list(ADAPTERS_PER_LAYER)
        raise RecipeError(
            f"placement {placement!r} of bottleneck adapters is none of {', '.join(known)}{nearest(placement, known)}"
        )


def _layers(model: PreTrainedModel) -> dict[str, Layout]:
    """The model's layers by name, in order."""
    from torch import nn

    stacks = {name: stack for name, stack in model.named_modules() if isinstance(stack, nn.ModuleList)}
    laid_out = {name: layouts for name, stack in stacks.items() if any(layouts := [_layout(layer) for layer in stack])}
    if len(laid_out) != 1:
        several = f"it has several stacks of layers ({', '.join(laid_out)})"
        raise ModelError(_unplaced(model, several if laid_out else "its layers are of an unknown kind"))
    ((name, layouts),) = laid_out.items()
    if None in layouts:
        raise ModelError(_unplaced(model, f"{name}.{layouts.index(None)} is of another kind than the other layers"))
    return {f"{name}.{number}": layout for number, layout in enumerate(layouts) if layout is not None}


def _layout(layer: nn.Module) -> Layout | None:
    names = {name for name, _ in layer.named_modules()}
    return next((one for one in LAYOUTS if names >= {one.attention, one.mlp_end, one.mlp}), None)


def _unplaced(model: PreTrainedModel, reason: str) -> str:
    return (
        f"{type(model).__name__}: the place of bottleneck adapters is unknown, because {reason}. Set target_modules to the modules after "
        "which an adapter belongs: in each layer the last matrix of the MLP and, for the houlsby placement, the last one of the attention; "
        "for the parallel placement, the MLP itself"
    )


# --- for a memory plan --------------------------------------------------------------------------------------------------


def parameters(hidden: int, reduction_factor: int) -> int:
    """Return the number of parameters of one adapter: two matrices and two biases. `hidden`: the model's hidden size."""
    width = bottleneck_width(hidden, reduction_factor)
    return 2 * hidden * width + width + hidden


def planned_parameters(placement: str, layers: int, hidden: int, reduction_factor: int) -> int:
    """Return the number of parameters of all adapters in a model of this many layers.

    Raises:
        RecipeError: there is no such placement.
    """
    need_placement(placement)
    return ADAPTERS_PER_LAYER[placement] * layers * parameters(hidden, reduction_factor)
