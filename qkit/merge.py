"""The stage `merge`: adapter and base become one model, one tensor at a time, from shard to shard.

The delta is added in fp32 to the weights that the adapter was trained against (the base quantized to 4 bit and dequantized again) and rounded
once. Onto the 16-bit base the result is a model that nobody trained; rounding back to 4 bit loses the small deltas altogether.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qkit import model, recipe
from qkit.errors import ModelError
from qkit.progress import Progress
from qkit.run import Run, need_disk

if TYPE_CHECKING:
    import torch

PREFIX = "base_model.model."


def run(run: Run, out: Path) -> None:
    """Write the merged model: shards, index, tokenizer, template, generation config."""
    folder, adapter = model.resolve(run.recipe.model), run.need("train", "adapter")
    need_disk(out, sum(shard.stat().st_size for shard in model.shards(folder)), "merge")
    note = model.check_adapter(adapter, folder)
    merge(folder, adapter, out, run.recipe.merge, note, run.progress)
    model.copy_companions(folder, out)
    _write_config(folder, out, run.recipe.merge.dtype)
    _write_stop_tokens(run, out)


def merge(
    folder: Path,
    adapter: Path,
    out: Path,
    section: recipe.Merge,
    note: Mapping[str, Any],
    progress: Progress | None = None,
) -> None:
    """Write `folder`'s weights with the adapter added; holds a few tensors at a time, whatever the model's size."""
    import torch
    from safetensors.torch import save_file

    dtype = getattr(torch, section.dtype)
    deltas = Deltas(adapter)
    quantized = set(note["quantized"]) if section.base == "dequantized" else set()
    tensors = (
        (name, _merged(name, weight, deltas, name in quantized, note["quantization"]).to(dtype))
        for name, weight in (progress or Progress()).track(_weights(folder), "merge", model.count_tensors(folder))
    )
    index: dict[str, str] = {}
    files = []
    for number, shard in enumerate(_sharded(tensors, section.max_shard_bytes), start=1):
        files.append(f"model-{number:05d}.safetensors")
        save_file(shard, out / files[-1], metadata={"format": "pt"})
        index.update(dict.fromkeys(shard, files[-1]))
    deltas.check_all_used()
    _name_shards(out, files, index)


def _weights(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    from safetensors import safe_open

    for shard in model.shards(folder):
        with safe_open(shard, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  (not a dict)
                yield name, file.get_tensor(name)


class Deltas:
    """The adapter's low-rank deltas by the name of the weight they belong to."""

    def __init__(self, adapter: Path):
        from peft import LoraConfig
        from safetensors.torch import load_file

        self.config = LoraConfig.from_pretrained(str(adapter))
        if self.config.use_dora or self.config.modules_to_save:
            raise ModelError(f"{adapter}: adapters with DoRA or modules_to_save are not merged by this version")
        self.pairs = load_file(adapter / "adapter_model.safetensors")
        self.left = {name.removeprefix(PREFIX).rpartition(".lora_")[0] for name in self.pairs}

    def of(self, weight: str) -> torch.Tensor | None:
        """The delta of a weight in fp32, [out, in], or None when the adapter leaves it alone."""
        module = weight.removesuffix(".weight")
        down = self.pairs.get(f"{PREFIX}{module}.lora_A.weight")
        if down is None:
            return None
        self.left.discard(module)
        up = self.pairs[f"{PREFIX}{module}.lora_B.weight"]
        return self._scaling(module) * (up.float() @ down.float())

    def _scaling(self, module: str) -> float:
        """lora_alpha / r, or / sqrt(r) for rank-stabilized LoRA, with the patterns of this module."""
        rank = _pattern(self.config.rank_pattern, module, self.config.r)
        alpha = _pattern(self.config.alpha_pattern, module, self.config.lora_alpha)
        return float(alpha / rank**0.5 if self.config.use_rslora else alpha / rank)

    def check_all_used(self) -> None:
        """Raises ModelError when the adapter holds a delta for a weight that the base does not have."""
        if self.left:
            raise ModelError(
                f"the adapter changes {sorted(self.left)[0]} and {len(self.left) - 1} more, which the base model does not have"
            )


def _pattern(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    return next((value for key, value in (patterns or {}).items() if module.endswith(key)), default)


def _merged(
    name: str, weight: torch.Tensor, deltas: Deltas, quantized: bool, quantization: Mapping[str, Any]
) -> torch.Tensor:
    """One weight of the merged model, in fp32 when the adapter changes it."""
    delta = deltas.of(name)
    seen = as_trained(weight, quantization) if quantized else weight
    return seen if delta is None else seen.float() + delta


def as_trained(weight: torch.Tensor, quantization: Mapping[str, Any]) -> torch.Tensor:
    """The weight that training saw: quantized to 4 bit and dequantized to the compute dtype.

    On a fresh tensor: one that a CPU forward has repacked would be read in the wrong layout, without an error.
    """
    import torch
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    compute = getattr(torch, quantization["bnb_4bit_compute_dtype"])
    packed, state = quantize_4bit(
        weight.to(compute),
        quant_type=quantization["bnb_4bit_quant_type"],
        compress_statistics=quantization["bnb_4bit_use_double_quant"],
        blocksize=64,
    )
    restored: torch.Tensor = dequantize_4bit(packed, state)
    return restored.reshape(weight.shape)


def _sharded(tensors: Iterator[tuple[str, torch.Tensor]], limit_bytes: int) -> Iterator[dict[str, torch.Tensor]]:
    """Groups of tensors of at most `limit_bytes` each; a larger tensor has a shard of its own."""
    shard: dict[str, torch.Tensor] = {}
    size = 0
    for name, tensor in tensors:
        if shard and size + tensor.nbytes > limit_bytes:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor.contiguous()
        size += tensor.nbytes
    yield shard


def _name_shards(out: Path, files: list[str], index: dict[str, str]) -> None:
    """One file is model.safetensors; several are numbered and have an index, as from_pretrained expects."""
    if len(files) == 1:
        (out / files[0]).rename(out / "model.safetensors")
        return
    names = {file: f"{file.removesuffix('.safetensors')}-of-{len(files):05d}.safetensors" for file in files}
    for old, new in names.items():
        (out / old).rename(out / new)
    total = sum((out / new).stat().st_size for new in names.values())
    weight_map = {name: names[file] for name, file in index.items()}
    text = json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=1)
    (out / "model.safetensors.index.json").write_text(text, encoding="utf-8")


def _write_config(folder: Path, out: Path, dtype: str) -> None:
    """The base's config, with the dtype that the weights have now and no quantization."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config.pop("quantization_config", None)
    config.pop("torch_dtype", None)
    config["dtype"] = dtype
    (out / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")


def _write_stop_tokens(run: Run, out: Path) -> None:
    """The generation config must stop where training ended its turns, or a runtime talks on."""
    file = out / "generation_config.json"
    config = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    stop = json.loads(run.need("data", "tokens.json").read_text(encoding="utf-8"))["stop"]
    config["eos_token_id"] = stop[0] if len(stop) == 1 else stop
    file.write_text(json.dumps(config, indent=1), encoding="utf-8")
