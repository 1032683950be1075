"""Models of real shapes with random weights, made in seconds: for measurements where the weights' values do not matter.

The 4-bit ones are never drawn as floats: packed bytes, absmax and code tables are made directly, matrix by matrix, exactly as large as
bitsandbytes makes them. Which modules are 4-bit ones is left to transformers.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import torch

from qkit.core.device import Device
from qkit.model import load
from qkit.recipe.schema import Recipe

SPREAD = 0.02  # standard deviation of the weights, as most models start with
NF4_SPREAD = 0.6  # of the sixteen NF4 values, all equally likely
ABSMAX_BLOCK, NESTED_BLOCK = 64, 256


def write_config(config: dict[str, Any], folder: Path) -> Path:
    """config.json in `folder`: what the plan and the loader read."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def build(folder: Path, how: Recipe, device: Device) -> Any:
    """The model of `folder`/config.json as qkit.model.load_base would load it, with random weights."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.quantizers import AutoHfQuantizer

    config = AutoConfig.from_pretrained(folder)
    with init_empty_weights(include_buffers=False):
        made = AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16, attn_implementation=how.model.attn_implementation
        )
    place = "cuda:0" if device.kind == "cuda" else "cpu"
    if how.quantization.load_in_4bit:
        made.hf_quantizer = AutoHfQuantizer.from_config(load.quantization_config(how.quantization), pre_quantized=False)
        made.hf_quantizer.preprocess_model(model=made, device_map=None)
        _fill(made, place)
        made.hf_quantizer.postprocess_model(made)
    else:
        _fill(made, place)
    made.tie_weights()
    made.config.use_cache = False
    return made


def _fill(made: Any, device: str) -> None:
    """Put random tensors in the place of those on the meta device; what is real already moves along."""
    from bitsandbytes.nn import Linear4bit

    tied = set(made.all_tied_weights_keys)
    for name, module in made.named_modules():
        if isinstance(module, Linear4bit):
            _fill_4bit(module, device)
        for key, parameter in module.named_parameters(recurse=False):
            if parameter.is_meta and f"{name}.{key}" not in tied:
                setattr(module, key, _random(parameter, device))
        for key, buffer in module.named_buffers(recurse=False):
            setattr(module, key, buffer.to(device))


def _random(like: torch.Tensor, device: str) -> torch.nn.Parameter:
    """A frozen bf16 parameter: matrices at random, in place; vectors (norms, biases) of a fixed value that keeps the signal's size."""
    drawn = torch.full(like.shape, SPREAD if like.ndim > 1 else 1.0, dtype=torch.bfloat16, device=device)
    if like.ndim > 1:
        drawn.uniform_(-SPREAD * 3**0.5, SPREAD * 3**0.5)
    return torch.nn.Parameter(drawn, requires_grad=False)


def _fill_4bit(module: Any, device: str) -> None:
    from bitsandbytes.functional import QuantState, get_4bit_type
    from bitsandbytes.nn import Params4bit

    old = module.weight
    shape = torch.Size((module.out_features, module.in_features))
    blocks = shape.numel() // ABSMAX_BLOCK
    state = QuantState(
        absmax=torch.full((blocks,), SPREAD / NF4_SPREAD, device=device),
        shape=shape,
        dtype=torch.bfloat16,
        blocksize=ABSMAX_BLOCK,
        code=get_4bit_type(old.quant_type, device=device),
        quant_type=old.quant_type,
    )
    if old.compress_statistics:
        _nest(state)
    packed = torch.randint(0, 256, (shape.numel() // 2, 1), dtype=torch.uint8, device=device)
    module.weight = Params4bit(
        packed,
        quant_state=state,
        blocksize=ABSMAX_BLOCK,
        compress_statistics=old.compress_statistics,
        quant_type=old.quant_type,
        module=module,
        bnb_quantized=True,
    )
    module.quant_state = state


def _nest(state: Any) -> None:
    """Double quantization: 8 bits for each absmax, around their mean."""
    from bitsandbytes.functional import QuantState

    device, blocks = state.absmax.device, state.absmax.numel()
    state.offset = state.absmax.mean()
    state.state2 = QuantState(
        absmax=torch.full((-(-blocks // NESTED_BLOCK),), 0.1 * SPREAD, device=device),
        code=_dynamic_map(str(device)),
        blocksize=NESTED_BLOCK,
        dtype=torch.float32,
    )
    state.absmax = torch.randint(0, 256, (blocks,), dtype=torch.uint8, device=device)
    state.nested = True


@functools.cache
def _dynamic_map(device: str) -> torch.Tensor:
    """The 256 values of an 8-bit absmax: one table for all matrices, as bitsandbytes keeps it."""
    from bitsandbytes.functional import create_dynamic_map

    table: torch.Tensor = create_dynamic_map().to(device)
    return table
