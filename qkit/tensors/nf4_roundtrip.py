"""A weight as 4-bit training sees it: quantized and dequantized again, some rows at a time, bit for bit as bitsandbytes does it.

Its own CPU kernel finds each value's level by a binary search, which takes most of a merge: 12 million values a second, where this takes 190.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


CELLS = 32  # of the search table for each unit: none holds two bounds between levels
SMALLEST = 1e-38  # bitsandbytes' guard against blocks of zeros
AT_ONCE = 1 << 18


class FourBit:
    """A weight of which rows can be had as they are after quantization; on a fresh tensor.

    One that a CPU forward has repacked would be read in the wrong layout, without an error.
    """

    BLOCK = 64  # values that share one absmax

    def __init__(self, weight: torch.Tensor, quantization: Mapping[str, Any]):
        import torch

        self.kind = quantization["bnb_4bit_quant_type"]
        self.weight = weight.to(getattr(torch, quantization["bnb_4bit_compute_dtype"]))
        self.whole = _roundtrip(self.weight, quantization) if self.weight.numel() % self.BLOCK else None
        if self.whole is None:
            self.largest = self._largest()
            self.kept = _twice(self.largest) if quantization["bnb_4bit_use_double_quant"] else self.largest

    def _largest(self) -> torch.Tensor:
        import torch

        pieces = self.weight.reshape(-1).split(AT_ONCE)
        return torch.cat([piece.view(-1, self.BLOCK).float().abs().amax(-1) for piece in pieces])

    def rows(self, begin: int, end: int) -> torch.Tensor:
        """Rows `begin` to `end` in the compute dtype; where the width is no multiple of BLOCK, `begin` must begin a block."""
        import torch

        if self.whole is not None:
            return self.whole[begin:end]
        rows, width = self.weight[begin:end], self.weight[0].numel()
        first, last = begin * width // self.BLOCK, end * width // self.BLOCK
        packed = _packed(rows.reshape(-1), self.largest[first:last], self.kind)
        restored: torch.Tensor = torch.ops.bitsandbytes.dequantize_4bit.default(
            packed, self.kept[first:last], self.BLOCK, self.kind, rows.shape, rows.dtype
        )
        return restored


def _roundtrip(weight: torch.Tensor, quantization: Mapping[str, Any]) -> torch.Tensor:
    """The whole weight by way of bitsandbytes' own calls."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    nested = quantization["bnb_4bit_use_double_quant"]
    kind = quantization["bnb_4bit_quant_type"]
    packed, state = quantize_4bit(weight, quant_type=kind, compress_statistics=nested, blocksize=FourBit.BLOCK)
    restored: torch.Tensor = dequantize_4bit(packed, state)
    return restored.reshape(weight.shape)


def _twice(largest: torch.Tensor) -> torch.Tensor:
    """absmax values after double quantization."""
    from bitsandbytes.functional import dequantize_blockwise, quantize_blockwise

    offset = largest.mean()
    packed, state = quantize_blockwise(largest - offset, blocksize=256)
    restored: torch.Tensor = dequantize_blockwise(packed, state) + offset
    return restored


def _packed(values: torch.Tensor, largest: torch.Tensor, kind: str) -> torch.Tensor:
    """Two levels to a byte."""
    import bitsandbytes  # noqa: F401  registers torch.ops.bitsandbytes
    import torch

    if kind != "nf4":
        packed: torch.Tensor = torch.ops.bitsandbytes.quantize_4bit.default(values, FourBit.BLOCK, kind, torch.uint8)[0]
        return packed
    levels = torch.cat([_levels(*piece) for piece in _pieces(values, largest)])
    return levels[::2].bitwise_left_shift(4).bitwise_or_(levels[1::2]).unsqueeze(1)


def _pieces(values: torch.Tensor, largest: torch.Tensor) -> zip[tuple[torch.Tensor, torch.Tensor]]:
    return zip(values.split(AT_ONCE), largest.split(AT_ONCE // FourBit.BLOCK), strict=True)


def _levels(values: torch.Tensor, largest: torch.Tensor) -> torch.Tensor:
    """The level of each value: how many bounds are below it. A table tells for all bounds but the one in the value's own cell."""
    import torch

    below, bound = _table()
    scaled = values.view(-1, FourBit.BLOCK).float()
    scaled = scaled.mul_((1.0 / largest.clamp(min=SMALLEST)).view(-1, 1)).clamp_(-1, 1).view(-1)
    cell = (scaled * CELLS + CELLS).to(torch.int32)
    return torch.index_select(below, 0, cell).add_(scaled > torch.index_select(bound, 0, cell))


@functools.cache
def _table() -> tuple[torch.Tensor, torch.Tensor]:
    """For each cell of [-1, 1] the number of bounds below it, and the bound in it or the next one."""
    import torch
    from bitsandbytes.functional import get_4bit_type

    code = get_4bit_type("nf4", device="cpu")
    bounds = (code[1:] + code[:-1]) / 2
    edges = torch.arange(2 * CELLS + 1) / CELLS - 1
    below = torch.bucketize(edges, bounds)
    return below.to(torch.uint8), torch.cat([bounds, bounds.new_tensor([2.0])])[below]
