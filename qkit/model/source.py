"""Finds the base model's folder: local, downloaded from the hub, converted from .gguf, or dequantized."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qkit.core.errors import ModelError
from qkit.core.files import sha256_of
from qkit.core.network import reaching_hub
from qkit.core.sources import HubId, cache_dir, locate, mark_used, unzipped
from qkit.model import added_tokens, older_forms, prequantized
from qkit.model.gguf import rope as gguf_rope
from qkit.model.gguf import tokenizer as gguf_tokenizer
from qkit.recipe import schema
from qkit.tensors.companions import HUB_PATTERNS
from qkit.tensors.shards import SHARDS

if TYPE_CHECKING:
    from transformers import PreTrainedModel


CONVERSION = 2  # version of the .gguf conversion; a change invalidates the cached models


def resolve(model: schema.Model) -> Path:
    """A local folder for `from_pretrained`, downloaded from the hub or converted from .gguf if necessary.

    A quantized model is dequantized to 16 bit. With model.add_tokens the folder's tokenizer and weights include the tokens.

    Raises:
        ModelError: the model cannot be found, downloaded or dequantized, or the tokens cannot be added.
    """
    folder = _resolved(model, (*HUB_PATTERNS, SHARDS))
    if kind := prequantized.of_folder(folder):
        folder = _dequantized(folder, kind, model.trust_remote_code)
    if not model.add_tokens:
        return folder
    target = cache_dir() / "models" / f"tokens-{added_tokens.key(folder, model.add_tokens)[:24]}"
    return _cached(target, lambda out: added_tokens.prepare(folder, model.add_tokens, model.trust_remote_code, out))


def _dequantized(folder: Path, kind: str, trust_remote_code: bool) -> Path:
    """The model in 16 bit: dequantized once, then kept in the cache."""
    target = cache_dir() / "models" / f"plain-{added_tokens.key(folder, ())[:24]}"
    return _cached(target, lambda out: prequantized.dequantize(folder, kind, trust_remote_code, out))


def companions(model: schema.Model) -> Path:
    """The folder of the original model; from the hub, all files except the weights are downloaded.

    Raises:
        ModelError: as `resolve`.
    """
    return _resolved(model, HUB_PATTERNS)


def _resolved(model: schema.Model, patterns: Sequence[str]) -> Path:
    location = locate(model.source, sha256=model.sha256, kind=ModelError)
    if isinstance(location, HubId):
        return _from_hub(location.name, model.revision, patterns)
    if location.suffix == ".gguf":
        return _from_gguf(location)
    location = unzipped(location, ModelError)
    if not (location / "config.json").is_file():
        raise ModelError(
            f"{location}: not a model folder (config.json is missing) and not a .gguf file", source=location
        )
    return location


def _from_hub(name: str, revision: str | None, patterns: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download

    remedy = (
        "check the name and the network, run `hf auth login` for gated models, or set model.source to a local folder"
    )
    with reaching_hub(ModelError, f"{name}: could not be downloaded from the hub", remedy):
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(patterns)))


def _from_gguf(file: Path) -> Path:
    """The model of a .gguf file as a safetensors folder in bf16: converted once, then kept in the cache."""
    target = cache_dir() / "models" / f"{file.stem}-{sha256_of(file)[:12]}-{CONVERSION}"
    return _cached(target, lambda out: _convert_gguf(file, out))


def _cached(target: Path, make: Callable[[Path], None]) -> Path:
    """The folder `target` in the cache. If it is missing, `make` fills a temporary folder, which is renamed when complete."""
    if target.exists():
        mark_used(target)
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".making-") as temporary:
        make(Path(temporary) / "model")
        if not target.exists():  # another process may have been faster
            (Path(temporary) / "model").rename(target)
    return target


def _convert_gguf(file: Path, out: Path) -> None:
    """Convert a .gguf file: transformers reads the weights, qkit the tokenizer, stop tokens and position scaling as llama.cpp does."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, GgufConfig

    tokenizer = gguf_tokenizer.build(file)
    try:
        config = AutoConfig.from_pretrained(str(file.parent), gguf_file=file.name)
    except (ValueError, KeyError) as error:
        raise ModelError(
            f"{file}: transformers cannot read this file ({str(error).splitlines()[0]}); set model.source to the folder or hub id that the "
            "file was made from"
        ) from None
    if rope := getattr(config, "rope_parameters", None):
        config.rope_parameters = {**rope, **gguf_rope.scaling(file, rope["rope_theta"])}
    loaded = AutoModelForCausalLM.from_pretrained(
        str(file.parent),
        gguf_file=file.name,
        config=config,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
    )
    stops = gguf_tokenizer.Header(file).stops
    for section in (loaded.config, loaded.generation_config):
        section.bos_token_id, section.pad_token_id = tokenizer.bos_token_id, tokenizer.pad_token_id
        section.eos_token_id = stops[0] if len(stops) == 1 else stops or None
    loaded.save_pretrained(out)
    tokenizer.save_pretrained(out)
    older_forms.settle(out)


def dequantize(model: PreTrainedModel) -> None:
    """Replace every 4-bit Linear with a bf16 one, in place. The model must come from `load_base`, which prevents repacking."""
    import torch
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit

    for name, module in list(model.named_modules()):
        if isinstance(module, Linear4bit):
            weight = dequantize_4bit(module.weight.data, module.weight.quant_state).to(torch.bfloat16)
            plain = torch.nn.Linear(
                module.in_features, module.out_features, bias=False, device="meta", dtype=torch.bfloat16
            )
            plain.weight = torch.nn.Parameter(weight, requires_grad=False)
            plain.bias = module.bias
            model.set_submodule(name, plain)


def quantized_names(model: PreTrainedModel) -> list[str]:
    """Names of the weights stored in 4 bit, as in the checkpoint."""
    from bitsandbytes.nn import Linear4bit

    return [f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Linear4bit)]
