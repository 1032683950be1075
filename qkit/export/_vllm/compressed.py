"""Writes quantized weights in the compressed-tensors format, rounded to nearest; only one tensor at a time is in memory."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qkit.core.errors import MissingExtra, ModelError
from qkit.model import config as model_config
from qkit.model import shape
from qkit.tensors.shard_writer import model_specs, write_model
from qkit.tensors.shards import Spec, read

if TYPE_CHECKING:
    import torch


GROUPS = (128, 64, 32)  # inputs that share a scale; the best supported size first
NOT_QUANTIZED = ["lm_head"]
# Matrices of the layers, without embeddings, head and routers
QUANTIZED = re.compile(r"\.layers\.\d+\..*_proj\.weight$")
EMBEDDING = re.compile(r"(^|\.)(embed_tokens|embed_in|wte|wpe)$")  # these are not linear modules
PER_INT32 = 8  # 4-bit weights in an int32


INT8_WEIGHTS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}
INT8_INPUTS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
INT4_WEIGHTS = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "dynamic": False}
FP8 = {"num_bits": 8, "type": "float", "symmetric": True}


# The description of each variant for compressed-tensors; 8-bit activations get a scale for each token at run time.
SCHEMES: Mapping[str, Mapping[str, Any]] = {
    "w8a8": {"weights": INT8_WEIGHTS, "input_activations": INT8_INPUTS},
    "w4a16": {"weights": INT4_WEIGHTS},
    "fp8": {
        "weights": {**FP8, "strategy": "channel", "dynamic": False},
        "input_activations": {**FP8, "strategy": "token", "dynamic": True},
    },
}
FORMATS = {"w8a8": "int-quantized", "w4a16": "pack-quantized", "fp8": "float-quantized"}


def scheme(variant: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of compressed-tensors' QuantizationScheme, with a group size that suits the model.

    Raises:
        ModelError: no group size divides the widths of its matrices.
    """
    arguments = {"targets": ["Linear"], **SCHEMES[variant]}
    if variant == "w4a16":
        arguments["weights"] = {**INT4_WEIGHTS, "group_size": group_size(config)}
    return arguments


def group_size(config: Mapping[str, Any]) -> int:
    """Return the largest of GROUPS that divides the input width of every matrix.

    Raises:
        ModelError: none does.
    """
    widths = {linear.inputs for linear in shape.modules(model_config.from_config(config, "the model"))}
    group = next((size for size in GROUPS if not any(width % size for width in widths)), None)
    if group is None:
        raise ModelError(
            f"w4a16: the matrices have {', '.join(map(str, sorted(widths)))} inputs, which cannot be divided into groups of "
            f"{', '.join(map(str, GROUPS))}; use w8a8"
        )
    return group


def left_in_16_bit(merged: Path) -> list[str]:
    """Return the names of the linear modules that are not quantized, for loaders; always with the head, even if it is tied.

    Raises:
        ModelError: none of the matrices would be quantized, because the model uses other names.
    """
    matrices = [
        name for name, spec in model_specs(merged).items() if name.endswith(".weight") and len(spec["shape"]) == 2
    ]
    if not any(map(QUANTIZED.search, matrices)):
        raise ModelError(
            f"{merged}: only matrices named `layers.N. ... _proj` are quantized, and the model has none; use vllm (16 bits)",
            source=merged,
        )
    rest = [name.removesuffix(".weight") for name in matrices if not QUANTIZED.search(name)]
    return [*NOT_QUANTIZED, *(name for name in rest if name not in NOT_QUANTIZED and not EMBEDDING.search(name))]


def quantization_config(variant: str, config: Mapping[str, Any], ignored: Sequence[str]) -> dict[str, Any]:
    """Return the quantization_config for config.json. `ignored`: names of the linear modules that are not quantized."""
    packing = FORMATS[variant]
    return {
        "quant_method": "compressed-tensors",
        "format": packing,
        "quantization_status": "compressed",
        "config_groups": {"group_0": {**scheme(variant, config), "format": packing}},
        "ignore": list(ignored),
    }


def write_nearest(merged: Path, out: Path, variant: str, config: Mapping[str, Any], limit_bytes: int) -> None:
    """Write the weights into `out`, with each matrix rounded to nearest.

    Raises:
        MissingExtra: compressed-tensors is not installed.
    """
    try:
        from compressed_tensors.compressors import BaseCompressor
        from compressed_tensors.quantization import QuantizationScheme
    except ImportError:
        raise MissingExtra(
            f"vllm-{variant} requires compressed-tensors: pip install 'qkit[train]'", package="compressed-tensors"
        ) from None
    quantization = QuantizationScheme(**scheme(variant, config))
    compressor = BaseCompressor.get_value_from_registry(FORMATS[variant])
    merged_specs = model_specs(merged)
    group = quantization.weights.group_size
    specs = {n: s for name, spec in merged_specs.items() for n, s in _specs(name, spec, variant, group)}
    weights = read(merged, list(merged_specs))
    tensors = (pair for name, weight in weights for pair in _packed(name, weight, compressor, quantization))
    write_model(out, specs, ((name, [tensor]) for name, tensor in tensors), limit_bytes)


def _specs(name: str, spec: Spec, variant: str, group: int | None) -> Iterator[tuple[str, Spec]]:
    """Yield the names and specs of the tensors that are written for one tensor, in that order."""
    if not QUANTIZED.search(name):
        yield name, spec
        return
    module, (rows, columns) = name.removesuffix(".weight"), spec["shape"]
    scales = {"dtype": spec["dtype"], "shape": [rows, columns // group if group else 1]}
    if variant == "w4a16":
        yield f"{module}.weight_packed", {"dtype": "I32", "shape": [rows, -(-columns // PER_INT32)]}
        yield f"{module}.weight_scale", scales
        yield f"{module}.weight_shape", {"dtype": "I64", "shape": [2]}
    else:
        yield name, {"dtype": "I8" if variant == "w8a8" else "F8_E4M3", "shape": [rows, columns]}
        yield f"{module}.weight_scale", scales


def _packed(name: str, weight: torch.Tensor, compressor: Any, quantization: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors that are written for one tensor, in the order of their names."""
    if not QUANTIZED.search(name):
        yield name, weight
        return
    from compressed_tensors.quantization.utils import calculate_qparams

    rows, columns = weight.shape
    groups = weight.float().reshape(rows, -1, quantization.weights.group_size or columns)
    scale, _ = calculate_qparams(groups.amin(-1), groups.amax(-1), quantization.weights)
    # As stored; the division is in 32 bits, since in 16 bits some codes would be off by one
    scale = scale.to(weight.dtype).float()
    packed = compressor.compress({"weight": weight.float(), "weight_scale": scale}, quantization)
    module = name.removesuffix(".weight")
    yield from ((f"{module}.{part}", packed[part]) for part in sorted(packed))
