"""Adapters on mixtures of experts: what is trained is what was planned, and the merge is PEFT's, whatever the checkpoint's layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from helpers.tiny_models import build
from qkit.core.device import detect
from qkit.core.errors import ModelError
from qkit.merging import weights
from qkit.model import load, source
from qkit.recipe.schema import Data, Merge, Model, Recipe
from qkit.tensors.lora_deltas import Deltas

# peft holds patterns against modules alone, and says of those that are of parameters that they match nothing.
pytestmark = pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys:RuntimeWarning")

FP32 = Merge(dtype="float32")
NOTHING_QUANTIZED = {"quantized": [], "quantization": {}}
ALL = {"target_modules": "all-linear"}
BOTH = {"target_modules": ["q_proj"], "target_parameters": ["gate_up_proj", "down_proj"]}


def _loaded(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def _adapter(folder: Path, out: Path, **options: Any) -> Path:
    """An adapter by PEFT alone, its weights moved somewhere."""
    torch.manual_seed(1)
    made = get_peft_model(_loaded(folder), LoraConfig(**{"r": 4, "lora_alpha": 8, **options}))
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.1)
    made.save_pretrained(out)
    return out


def _need_equal(folder: Path, adapter: Path, out: Path) -> None:
    """The merge of `adapter` equals PEFT's, and stands in the checkpoint's own layout."""
    out.mkdir()
    weights.merge(folder, adapter, out, "16bit", FP32, NOTHING_QUANTIZED)
    wanted = PeftModel.from_pretrained(_loaded(folder), str(adapter)).merge_and_unload().state_dict()
    merged, base = _loaded(out).state_dict(), _loaded(folder).state_dict()
    for name, tensor in wanted.items():
        torch.testing.assert_close(merged[name], tensor, rtol=0, atol=2e-6, msg=name)
    changed = {name for name in base if not torch.equal(base[name], merged[name])}
    assert changed == {name for name in base if not torch.equal(base[name], wanted[name])}
    before, after = (load_file(at / "model.safetensors") for at in (folder, out))
    assert {name: t.shape for name, t in before.items()} == {name: t.shape for name, t in after.items()}


# name, whether the checkpoint holds tensors as the model does, the adapter; and a tensor that shows which layout that is
LAYOUTS: dict[str, tuple[str, bool, dict[str, Any], str]] = {
    "one tensor per expert": ("mixtral", False, ALL, "model.layers.0.block_sparse_moe.experts.0.w1.weight"),
    "one per expert, gate and up by their names": (
        "qwen3_moe",
        False,
        ALL,
        "model.layers.0.mlp.experts.0.gate_proj.weight",
    ),
    "twelve experts": ("olmoe", False, ALL, "model.layers.0.mlp.experts.11.down_proj.weight"),
    "fused": ("mixtral", True, ALL, "model.layers.0.mlp.experts.gate_up_proj"),
    "fused, gate and up by their names": ("qwen3_moe", True, ALL, "model.layers.0.mlp.experts.gate_up_proj"),
    "fused and interleaved": ("gpt_oss", False, BOTH, "model.layers.0.mlp.experts.gate_up_proj"),
    "fused under other names": ("granitemoe", False, BOTH, "model.layers.0.block_sparse_moe.input_linear.weight"),
    "router under another name": (
        "phimoe",
        False,
        {"target_modules": ["q_proj"], "target_parameters": ["gate_up_proj", "router.weight"]},
        "model.layers.0.block_sparse_moe.gate.weight",
    ),
    "beside a shared expert": (
        "qwen2_moe",
        False,
        {**BOTH, **ALL},
        "model.layers.0.mlp.shared_expert.gate_proj.weight",
    ),
    "one parameter of two": (
        "mixtral",
        False,
        {"target_modules": ["q_proj"], "target_parameters": ["down_proj"]},
        "model.layers.0.block_sparse_moe.experts.3.w2.weight",
    ),
    "rank-stabilized": ("mixtral", False, {**ALL, "use_rslora": True}, "model.layers.0.block_sparse_moe.gate.weight"),
    "ranks and alphas by pattern": (
        "gpt_oss",
        False,
        {
            "target_modules": ["q_proj"],
            "target_parameters": ["gate_up_proj", "down_proj", "router.weight"],
            "rank_pattern": {"router.weight": 3, "gate_up_proj": 2},
            "alpha_pattern": {r"layers\.1\.mlp\.experts\.down_proj": 32},
        },
        "model.layers.0.mlp.router.weight",
    ),
    "one layer alone": (
        "mixtral",
        False,
        {"target_modules": ["k_proj"], "target_parameters": ["model.layers.1.mlp.experts.gate_up_proj"]},
        "model.layers.0.block_sparse_moe.experts.0.w3.weight",
    ),
    "one tensor for several modules": (
        "hrm_text",
        False,
        {"target_modules": ["q_proj", "up_proj", "o_proj"]},
        "model.H_module.layers.0.attn.gqkv_proj.weight",
    ),
    "the text part of a model that sees images": (
        "gemma3",
        False,
        {"target_modules": r".*language_model.*(q_proj|down_proj)"},
        "language_model.model.layers.0.self_attn.q_proj.weight",
    ),
    "a module kept whole beside": (
        "mixtral",
        False,
        {**BOTH, "modules_to_save": ["gate"]},
        "model.layers.0.block_sparse_moe.experts.0.w1.weight",
    ),
}


@pytest.mark.parametrize("kind", LAYOUTS)
def test_merge_equals_pefts_in_every_layout(tmp_path: Path, kind: str) -> None:
    name, fused, options, tensor = LAYOUTS[kind]
    folder = build(tmp_path / "base", name, "float32", fused)
    assert tensor in load_file(folder / "model.safetensors")
    _need_equal(folder, _adapter(folder, tmp_path / "adapter", **options), tmp_path / "merged")


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gpt_oss", "hrm_text"])
def test_merge_onto_the_dequantized_base_leaves_experts_in_16_bits(tmp_path: Path, name: str) -> None:
    """What was quantized is seen as 4-bit training sees it, in the model's own pieces; experts were not."""
    folder = build(tmp_path / "base", name)
    options = BOTH if name == "gpt_oss" else ALL
    adapter = _adapter(folder, tmp_path / "adapter", **options)
    how = Recipe(task="chat", model=Model(source=str(folder)), data=Data())
    live = load.load_base(folder, how, detect())
    note = {"quantized": source.quantized_names(live), "quantization": how.quantization.model_dump(mode="json")}
    assert note["quantized"] and not any("experts" in quantized for quantized in note["quantized"])
    (tmp_path / "merged").mkdir()
    weights.merge(folder, adapter, tmp_path / "merged", "dequantized", FP32, note)
    source.dequantize(live)
    for parameter in live.parameters():
        parameter.data = parameter.data.float()
    wanted = PeftModel.from_pretrained(live, str(adapter)).merge_and_unload().state_dict()
    merged = _loaded(tmp_path / "merged").state_dict()
    for key, tensor in wanted.items():
        torch.testing.assert_close(merged[key], tensor, rtol=0, atol=2e-6, msg=key)


