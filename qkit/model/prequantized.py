"""A base model that comes quantized (`quantization_config` in its config.json): dequantized once, or refused before anything is trained.

Training, merge and measurement all read 16-bit weights, which a recipe's `quantization` then rounds; packed ones would be taken for them.
What transformers loads dequantized becomes a 16-bit model of its own in the cache; for the rest there is the model that it was made from.
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


# quant_method -> the package that dequantizing needs, and whether the loader does it or the loaded model. transformers 5.19; each is tried
# in tests/model/test_prequantized.py.
DEQUANTIZED: Mapping[str, tuple[str, bool]] = {
    "bitsandbytes": ("bitsandbytes", False),
    "compressed-tensors": ("compressed_tensors", True),
    "fp8": ("accelerate", True),
    "mxfp4": ("accelerate", True),
}
NOTES = {  # files by which a quantized model without a quantization_config is known
    "quantize_config.json": "GPTQ",
    "quant_config.json": "AWQ",
    "hf_quant_config.json": "ModelOpt",
}
# How packed weights and what belongs to them are called, whatever config.json says.
PACKED = (".qweight", ".weight_packed", ".weight_scale", ".weight_scale_inv", ".absmax", ".SCB", "_blocks", ".scales")
REMEDY = "set model.source to the 16-bit model that it was made from (its model card names it)"


def method(config: Mapping[str, Any]) -> str | None:
    """How a model is quantized, as its config.json says: a `quant_method`; None where it is not."""
    for section in (config, config.get("text_config") or {}):
        found = section.get("quantization_config") or section.get("compression_config")
        if found:
            named = found.get("quant_method")
            # Early bitsandbytes wrote only its switches, MLX writes bits and group_size.
            return str(named) if named else "bitsandbytes" if {"load_in_4bit", "load_in_8bit"} & {*found} else "MLX"
        if isinstance(section.get("quantization"), dict):
            return "MLX"
    return None


def check(config: Mapping[str, Any], source: str) -> None:
    """Raise ModelError if a model is quantized by a method that cannot be dequantized here."""
    found = method(config)
    if found is None:
        return
    if found not in DEQUANTIZED:
        raise ModelError(
            f"{source}: is already quantized ({found} in its config.json), and only {', '.join(DEQUANTIZED)} can be dequantized: {REMEDY}"
        )
    package, _ = DEQUANTIZED[found]
    if importlib.util.find_spec(package) is None:
        install = f"pip install {package.replace('_', '-')}"
        raise ModelError(
            f"{source}: is already quantized ({found}), and dequantizing it requires a package: {install}; or {REMEDY}"
        )


def of_folder(folder: Path) -> str | None:
    """How the model in a folder is quantized; None where it is not.

    Raises:
        ModelError: it is, in a way that is not dequantized here.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    check(config, str(folder))
    if found := method(config):
        return found
    packed = [name for shard in folder.glob("*.safetensors") for name in tensor_specs(shard) if name.endswith(PACKED)]
    noted = next((kind for file, kind in NOTES.items() if (folder / file).is_file()), None)
    if packed or noted:
        what = f"{len(packed)} packed tensors such as {packed[0]}" if packed else f"the notes of {noted}"
        raise ModelError(f"{folder}: contains {what}, but its config.json has no quantization_config: {REMEDY}")
    return None


def dequantize(folder: Path, kind: str, trust_remote_code: bool, out: Path) -> None:
    """Write the model in `folder` in bf16 to `out`, with all that stands beside its weights.

    Raises:
        ModelError: it cannot be loaded, or not all of it.
        DoesNotFit: the disk has no room for it.
    """
    held = sum(file.stat().st_size for file in shards(folder))
    need_disk(out.parent, held * 2, "the base model, dequantized")
    try:
        loaded = _loaded(folder, kind, trust_remote_code)
    except (ImportError, ValueError, RuntimeError, NotImplementedError, AttributeError) as error:
        raise ModelError(
            f"{folder}: is already quantized ({kind}), and transformers cannot dequantize it ({str(error).splitlines()[0]}): {REMEDY}"
        ) from error
    plain = _plain(folder, trust_remote_code)
    # Saved as it was loaded it would be written quantized again, or not at all: an op of its loading cannot be turned round.
    left = plain.load_state_dict(loaded.state_dict(), strict=False, assign=True)
    if left.missing_keys:  # what is over are scales that compressed-tensors leaves beside its weights
        raise ModelError(
            f"{folder}: is already quantized ({kind}), and lacks {left.missing_keys[0]} once dequantized: {REMEDY}"
        )
    plain.save_pretrained(str(out))
    config = (out / "config.json").read_text(encoding="utf-8")
    copy_companions(folder, out)
    for name in NOTES:
        (out / name).unlink(missing_ok=True)
    (out / "config.json").write_text(config, encoding="utf-8")


def _loaded(folder: Path, kind: str, trust_remote_code: bool) -> PreTrainedModel:
    """The model in bf16, on the CPU."""
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
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report[what]:
            raise ValueError(f"{what.replace('_', ' ')}: {sorted(map(str, report[what]))[0]}")
    made: PreTrainedModel = loaded if by_loader else loaded.dequantize(dtype=torch.bfloat16)
    return made


def _plain(folder: Path, trust_remote_code: bool) -> PreTrainedModel:
    """A model of the same kind without weights, which knows nothing of quantization."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(str(folder), trust_remote_code=trust_remote_code)
    for section in (config, config.get_text_config()):
        if hasattr(section, "quantization_config"):
            del section.quantization_config
    with torch.device("meta"):
        made: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16, trust_remote_code=trust_remote_code
        )
    return made
