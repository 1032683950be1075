"""Computes a 16-bit model in fp32: each block is converted to fp32 while it runs.

The result is what the weights give without the rounding of 16-bit arithmetic. All of a 7B model in fp32 would take 28 GB. Here only
embedding, final norm and head are kept in fp32, and one block at a time is held in both precisions.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from qkit.recipe.schema import Recipe


def with_float32_attention(recipe: Recipe) -> Recipe:
    """Return the recipe with an attention implementation that computes in fp32; flash attention takes 16-bit inputs only."""
    if not recipe.model.attn_implementation.startswith("flash"):
        return recipe
    section = recipe.model.model_copy(update={"attn_implementation": "sdpa"})
    return recipe.model_copy(update={"model": section})


def compute_in_float32(model: PreTrainedModel) -> None:
    """Make every later forward pass of `model` compute in fp32. For inference only: the forward replaces the weights while it runs."""
    blocks = list(blocks_of(model))
    in_blocks = {id(tensor) for block in blocks for tensor in _tensors(block)}
    for tensor in _tensors(model):
        if id(tensor) not in in_blocks:
            tensor.data = tensor.data.float()
    for block in blocks:
        converter = _BlockConverter(block)
        block.register_forward_pre_hook(converter.widen, with_kwargs=True)
        block.register_forward_hook(converter.narrow, always_call=True)


def blocks_of(model: PreTrainedModel) -> Iterator[torch.nn.Module]:
    """Yield the layers of the decoder: its longest ModuleList that is not inside another. Yields nothing if it has no such list."""
    import torch

    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
    lists = {n: m for n, m in base.get_decoder().named_modules() if isinstance(m, torch.nn.ModuleList)}
    outermost = [m for name, m in lists.items() if not any(name.startswith(f"{other}.") for other in lists)]
    yield from max(outermost, key=len, default=())


def _tensors(module: torch.nn.Module) -> Iterator[torch.Tensor]:
    """Yield the parameters and buffers in a 16-bit dtype."""
    import torch

    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.dtype in (torch.bfloat16, torch.float16):
            yield tensor


class _BlockConverter:
    """Forward hooks of one block: they keep its 16-bit tensors while it runs in fp32."""

    def __init__(self, block: torch.nn.Module):
        self.block = block
        self.narrowed: list[tuple[torch.Tensor, torch.Tensor]] = []

    def widen(self, *_: Any) -> None:
        self.narrowed = [(tensor, tensor.data) for tensor in _tensors(self.block)]
        for tensor, data in self.narrowed:
            tensor.data = data.float()

    def narrow(self, *_: Any) -> None:
        for tensor, data in self.narrowed:
            tensor.data = data
        self.narrowed = []
