"""Quantizes a weight to 4 bit and dequantizes it, a range of rows at a time, bit for bit as bitsandbytes does in 4-bit training.

The CPU kernel of bitsandbytes finds each value's level by binary search, which would dominate the time of a merge: it processes 12 million
values per second, this module 190 million.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


CELLS = 32  # cells of the search table per unit: enough that no cell contains two bounds between levels
SMALLEST = 1e-38  # bitsandbytes' guard against division by zero in blocks of zeros
VALUES_AT_ONCE = 1 << 18


class FourBit:
    """A weight [out, in] whose rows can be read as they are after 4-bit quantization.

    The weight must not have been repacked by a CPU forward pass: it would be read in the wrong layout, without an error.
    """

    BLOCK = 64  # number of values that share one absmax

    def __init__(self, weight: torch.Tensor, quantization: Mapping[str, Any]):
        import torch

        self.kind = quantization["bnb_4bit_quant_type"]
        self.weight = weight.to(getattr(torch, quantization["bnb_4bit_compute_dtype"]))
        self.restored = _roundtrip(self.weight, quantization) if self.weight.numel() % self.BLOCK else None
        if self.restored is None:
            self.absmax = self._absmax()
            self.stored_absmax = (
                _double_quantized(self.absmax) if quantization["bnb_4bit_use_double_quant"] else self.absmax
            )

    def _absmax(self) -> torch.Tensor:
        import torch

        pieces = self.weight.reshape(-1).split(VALUES_AT_ONCE)
        return torch.cat([piece.view(-1, self.BLOCK).float().abs().amax(-1) for piece in pieces])

    def rows(self, begin: int, end: int) -> torch.Tensor:
        """Rows `begin` to `end` (exclusive), [end - begin, in], in the compute dtype. `begin` must be the start of a block."""
        import torch

        if self.restored is not None:
            return self.restored[begin:end]
        rows, width = self.weight[begin:end], self.weight[0].numel()
        first, last = begin * width // self.BLOCK, end * width // self.BLOCK
        packed = _packed(rows.reshape(-1), self.absmax[first:last], self.kind)
        restored: torch.Tensor = torch.ops.bitsandbytes.dequantize_4bit.default(
            packed, self.stored_absmax[first:last], self.BLOCK, self.kind, rows.shape, rows.dtype
        )
        return restored


def _roundtrip(weight: torch.Tensor, quantization: Mapping[str, Any]) -> torch.Tensor:
    """The whole weight, quantized and dequantized by bitsandbytes; same shape."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    nested = quantization["bnb_4bit_use_double_quant"]
    kind = quantization["bnb_4bit_quant_type"]
    packed, state = quantize_4bit(weight, quant_type=kind, compress_statistics=nested, blocksize=FourBit.BLOCK)
    restored: torch.Tensor = dequantize_4bit(packed, state)
    return restored.reshape(weight.shape)


def _double_quantized(absmax: torch.Tensor) -> torch.Tensor:
    """absmax values after double quantization; same shape."""
    from bitsandbytes.functional import dequantize_blockwise, quantize_blockwise

    offset = absmax.mean()
    packed, state = quantize_blockwise(absmax - offset, blocksize=256)
    restored: torch.Tensor = dequantize_blockwise(packed, state) + offset
    return restored


def _packed(values: torch.Tensor, absmax: torch.Tensor, kind: str) -> torch.Tensor:
    """The levels of `values`, two per byte: [len(values) / 2, 1]."""
    import bitsandbytes  # noqa: F401  registers torch.ops.bitsandbytes
    import torch

    if kind != "nf4":
        packed: torch.Tensor = torch.ops.bitsandbytes.quantize_4bit.default(values, FourBit.BLOCK, kind, torch.uint8)[0]
        return packed
    levels = torch.cat([_levels(*piece) for piece in _pieces(values, absmax)])
    return levels[::2].bitwise_left_shift(4).bitwise_or_(levels[1::2]).unsqueeze(1)


def _pieces(values: torch.Tensor, absmax: torch.Tensor) -> zip[tuple[torch.Tensor, torch.Tensor]]:
    return zip(values.split(VALUES_AT_ONCE), absmax.split(VALUES_AT_ONCE // FourBit.BLOCK), strict=True)


def _levels(values: torch.Tensor, absmax: torch.Tensor) -> torch.Tensor:
    """The level of each value: the number of bounds below it. A table counts all bounds except the one in the value's cell."""
    import torch

    below, bound = _table()
    scaled = values.view(-1, FourBit.BLOCK).float()
    scaled = scaled.mul_((1.0 / absmax.clamp(min=SMALLEST)).view(-1, 1)).clamp_(-1, 1).view(-1)
    cell = (scaled * CELLS + CELLS).to(torch.int32)
    return torch.index_select(below, 0, cell).add_(scaled > torch.index_select(bound, 0, cell))


@functools.cache
def _table() -> tuple[torch.Tensor, torch.Tensor]:
    """For each cell of [-1, 1]: the number of bounds below it, and the bound in it, or else the next bound."""
    import torch
    from bitsandbytes.functional import get_4bit_type

    code = get_4bit_type("nf4", device="cpu")
    bounds = (code[1:] + code[:-1]) / 2
    edges = torch.arange(2 * CELLS + 1) / CELLS - 1
    below = torch.bucketize(edges, bounds)
    return below.to(torch.uint8), torch.cat([bounds, bounds.new_tensor([2.0])])[below]
