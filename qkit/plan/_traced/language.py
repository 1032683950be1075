"""A step of a language model on tensors without data: its batch, and its loss on labelled positions only."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qkit.model.load import scaled

if TYPE_CHECKING:
    from qkit.recipe.schema import Recipe


def batch(recipe: Recipe, rows: int, length: int) -> dict[str, Any]:
    """Ids, labels and positions [rows, length]; of a pack also the mask that keeps its documents apart [1, 1, length, length]."""
    import torch

    tensors = {name: torch.ones(rows, length, dtype=torch.long) for name in ("input_ids", "labels", "position_ids")}
    if recipe.data.packing and not recipe.model.attn_implementation.startswith("flash"):
        tensors["mask"] = torch.ones(1, 1, length, length, dtype=torch.bool)
    return tensors


def loss(model: Any, tensors: dict[str, Any], labelled: int, tiles: bool) -> Any:
    """The sum of the losses, as the trainer computes it. `labelled`: positions of each row; `tiles`: the head is computed in tiles.

    With `tiles` a single logit of each position is computed: the gradient of the whole head is there, and the tile is counted by arithmetic.
    """
    import torch

    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    read = {"input_ids": tensors["input_ids"], "position_ids": tensors["position_ids"][:1], "use_cache": False}
    hidden = base.get_decoder()(**read, attention_mask=tensors.get("mask")).last_hidden_state
    places = torch.zeros(labelled * len(hidden), dtype=torch.long)
    chosen, head = hidden.flatten(0, 1)[places], base.get_output_embeddings()
    if tiles:
        return torch.nn.functional.linear(chosen, head.weight[:1]).float().sum()
    logits = scaled(base, head(chosen).float())
    return torch.nn.functional.cross_entropy(logits, places, reduction="none").sum()
