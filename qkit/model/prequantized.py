"""Handles base models that are already quantized (`quantization_config` in config.json): dequantizes them once or rejects them.

Training, merging and measuring read 16-bit weights, which the recipe's `quantization` then rounds; they would misread packed weights. If
transformers can dequantize the model, the 16-bit copy is kept in the cache. Otherwise the user must name the original 16-bit model.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qkit.core.errors import ModelError
from qkit.core.files import need_disk
from qkit.tensors.companions import copy_companions
from qkit.tensors.shards import shards, tensor_specs

if TYPE_CHECKING:
    from transformers import PreTrainedModel


# quant_method -> the package that dequantizing requires, and whether the loader dequantizes (True) or the loaded model does. As of
# transformers 5.19; tests/model/test_prequantized.py covers each.
DEQUANTIZED: Mapping[str, tuple[str, bool]] = {
    "bitsandbytes": ("bitsandbytes", False),
    "compressed-tensors": ("compressed_tensors", True),
    "fp8": ("accelerate", True),
    "mxfp4": ("accelerate", True),
}
NOTES = {  # files that identify a quantized model without a quantization_config
    "quantize_config.json": "GPTQ",
    "quant_config.json": "AWQ",
    "hf_quant_config.json": "ModelOpt",
}
# Name endings of packed weights and their scales, whatever config.json says.
PACKED = (".qweight", ".weight_packed", ".weight_scale", ".weight_scale_inv", ".absmax", ".SCB", "_blocks", ".scales")
REMEDY = "set model.source to the original 16-bit model (see its model card)"


def method(config: Mapping[str, Any]) -> str | None:
    """The `quant_method` in a config.json; None if the model is not quantized."""
    for section in (config, config.get("text_config") or {}):
        options = section.get("quantization_config") or section.get("compression_config")
        if options:
            name = options.get("quant_method")
            # Early bitsandbytes wrote only its flags; MLX writes bits and group_size.
            return str(name) if name else "bitsandbytes" if {"load_in_4bit", "load_in_8bit"} & {*options} else "MLX"
        if isinstance(section.get("quantization"), dict):
            return "MLX"
    return None


def check(config: Mapping[str, Any], source: str) -> None:
    """Raise ModelError if the model is quantized by a method that cannot be dequantized here."""
    kind = method(config)
    if kind is None:
        return
    if kind not in DEQUANTIZED:
        raise ModelError(
            f"{source}: already quantized ({kind} in its config.json); only {', '.join(DEQUANTIZED)} can be dequantized: {REMEDY}"
        )
    package, _ = DEQUANTIZED[kind]
    if importlib.util.find_spec(package) is None:
        install = f"pip install {package.replace('_', '-')}"
        raise ModelError(
            f"{source}: already quantized ({kind}), and a package that dequantizing requires is missing: run {install}, or {REMEDY}"
        )


def of_folder(folder: Path) -> str | None:
    """The method by which the model in a folder is quantized; None if it is not.

    Raises:
        ModelError: the model is quantized by a method that cannot be dequantized here, or its config.json does not name the method.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    check(config, str(folder))
    if kind := method(config):
        return kind
    packed = [name for shard in folder.glob("*.safetensors") for name in tensor_specs(shard) if name.endswith(PACKED)]
    note = next((file for file in NOTES if (folder / file).is_file()), None)
    if packed or note:
        evidence = f"{len(packed)} packed tensors such as {packed[0]}" if packed else f"{note} of {NOTES[str(note)]}"
        raise ModelError(f"{folder}: contains {evidence}, but its config.json has no quantization_config: {REMEDY}")
    return None


def dequantize(folder: Path, kind: str, trust_remote_code: bool, out: Path) -> None:
    """Write the model in `folder` to `out` in bf16, with all the files next to its weights.

    Raises:
        ModelError: the model cannot be dequantized, or weights are missing afterwards.
        DoesNotFit: the disk has too little free space.
    """
    packed_bytes = sum(file.stat().st_size for file in shards(folder))
    need_disk(out.parent, packed_bytes * 2, "the base model, dequantized")
    try:
        loaded = _loaded(folder, kind, trust_remote_code)
    except (ImportError, ValueError, RuntimeError, NotImplementedError, AttributeError) as error:
        raise ModelError(
            f"{folder}: already quantized ({kind}), and transformers cannot dequantize it ({str(error).splitlines()[0]}): {REMEDY}"
        ) from error
    plain = _plain(folder, trust_remote_code)
    # save_pretrained of the loaded model would quantize again, or fail: some of its loading operations are irreversible.
    mismatch = plain.load_state_dict(loaded.state_dict(), strict=False, assign=True)
    if mismatch.missing_keys:  # unexpected keys are scales that compressed-tensors keeps next to its weights
        raise ModelError(
            f"{folder}: already quantized ({kind}), and {mismatch.missing_keys[0]} is missing after dequantizing: {REMEDY}"
        )
    plain.save_pretrained(str(out))
    config = (out / "config.json").read_text(encoding="utf-8")
    copy_companions(folder, out)
    for name in NOTES:
        (out / name).unlink(missing_ok=True)
    (out / "config.json").write_text(config, encoding="utf-8")


def _loaded(folder: Path, kind: str, trust_remote_code: bool) -> PreTrainedModel:
    """Load the model dequantized to bf16, on the CPU."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    _, by_loader = DEQUANTIZED[kind]
    config = AutoConfig.from_pretrained(str(folder), trust_remote_code=trust_remote_code)
    if by_loader:
        config.quantization_config = {**config.quantization_config, "dequantize": True}
    loaded, report = AutoModelForCausalLM.from_pretrained(
        str(folder),
        config=config,
        dtype=torch.bfloat16,
        device_map={"": "cpu"},
        output_loading_info=True,
        trust_remote_code=trust_remote_code,
    )
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report[problem]:
            raise ValueError(f"{problem.replace('_', ' ')}: {sorted(map(str, report[problem]))[0]}")
    model: PreTrainedModel = loaded if by_loader else loaded.dequantize(dtype=torch.bfloat16)
    return model


def _plain(folder: Path, trust_remote_code: bool) -> PreTrainedModel:
    """A model of the same class on the meta device, without weights and without a quantization config."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(str(folder), trust_remote_code=trust_remote_code)
    for section in (config, config.get_text_config()):
        if hasattr(section, "quantization_config"):
            del section.quantization_config
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16, trust_remote_code=trust_remote_code
        )
    return model
