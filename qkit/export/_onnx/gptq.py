"""Rounds a matrix to few bits. Works on tensors only: no model, no files.

Each row of a matrix [outputs, inputs] is divided into blocks, and each block has a scale and a zero point:
weight = (code - zero) * scale, where code and zero are unsigned integers of `bits` bits.

`nearest` takes the nearest code. `gptq` minimizes the change of the products with real inputs: it rounds one column after the other, and
adjusts the remaining columns to compensate for the error, given how the inputs correlate. On the 135M model of the quickstart, that lowers
the divergence of a 4-bit model by a factor of about six.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


# Factors of a block's range: a finer grid, which clips the extremes
RANGE_FACTORS = tuple(1 - 0.05 * step for step in range(9))
DAMPING = 0.01  # of the mean diagonal: keeps the inverse stable where inputs are few or correlated
COLUMNS = 64  # rounded before their errors are propagated to all later columns at once
ELEMENTS = 2**22  # that the search for scales works on at once; it holds about ten copies of them


@dataclass(frozen=True)
class Grid:
    """`scales` and `zeros`, [outputs, blocks] each, for codes of `bits` bits; a block has `block` inputs."""

    scales: Tensor
    zeros: Tensor
    bits: int
    block: int

    @property
    def top(self) -> int:
        """The largest code."""
        return int(2**self.bits - 1)

    def spread(self, inputs: int) -> tuple[Tensor, Tensor]:
        """Return the scale and the zero point of each weight, [outputs, inputs]."""
        scales, zeros = (part.repeat_interleave(self.block, 1)[:, :inputs] for part in (self.scales, self.zeros))
        return scales, zeros


@dataclass(frozen=True)
class Rounded:
    """A matrix as codes [outputs, inputs] on a grid."""

    codes: Tensor
    grid: Grid

    def weight(self) -> Tensor:
        """Return the dequantized matrix, in fp32."""
        scales, zeros = self.grid.spread(self.codes.shape[1])
        return (self.codes - zeros) * scales


def nearest(weight: Tensor, bits: int, block: int) -> Rounded:
    """Round each weight to the nearest code."""
    import torch

    grid = fit_grid(weight, bits, block)
    codes = []
    for part, scales, zeros in zip(*(_parts(weight, of) for of in (weight, grid.scales, grid.zeros)), strict=True):
        scale, zero = Grid(scales, zeros, bits, block).spread(weight.shape[1])
        codes.append((part / scale + zero).round().clamp(0, grid.top).to(torch.uint8))
    return Rounded(torch.cat(codes), grid)


def fit_grid(weight: Tensor, bits: int, block: int, importance: Tensor | None = None) -> Grid:
    """Return the scales and zero points with the least squared error, each column weighted by its `importance` [inputs]."""
    import torch

    inputs = weight.shape[1]
    blocks = -(-inputs // block)
    padding = (0, blocks * block - inputs)
    weights = torch.ones(inputs) if importance is None else importance
    weights = torch.nn.functional.pad(weights, padding).view(blocks, block)
    fitted = []
    for part in _parts(weight, weight):
        cut = torch.nn.functional.pad(part.float(), padding).view(len(part), blocks, block)
        fitted.append(_search(cut, weights, bits))
    scales, zeros = (torch.cat(parts) for parts in zip(*fitted, strict=True))
    return Grid(scales, zeros, bits, block)


def _parts(weight: Tensor, of: Tensor) -> tuple[Tensor, ...]:
    """Split the rows of `of` into parts that hold ELEMENTS weights each."""
    parts: tuple[Tensor, ...] = of.split(max(ELEMENTS // weight.shape[1], 1))
    return parts


def _search(cut: Tensor, importance: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Return the best of several grids for each block of `cut` [outputs, blocks, block]."""
    import torch

    top = 2**bits - 1
    high, low = cut.amax(-1).clamp(min=0), cut.amin(-1).clamp(max=0)
    best = torch.full_like(high, torch.inf)
    scales, zeros = torch.ones_like(high), torch.zeros_like(high)
    for factor in RANGE_FACTORS if bits < 8 else RANGE_FACTORS[:1]:
        scale = ((high - low) * (factor / top)).clamp(min=1e-8)
        zero = (-low * factor / scale).round().clamp(0, top)
        scale = _refitted(cut, importance, scale, zero, top)
        difference = _steps(cut, scale, zero, top).mul_(scale[..., None]).sub_(cut)
        error = (difference.square_() * importance).sum(-1)
        better = error < best
        best = torch.where(better, error, best)
        scales, zeros = torch.where(better, scale, scales), torch.where(better, zero, zeros)
    return scales, zeros


def _steps(cut: Tensor, scale: Tensor, zero: Tensor, top: int) -> Tensor:
    """Return how many steps each weight is from zero, rounded."""
    rounded: Tensor = (cut / scale[..., None] + zero[..., None]).round_().clamp_(0, top).sub_(zero[..., None])
    return rounded


def _refitted(cut: Tensor, importance: Tensor, scale: Tensor, zero: Tensor, top: int) -> Tensor:
    """Return the scale with the least squared error for the codes that `scale` gives."""
    import torch

    steps = _steps(cut, scale, zero, top)
    fitted = (steps * cut * importance).sum(-1) / (steps.square() * importance).sum(-1).clamp(min=1e-20)
    return torch.where(fitted > 1e-8, fitted, scale)


def gptq(weight: Tensor, gram: Tensor, bits: int, block: int) -> Rounded:
    """Round `weight` so that its products with inputs x change least; `gram` [inputs, inputs] is the sum of x x^T over them.

    Columns with large inputs come first, when the most columns are left to compensate for their error.
    """
    import torch

    grid = fit_grid(weight, bits, block, gram.diagonal())
    order = gram.diagonal().argsort(descending=True)
    factor = _inverse_factor(gram[order][:, order])
    scales, zeros = (part[:, order].t().contiguous() for part in grid.spread(weight.shape[1]))
    codes = _columns(weight[:, order].t().contiguous(), factor, scales, zeros, grid.top)
    return Rounded(codes[order.argsort()].t().contiguous().to(torch.uint8), grid)


def _inverse_factor(gram: Tensor) -> Tensor:
    """Return the upper Cholesky factor of the damped inverse: row i says how later columns compensate for an error in column i."""
    import torch

    damped = gram.clone()
    damped.diagonal().add_(DAMPING * damped.diagonal().mean() + 1e-12)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    factor: Tensor = torch.linalg.cholesky(inverse, upper=True)
    return factor


def _columns(rest: Tensor, factor: Tensor, scales: Tensor, zeros: Tensor, top: int) -> Tensor:
    """Return the codes [inputs, outputs] of the columns `rest` [inputs, outputs], which are overwritten."""
    import torch

    codes = torch.empty_like(rest)
    for begin in range(0, len(rest), COLUMNS):
        end = min(begin + COLUMNS, len(rest))
        errors = torch.empty_like(rest[begin:end])
        for i in range(begin, end):
            torch.clamp((rest[i] / scales[i]).add_(zeros[i]).round_(), 0, top, out=codes[i])
            errors[i - begin] = (rest[i] - (codes[i] - zeros[i]) * scales[i]) / factor[i, i]
            rest[i + 1 : end] -= factor[i, i + 1 : end, None] * errors[i - begin]
        rest[end:] -= factor[begin:end, end:].t() @ errors
    return codes
