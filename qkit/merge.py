"""The stage `merge`: adapter and base become one model, one tensor at a time, from shard to shard.

The delta is added in fp32 to the weights that the adapter was trained against (the base quantized to 4 bit and dequantized again) and rounded
once. Onto the 16-bit base the result is a model that nobody trained; rounding back to 4 bit loses the small deltas altogether.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qkit import model, recipe
from qkit.errors import ModelError
from qkit.progress import Progress
from qkit.run import Run, need_disk
from qkit.tensor_files import Spec, TensorFile, read, shards, spec_bytes, tensor_specs

if TYPE_CHECKING:
    import torch

PREFIX = "base_model.model."
ROWS = ".token_adapter.trainable_tokens_delta"  # the rows of learnt tokens, behind the name of their embedding or head
SAFETENSORS_NAMES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


def run(run: Run, out: Path) -> None:
    """Write the merged model: shards, index, tokenizer, template, generation config."""
    folder, adapter = model.resolve(run.recipe.model), run.need("train", "adapter")
    need_disk(out, sum(shard.stat().st_size for shard in shards(folder)), "merge")
    note = model.check_adapter(adapter, folder)
    merge(folder, adapter, out, run.recipe.merge, note, run.progress)
    model.copy_companions(folder, out)
    if run.recipe.model.chat_template or run.recipe.model.add_tokens:
        model.tokenizer_of(run.recipe.model).save_pretrained(str(out))
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
    deltas = Deltas(adapter)
    quantized = set(note["quantized"]) if section.base == "dequantized" else set()

    def merged(name: str, weight: torch.Tensor) -> torch.Tensor:
        return _merged(name, weight, deltas, name in quantized, note["quantization"])

    writer = ShardWriter(folder, out, section)
    for name, weight in (progress or Progress()).track(read(folder, writer.order), "merge", len(writer.order)):
        writer.write(name, merged(name, weight))
    deltas.check_all_used()
    writer.finish()


class ShardWriter:
    """Writes tensors one by one into safetensors files of at most `max_shard_bytes`; all shapes are the base's."""

    def __init__(self, base: Path, out: Path, section: recipe.Merge):
        found = {name: spec for shard in shards(base) for name, spec in tensor_specs(shard).items()}
        self.out = out
        self.specs: dict[str, Spec] = {
            name: {"dtype": _kept_dtype(spec["dtype"], section.dtype), "shape": spec["shape"]}
            for name, spec in found.items()
        }
        sizes = {name: spec_bytes(spec) for name, spec in self.specs.items()}
        self.total_bytes = sum(sizes.values())
        self.shards = _grouped(sizes, section.max_shard_bytes)
        self.order = [name for names in self.shards for name in names]
        self.firsts = {names[0]: number for number, names in enumerate(self.shards)}
        self.file: TensorFile | None = None

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """The next tensor of `order`, rounded to its dtype."""
        if name in self.firsts:
            self._open(self.firsts[name])
        assert self.file is not None
        self.file.write(name, tensor)

    def _open(self, number: int) -> None:
        self._finish_file()
        specs = {name: self.specs[name] for name in self.shards[number]}
        self.file = TensorFile(self.out / self._name(number), specs)

    def _name(self, number: int) -> str:
        """One file is model.safetensors; several are numbered, as from_pretrained expects."""
        count = len(self.shards)
        return "model.safetensors" if count == 1 else f"model-{number + 1:05d}-of-{count:05d}.safetensors"

    def _finish_file(self) -> None:
        if self.file is not None:
            self.file.close()

    def finish(self) -> None:
        """Close the last shard; where there are several, write their index."""
        self._finish_file()
        if len(self.shards) > 1:
            weight_map = {name: self._name(number) for number, names in enumerate(self.shards) for name in names}
            text = json.dumps({"metadata": {"total_size": self.total_bytes}, "weight_map": weight_map}, indent=1)
            (self.out / "model.safetensors.index.json").write_text(text, encoding="utf-8")


def _kept_dtype(found: str, wanted: str) -> str:
    """Floating-point tensors are rounded to the recipe's dtype; others stay what they are."""
    return SAFETENSORS_NAMES[wanted] if found in SAFETENSORS_NAMES.values() else found


def _grouped(sizes: Mapping[str, int], limit_bytes: int) -> list[list[str]]:
    """Names in order, as many to a group as stay within `limit_bytes`; a larger tensor has a group of its own."""
    groups: list[list[str]] = [[]]
    held = 0
    for name, size in sizes.items():
        if groups[-1] and held + size > limit_bytes:
            groups.append([])
            held = 0
        groups[-1].append(name)
        held += size
    return groups


class Deltas:
    """What the adapter changes, by the name of the weight: low-rank deltas, and rows of learnt tokens."""

    def __init__(self, adapter: Path):
        from peft import LoraConfig
        from safetensors.torch import load_file

        self.config = LoraConfig.from_pretrained(str(adapter))
        if self.config.use_dora or self.config.modules_to_save:
            raise ModelError(f"{adapter}: adapters with DoRA or modules_to_save are not merged by this version")
        self.pairs = load_file(adapter / "adapter_model.safetensors")
        self.left = {name.removeprefix(PREFIX).removesuffix(ROWS).partition(".lora_")[0] for name in self.pairs}
        self.rows = [tensor for name, tensor in self.pairs.items() if name.endswith(ROWS)]

    def of(self, weight: str) -> torch.Tensor | None:
        """The delta of a weight in fp32, [out, in], or None when the adapter leaves it alone."""
        module = weight.removesuffix(".weight")
        down = self.pairs.get(f"{PREFIX}{module}.lora_A.weight")
        if down is None:
            return None
        self.left.discard(module)
        up = self.pairs[f"{PREFIX}{module}.lora_B.weight"]
        return self._scaling(module) * (up.float() @ down.float())

    def with_rows(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """The weight with the rows that were learnt in the place of its own, rounded to its dtype as the live model does."""
        import torch

        module = name.removesuffix(".weight")
        learnt: Mapping[str, list[int]] = self.config.trainable_token_indices or {}
        if module not in learnt:
            return weight
        self.left.discard(module)
        # A head that is tied to the embedding has no rows of its own, and stands in some checkpoints all the same.
        rows = self.pairs.get(f"{PREFIX}{module}{ROWS}", self.rows[0])
        return weight.index_copy(0, torch.tensor(learnt[module]), rows.to(weight.dtype))

    def _scaling(self, module: str) -> float:
        """lora_alpha / r, or / sqrt(r) for rank-stabilized LoRA, with the patterns of this module."""
        rank = _pattern(self.config.rank_pattern, module, self.config.r)
        alpha = _pattern(self.config.alpha_pattern, module, self.config.lora_alpha)
        return float(alpha / rank**0.5 if self.config.use_rslora else alpha / rank)

    def check_all_used(self) -> None:
        """Raises ModelError when the adapter changes a weight that the base does not have."""
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
    seen = as_trained(weight, quantization) if quantized else deltas.with_rows(name, weight)
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
