"""Figures that others have published for models of known shape, to hold a plan against."""

from __future__ import annotations

from dataclasses import dataclass

from qkit.core.device import Device
from qkit.model.config import shape_of
from qkit.model.shape import Shape
from qkit.plan import stage_memory
from qkit.plan.remedies import Remedy, apply
from qkit.plan.solve import with_length
from qkit.recipe.schema import Recipe

# --- beside the figures of others -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Anchor:
    """A published line for Llama-3.1-8B at rank 32 and batch 1 beside ours: bytes at the recipe's length, and why they differ."""

    name: str
    fixed_bytes: int
    bytes_per_token: int
    peak_bytes: int
    ours_bytes: int
    why: str


def anchors(recipe: Recipe, device: Device) -> tuple[Anchor, ...]:
    """Published lines for shapes like Llama-3.1-8B's, at this recipe's tokens; ours is the same adapter, batch 1, checkpointed."""
    shape = shape_of(recipe.model)
    if (
        (shape.layers, shape.hidden, shape.intermediate) != (32, 4096, 14336)
        or shape.vocabulary < 10**5
        or shape.sparse
    ):
        return ()
    length = recipe.data.max_length
    same = ("lora.r=32", f"data.batch_tokens={length}", "train.gradient_checkpointing=true", "micro_batches=1")
    items = stage_memory.train_items(apply(recipe, (Remedy(same, 0, ""),)), shape, device, None)
    ours, slope = sum(item.bytes for item in items), _slope(recipe, same, shape, device)
    logits, kept, mlp = 16 * shape.vocabulary, 2 * shape.layers * shape.hidden, 6 * shape.intermediate
    offsets = (
        f"it holds {logits:,} bytes of logits per token (16 x vocabulary) beside {kept:,} of layers' inputs and {mlp:,} of the MLP; "
        f"here the loss is made in tiles, which leaves {slope:,} per token"
    )
    smart = (
        f"its line per token is below the layers' inputs alone ({kept:,}), so these are on the host: "
        "train.activation_offloading=true does that here"
    )
    lines = (
        ("transformers + flash attention", 9_697_000_000, 2_470_800, offsets),
        ("Unsloth", 7_370_000_000, 211_900, smart),
    )
    return tuple(
        Anchor(name, fixed, per, fixed + per * length, ours, _why(why, fixed + per * length, ours))
        for name, fixed, per, why in lines
    )


def _slope(recipe: Recipe, same: tuple[str, ...], shape: Shape, device: Device) -> int:
    """Bytes per token between 4,096 and 8,192, where the tile of logits has its full size."""
    first, second = (
        sum(
            i.bytes
            for i in stage_memory.train_items(
                apply(recipe, (Remedy((*same, *with_length(recipe, n)), 0, ""),)), shape, device, None
            )
        )
        for n in (4096, 8192)
    )
    return (second - first) // 4096


def _why(why: str, theirs: int, ours: int) -> str:
    """A difference of a tenth or less needs no reason."""
    return why if abs(ours / theirs - 1) > 0.1 else ""
