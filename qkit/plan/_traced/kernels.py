"""What a device computes otherwise than torch's CPU path, for a trace: attention, dropout and norms on a GPU, and 4-bit layers.

A stand-in makes and keeps tensors of the same sizes as what it stands for; it computes nothing.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from qkit.plan.fixed_memory import BLOCK, NESTED_BLOCK
from qkit.recipe.schema import Quantization

LOG_SUM_STEP = 32  # the memory-efficient kernel pads its log-sums to a multiple of this


# --- GPU ----------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def of_a_gpu(autocast: bool) -> Iterator[None]:
    """Replace, inside, what CUDA computes otherwise than the CPU. As attributes of the module: a mode would not reach layers that the
    backward pass computes again."""
    import torch
    from torch.nn import functional

    replacements: dict[str, Any] = {
        "scaled_dot_product_attention": functools.partial(_attention, autocast),
        "dropout": _dropout,
    }
    if autocast:  # CUDA's autocast computes these in fp32
        replacements |= {name: _in_fp32(getattr(functional, name)) for name in ("layer_norm", "softmax")}
    before = {name: getattr(functional, name) for name in replacements}
    casts = torch.is_autocast_enabled("cuda")  # PEFT asks this whether to cast the inputs of adapters
    torch.set_autocast_enabled("cuda", autocast)
    try:
        vars(functional).update(replacements)
        yield
    finally:
        vars(functional).update(before)
        torch.set_autocast_enabled("cuda", casts)


def _in_fp32(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda read, *given, **named: function(read.float(), *given, **named)


def _dropout(input: Any, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:
    """CUDA's kernel keeps a mask of one byte a value; the CPU's keeps the factors."""
    import torch

    return torch.native_dropout(input, p, True)[0] if training and p else input


def _attention(
    autocast: bool, query: Any, key: Any, value: Any, attn_mask: Any = None, dropout_p: float = 0.0, **options: Any
) -> Any:
    """Attention in one kernel, with or without dropout: no scores are kept. A mask is made additive, and kept."""
    import torch

    if autocast:
        query, key, value = (tensor.to(torch.bfloat16) for tensor in (query, key, value))
    bias = None if attn_mask is None else attn_mask.to(query.dtype)
    if bias is attn_mask and bias is not None:
        bias = bias.clone()
    return _attention_class().apply(query, key, value, bias)


@functools.cache
def _attention_class() -> Any:
    import torch

    class Attention(torch.autograd.Function):
        @staticmethod
        def forward(context: Any, query: Any, key: Any, value: Any, bias: Any) -> Any:
            rows, heads, length, _ = query.shape
            out = query.new_empty(rows, heads, length, value.shape[-1])
            padded = -(-length // LOG_SUM_STEP) * LOG_SUM_STEP
            sums = query.new_empty(rows, heads, padded, dtype=torch.float32)
            context.save_for_backward(query, key, value, out, sums, *([] if bias is None else [bias]))
            return out

        @staticmethod
        def backward(context: Any, *gradients: Any) -> Any:
            query, key, value, *_ = context.saved_tensors
            return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), None

    return Attention


# --- 4 bit --------------------------------------------------------------------------------------------------------------


def quantize(model: Any, skipped: Sequence[str], section: Quantization) -> None:
    """Replace linear modules outside `skipped` by ones whose weight has the bytes of bitsandbytes' 4-bit weight."""
    import torch

    starts = tuple(f"{name}." for name in skipped)
    for name, module in list(model.named_modules()):
        if type(module) is torch.nn.Linear and not f"{name}.".startswith(starts):
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, _four_bit_class()(module, section))


@functools.cache
def _four_bit_class() -> Any:
    import torch

    class FourBitLinear(torch.nn.Linear):
        """A frozen linear module in 4 bits: `weight` is packed, and dequantized for each product."""

        def __init__(self, of: torch.nn.Linear, section: Quantization):
            torch.nn.Module.__init__(self)
            self.in_features, self.out_features, self.bias = of.in_features, of.out_features, of.bias
            self.dtype = getattr(torch, section.bnb_4bit_compute_dtype)
            self.kind = section.bnb_4bit_quant_type
            count = of.in_features * of.out_features
            blocks = -(-count // BLOCK)
            packed = torch.empty(-(-count // 2), 1, dtype=torch.uint8, device="meta")
            self.weight = torch.nn.Parameter(packed, requires_grad=False)
            absmax = torch.uint8 if section.bnb_4bit_use_double_quant else torch.float32
            self.register_buffer("absmax", torch.empty(blocks, dtype=absmax, device="meta"))
            self.register_buffer("code", torch.empty(16, device="meta"))
            if section.bnb_4bit_use_double_quant:
                self.register_buffer("outer", torch.empty(-(-blocks // NESTED_BLOCK), device="meta"))
                self.register_buffer("offset", torch.empty((), device="meta"))

        def forward(self, read: Any) -> Any:
            bias = None if self.bias is None else self.bias.to(self.dtype)
            return _product_class().apply(read.to(self.dtype), self, bias).to(read.dtype)

        def dequantized(self) -> Any:
            """The weight in the compute dtype: bitsandbytes' operator, which on fake tensors only makes the result."""
            import bitsandbytes  # noqa: F401  registers the operator

            scales = self.absmax.float() if self.absmax.dtype == torch.uint8 else self.absmax
            shape = (self.out_features, self.in_features)
            return torch.ops.bitsandbytes.dequantize_4bit(self.weight, scales, BLOCK, self.kind, shape, self.dtype)

    return FourBitLinear


@contextlib.contextmanager
def read_by_dora() -> Iterator[None]:
    """Let DoRA, inside, read these layers' weights, as it reads bitsandbytes' own: it measures their lengths."""
    from peft.tuners.lora import dora

    before = dora.dequantize_module_weight
    dora.dequantize_module_weight = lambda module: (
        module.dequantized() if isinstance(module, _four_bit_class()) else before(module)
    )
    try:
        yield
    finally:
        dora.dequantize_module_weight = before


@functools.cache
def _product_class() -> Any:
    import torch

    class Product(torch.autograd.Function):
        """The product with a frozen matrix keeps nothing: its backward pass dequantizes again."""

        @staticmethod
        def forward(context: Any, read: Any, layer: Any, bias: Any) -> Any:
            context.layer = layer
            return torch.nn.functional.linear(read, layer.dequantized(), bias)

        @staticmethod
        def backward(context: Any, *gradients: Any) -> Any:
            return gradients[0] @ context.layer.dequantized(), None, None

    return Product
