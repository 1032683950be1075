"""Quantized weights in the compressed-tensors format, rounded to the nearest value one tensor at a time: no data, no model in memory."""

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


GROUPS = (128, 64, 32)  # inputs that share a scale, the best supported first
IGNORED = ["lm_head"]
QUANTIZED = re.compile(
    r"\.layers\.\d+\..*_proj\.weight$"
)  # the layers' matrices; neither embeddings, head nor a router
EMBEDDING = re.compile(r"(^|\.)(embed_tokens|embed_in|wte|wpe)$")  # no linear modules
PER_INT32 = 8  # weights of 4 bit


INT8_WEIGHTS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}
INT8_INPUTS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
INT4_WEIGHTS = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "dynamic": False}
FP8 = {"num_bits": 8, "type": "float", "symmetric": True}


# How compressed-tensors describes each of ours: activations of 8 bit are scaled per token as they come.
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
    """What compressed-tensors' QuantizationScheme takes, with the group size that suits this model.

    Raises:
        ModelError: no group size divides the width of its matrices.
    """
    made = {"targets": ["Linear"], **SCHEMES[variant]}
    if variant == "w4a16":
        made["weights"] = {**INT4_WEIGHTS, "group_size": group_size(config)}
    return made


def group_size(config: Mapping[str, Any]) -> int:
    """The largest of GROUPS that divides the input width of every matrix.

    Raises:
        ModelError: none does.
    """
    widths = {linear.inputs for linear in shape.modules(model_config.from_config(config, "the model"))}
    found = next((size for size in GROUPS if not any(width % size for width in widths)), None)
    if found is None:
        raise ModelError(
            f"w4a16: its matrices have {', '.join(map(str, sorted(widths)))} inputs, which groups of "
            f"{', '.join(map(str, GROUPS))} do not divide; use w8a8"
        )
    return found


def left_in_16_bit(merged: Path) -> list[str]:
    """The linear modules that are not quantized, by name, for loaders to leave alone; the head always, though a tied one is in no file.

    Raises:
        ModelError: none of the model's matrices would be quantized, as it names them otherwise.
    """
    matrices = [
        name for name, spec in model_specs(merged).items() if name.endswith(".weight") and len(spec["shape"]) == 2
    ]
    if not any(map(QUANTIZED.search, matrices)):
        raise ModelError(
            f"{merged}: none of its matrices is named `layers.N. ... _proj`, which are those that are quantized; use vllm (16 bit)"
        )
    rest = [name.removesuffix(".weight") for name in matrices if not QUANTIZED.search(name)]
    return [*IGNORED, *(name for name in rest if name not in IGNORED and not EMBEDDING.search(name))]


def quantization_config(variant: str, config: Mapping[str, Any], ignored: Sequence[str]) -> dict[str, Any]:
    """What config.json says to the loaders. `ignored`: names of the linear modules that are as they were."""
    made = FORMATS[variant]
    return {
        "quant_method": "compressed-tensors",
        "format": made,
        "quantization_status": "compressed",
        "config_groups": {"group_0": {**scheme(variant, config), "format": made}},
        "ignore": list(ignored),
    }


def write_nearest(merged: Path, out: Path, variant: str, config: Mapping[str, Any], limit_bytes: int) -> None:
    """Write the weights into `out`, each matrix rounded to the nearest value of its scale.

    Raises:
        MissingExtra: compressed-tensors is not installed.
    """
    try:
        from compressed_tensors.compressors import BaseCompressor
        from compressed_tensors.quantization import QuantizationScheme
    except ImportError:
        raise MissingExtra(f"vllm-{variant} needs compressed-tensors: pip install 'qkit[train]'") from None
    made = QuantizationScheme(**scheme(variant, config))
    compressor = BaseCompressor.get_value_from_registry(FORMATS[variant])
    before = model_specs(merged)
    specs = {n: s for name, spec in before.items() for n, s in _specs(name, spec, variant, made.weights.group_size)}
    tensors = (pair for name, weight in read(merged, list(before)) for pair in _packed(name, weight, compressor, made))
    write_model(out, specs, ((name, [tensor]) for name, tensor in tensors), limit_bytes)


def _specs(name: str, spec: Spec, variant: str, group: int | None) -> Iterator[tuple[str, Spec]]:
    """What becomes of one tensor, in the order in which it is written."""
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


def _packed(name: str, weight: torch.Tensor, compressor: Any, made: Any) -> Iterator[tuple[str, torch.Tensor]]:
    if not QUANTIZED.search(name):
        yield name, weight
        return
    from compressed_tensors.quantization.utils import calculate_qparams

    rows, columns = weight.shape
    groups = weight.float().reshape(rows, -1, made.weights.group_size or columns)
    scale, _ = calculate_qparams(groups.amin(-1), groups.amax(-1), made.weights)
    scale = scale.to(
        weight.dtype
    ).float()  # as it is stored; divided by in 32 bit: in 16 bit many a code would be the next one
    packed = compressor.compress({"weight": weight.float(), "weight_scale": scale}, made)
    module = name.removesuffix(".weight")
    yield from ((f"{module}.{part}", packed[part]) for part in sorted(packed))
