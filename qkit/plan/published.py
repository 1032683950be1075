"""Published memory figures of other software for Llama-3.1-8B, which `qkit plan` shows next to its own for models of that shape."""

from __future__ import annotations

from dataclasses import dataclass

from qkit.core.device import Device
from qkit.model.config import shape_of
from qkit.model.shape import Shape
from qkit.plan import stage_memory
from qkit.plan.remedies import Remedy, apply
from qkit.plan.solve import with_length
from qkit.recipe.schema import Recipe


@dataclass(frozen=True)
class Anchor:
    """A published figure for rank 32 and batch 1 as fixed bytes and bytes per token, its peak at the recipe's length, our peak for the same
    settings, and why the two differ (empty: by at most a tenth)."""

    name: str
    fixed_bytes: int
    bytes_per_token: int
    peak_bytes: int
    ours_bytes: int
    why: str


def anchors(recipe: Recipe, device: Device) -> tuple[Anchor, ...]:
    """Published figures at the recipe's length, if the model has the shape of Llama-3.1-8B; else nothing.

    Ours are for the same rank, batch 1, with gradient checkpointing.
    """
    shape = shape_of(recipe.model)
    if (
        (shape.layers, shape.hidden, shape.intermediate) != (32, 4096, 14336)
        or shape.vocabulary < 10**5
        or shape.sparse
    ):
        return ()
    length = recipe.data.max_length
    settings = ("lora.r=32", f"data.batch_tokens={length}", "train.gradient_checkpointing=true", "micro_batches=1")
    items = stage_memory.train_items(apply(recipe, (Remedy(settings, 0, ""),)), shape, device, None)
    ours, slope = sum(item.bytes for item in items), _bytes_per_token(recipe, settings, shape, device)
    logits, kept, mlp = 16 * shape.vocabulary, 2 * shape.layers * shape.hidden, 6 * shape.intermediate
    keeps_logits = (
        f"it keeps {logits:,} bytes of logits per token (16 x vocabulary), {kept:,} of layers' inputs and {mlp:,} of the MLP; "
        f"qkit computes the loss in tiles, which leaves {slope:,} bytes per token"
    )
    offloads = (
        f"its bytes per token are below the layers' inputs alone ({kept:,}), so it must keep these on the host: "
        "in qkit, train.activation_offloading=true does that"
    )
    figures = (
        ("transformers + flash attention", 9_697_000_000, 2_470_800, keeps_logits),
        ("Unsloth", 7_370_000_000, 211_900, offloads),
    )
    return tuple(
        Anchor(name, fixed, per, fixed + per * length, ours, _why(why, fixed + per * length, ours))
        for name, fixed, per, why in figures
    )


def _bytes_per_token(recipe: Recipe, settings: tuple[str, ...], shape: Shape, device: Device) -> int:
    """Our bytes per token, between 4,096 and 8,192 tokens, where the tile of logits has its full size."""
    first, second = (
        sum(
            i.bytes
            for i in stage_memory.train_items(
                apply(recipe, (Remedy((*settings, *with_length(recipe, n)), 0, ""),)), shape, device, None
            )
        )
        for n in (4096, 8192)
    )
    return (second - first) // 4096


def _why(why: str, theirs: int, ours: int) -> str:
    """The reason, if the figures differ by more than a tenth."""
    return why if abs(ours / theirs - 1) > 0.1 else ""