def test_adapter_of_an_older_transformers_goes_by_the_checkpoints_names(tmp_path: Path) -> None:
    folder = build(tmp_path / "base", "mixtral", "float32")
    adapter = _adapter(folder, tmp_path / "adapter", target_modules=["q_proj"])
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "target_modules": ["q_proj", "w1", "w2", "w3"]}))
    pairs = load_file(adapter / "adapter_model.safetensors")
    for name, weight in load_file(folder / "model.safetensors").items():
        if ".experts." in name:
            place = f"base_model.model.{name.removesuffix('.weight')}"
            pairs[f"{place}.lora_A.weight"] = torch.randn(4, weight.shape[1]) * 0.1
            pairs[f"{place}.lora_B.weight"] = torch.randn(weight.shape[0], 4) * 0.1
    save_file(pairs, adapter / "adapter_model.safetensors")
    _need_equal(folder, adapter, tmp_path / "merged")


def test_delta_of_other_experts_is_refused(tmp_path: Path) -> None:
    few = build(tmp_path / "few", "mixtral", "float32")
    many = build(tmp_path / "many", "mixtral", "float32", num_local_experts=8)
    adapter = _adapter(many, tmp_path / "adapter", **BOTH)
    (tmp_path / "merged").mkdir()
    with pytest.raises(ModelError, match="was trained on another model"):
        weights.merge(few, adapter, tmp_path / "merged", "16bit", FP32, NOTHING_QUANTIZED)


def test_nested_names_stay_apart(tmp_path: Path) -> None:
    """One module's two parameters differ by the depth of their wrappers alone."""
    folder = build(tmp_path / "base", "mixtral", "float32")
    adapter = _adapter(folder, tmp_path / "adapter", **BOTH)
    assert len(Deltas(adapter).tensors) == len(load_file(adapter / "adapter_model.safetensors"))
