"""A model in 16 bits computed in fp32: its blocks are turned to fp32 one at a time, as they run.

What a model's numbers mean exactly is what they give without the rounding of a 16-bit computation. All of a 7B in fp32 would take 28 GB;
this way the weights stay as they are, but for embedding, final norm and head, and one block at a time is held twice.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from qkit.recipe.schema import Recipe


def with_any_dtype(how: Recipe) -> Recipe:
    """The recipe with an attention that takes fp32: kernels of flash attention compute in 16 bits only."""
    if not how.model.attn_implementation.startswith("flash"):
        return how
    section = how.model.model_copy(update={"attn_implementation": "sdpa"})
    return how.model_copy(update={"model": section})


def compute_in_float32(model: PreTrainedModel) -> None:
    """Make every later forward of `model` compute in fp32, from its weights as they are now. For inference only: the weights move."""
    blocks = list(blocks_of(model))
    inside = {id(tensor) for block in blocks for tensor in _tensors(block)}
    for tensor in _tensors(model):
        if id(tensor) not in inside:
            tensor.data = tensor.data.float()
    for block in blocks:
        waiting = _Waiting(block)
        block.register_forward_pre_hook(waiting.widen, with_kwargs=True)
        block.register_forward_hook(waiting.narrow, always_call=True)


def blocks_of(model: PreTrainedModel) -> Iterator[torch.nn.Module]:
    """The layers of the decoder, whatever it calls them: its longest list of modules that is in no other. None where it keeps no such list."""
    import torch

    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
    lists = {n: m for n, m in base.get_decoder().named_modules() if isinstance(m, torch.nn.ModuleList)}
    outermost = [m for name, m in lists.items() if not any(name.startswith(f"{other}.") for other in lists)]
    yield from max(outermost, key=len, default=())


def _tensors(module: torch.nn.Module) -> Iterator[torch.Tensor]:
    """Parameters and buffers that hold 16-bit numbers."""
    import torch

    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.dtype in (torch.bfloat16, torch.float16):
            yield tensor


class _Waiting:
    """The 16-bit numbers of a block while it runs in fp32."""

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
