"""Bytes of what an optimizer keeps: of each tensor, by its shape. The plan's line, and a part of each checkpoint."""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qkit.recipe import optimizers
from qkit.recipe.optimizers import OPTIMIZERS, UNKNOWN, Optimizer

if TYPE_CHECKING:
    from qkit.recipe.training import Train

FP32 = 4
SMALLEST_8BIT = 4096  # bitsandbytes, torchao: a smaller tensor stays in fp32
BLOCK = 256  # values that share one fp32 absmax: bitsandbytes' own, and what transformers asks of torchao
MAP_BYTES = (
    256 * FP32
)  # the 256 values of 8 bits: bitsandbytes has one for each kind of moment, torchao one for each moment
MAP_4BIT_BYTES = 16 * FP32


@dataclass(frozen=True)
class Tensor:
    """A tensor that is trained. `embedding`: a whole table, which transformers keeps out of bitsandbytes' 8 bits."""

    shape: tuple[int, ...]
    embedding: bool = False

    @functools.cached_property
    def count(self) -> int:
        """Its parameters."""
        return math.prod(self.shape)


Kinds = tuple[tuple[Tensor, int], ...]  # tensors, and how many of each there are


def tensors_of(model: Any) -> tuple[Tensor, ...]:
    """The trained tensors of a model."""
    from torch import nn

    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    return tuple(Tensor(tuple(p.shape), id(p) in tables) for p in model.parameters() if p.requires_grad)


def state_bytes(train: Train, tensors: Iterable[Tensor]) -> int:
    """Bytes of the optimizer's state after its first step. An optimizer of a later transformers counts as Adam."""
    return state_bytes_of(train, tuple(Counter(tensors).items()))


def state_bytes_of(train: Train, kinds: Kinds) -> int:
    """The same, of kinds of tensors: a plan asks for thousands of adapters."""
    return _state_bytes(train.optim, optimizers.moments(train), kinds)


@functools.lru_cache(maxsize=1024)
def _state_bytes(name: str, moments: int, kinds: Kinds) -> int:
    optimizer = OPTIMIZERS.get(name, UNKNOWN)
    each = sum(times * (_tensor_bytes(optimizer, moments, tensor) + optimizer.step_bytes) for tensor, times in kinds)
    coded = any(is_coded(optimizer, tensor) for tensor, _ in kinds)
    shared = min(moments, 2) * MAP_BYTES if coded and optimizer.layout == "blocks" else 0
    return each + shared


def is_coded(optimizer: Optimizer, tensor: Tensor) -> bool:
    """Whether the moments of a tensor have fewer than 32 bits."""
    if optimizer.layout == "blocks":
        return tensor.count >= SMALLEST_8BIT and not tensor.embedding
    return optimizer.layout.startswith("torchao") and tensor.count >= SMALLEST_8BIT and tensor.count % BLOCK == 0


def _tensor_bytes(optimizer: Optimizer, moments: int, tensor: Tensor) -> int:
    """Bytes of the moments of a tensor."""
    count = tensor.count
    if optimizer.layout == "factored":
        *rows, last = tensor.shape
        halves = math.prod(rows) + math.prod(rows[:-1]) * last if rows else count
        return FP32 * halves + FP32  # and the root mean square of the weights
    if not is_coded(optimizer, tensor):
        return moments * FP32 * count
    if optimizer.layout == "torchao-4bit":
        return moments * (count // 2 + FP32 * (count // BLOCK) + MAP_4BIT_BYTES)
    codes = moments * (count + FP32 * -(-count // BLOCK))
    return codes + (moments * MAP_BYTES if optimizer.layout == "torchao-8bit" else 0)


def formula(train: Train, trained: int) -> str:
    """How many bytes the state of so many parameters takes, in words."""
    optimizer, moments = OPTIMIZERS.get(train.optim, UNKNOWN), optimizers.moments(train)
    if optimizer.layout == "factored":
        return f"{train.optim}: 4 bytes for each row and each column of a matrix, {trained:,} parameters together"
    width = {
        "blocks": f"1 byte + 4 for each {BLOCK}",
        "torchao-8bit": f"1 byte + 4 for each {BLOCK}",
        "torchao-4bit": f"1/2 byte + 4 for each {BLOCK}",
    }.get(optimizer.layout, "4 bytes")
    paged = "; in managed memory, which CUDA may move to the host" if train.optim.startswith("paged_") else ""
    return f"{train.optim}: {trained:,} parameters x {moments} moments x {width}{paged}"
