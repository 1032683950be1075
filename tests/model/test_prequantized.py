"""Bases that come quantized: dequantized as a base of their own, to the numbers that they stand for, or refused before training."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers.exporting import changed_config, exported, job_of, recipe_of
from helpers.tiny import build_tokenizer
from qkit.core.device import detect
from qkit.core.errors import ModelError
from qkit.model import load, prequantized
from qkit.model import source as model_source
from qkit.plan import deployable, screen, sheet
from qkit.recipe.schema import Recipe

Weights = dict[str, torch.Tensor]
FP8_BLOCK = 32
FP4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])  # OCP MX, by code


def _rewritten(source: Path, folder: Path, weights: Weights, quantization: dict[str, Any]) -> None:
    """A copy of a model with other tensors, and a config that says how to read them."""
    shutil.copytree(source, folder)
    save_file({n: t.contiguous() for n, t in weights.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    changed_config(folder, quantization_config=quantization)


def _bitsandbytes(source: Path, folder: Path, **options: Any) -> Weights:
    """As bitsandbytes writes it. What it stands for: by its own functions."""
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    shutil.copytree(source, folder)
    config = BitsAndBytesConfig(bnb_4bit_compute_dtype=torch.bfloat16, **options)
    loaded = AutoModelForCausalLM.from_pretrained(
        str(source), dtype=torch.bfloat16, quantization_config=config, device_map={"": "cpu"}
    )
    loaded.save_pretrained(folder)
    found = {}
    for name, module in loaded.named_modules():
        if isinstance(module, Linear4bit):
            found[f"{name}.weight"] = dequantize_4bit(module.weight.data, module.weight.quant_state)
        elif hasattr(module.weight if hasattr(module, "weight") else None, "SCB"):
            found[f"{name}.weight"] = module.weight.CB * module.weight.SCB[:, None] / 127
    return found


def _nf4(source: Path, folder: Path) -> Weights:
    return _bitsandbytes(source, folder, load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)


def _fp4(source: Path, folder: Path) -> Weights:
    return _bitsandbytes(source, folder, load_in_4bit=True, bnb_4bit_quant_type="fp4")


def _int8(source: Path, folder: Path) -> Weights:
    return _bitsandbytes(source, folder, load_in_8bit=True)


def _fp8(source: Path, folder: Path) -> Weights:
    """DeepSeek's form: e4m3 in square blocks, a scale for each beside them."""
    weights = load_file(source / "model.safetensors")
    found, size = {}, FP8_BLOCK
    for name in [name for name in weights if name.endswith("proj.weight")]:
        rows, width = weights[name].shape
        blocks = weights[name].float().reshape(rows // size, size, width // size, size).transpose(1, 2)
        scales = blocks.abs().amax((-1, -2)) / 448
        packed = (blocks / scales[..., None, None]).to(torch.float8_e4m3fn)
        weights[name] = packed.transpose(1, 2).reshape(rows, width)
        weights[f"{name}_scale_inv"] = scales
        found[name] = (packed.float() * scales[..., None, None]).transpose(1, 2).reshape(rows, width)
    how = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [size, size]}
    _rewritten(source, folder, weights, how)
    return found


def _compressed(variant: str) -> Callable[[Path, Path], Weights]:
    """As our own exporter writes it."""

    def quantized(source: Path, folder: Path) -> Weights:
        folder.parent.mkdir(exist_ok=True)
        exported(job_of(source, folder.parent), f"vllm-{variant}", folder.parent).rename(folder)
        weights = load_file(folder / "model.safetensors")
        if variant == "w4a16":
            return {}
        scales = {n.removesuffix("_scale"): t for n, t in weights.items() if n.endswith("weight_scale")}
        return {name: weights[name].float() * scale.float() for name, scale in scales.items()}

    return quantized


@pytest.mark.parametrize(
    "quantize",
    [_nf4, _fp4, _int8, _fp8, _compressed("w8a8"), _compressed("w4a16"), _compressed("fp8")],
    ids=[
        "bitsandbytes nf4",
        "bitsandbytes fp4",
        "bitsandbytes int8",
        "fp8",
        "int-quantized",
        "pack-quantized",
        "float-quantized",
    ],
)
def test_what_transformers_dequantizes_becomes_a_base_of_its_own(
    tiny_model: Path, tmp_path: Path, quantize: Callable[[Path, Path], Weights]
) -> None:
    expected = quantize(tiny_model, tmp_path / "quantized")
    how = recipe_of(tmp_path / "quantized")
    assert deployable.refusals(how) == ()
    assert "qkit dequantizes it once" in "".join(screen._notes(sheet.sheet(how)))
    folder = model_source.resolve(how.model)
    found, original = load_file(folder / "model.safetensors"), load_file(tiny_model / "model.safetensors")
    assert found.keys() == original.keys() and {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
    assert prequantized.of_folder(folder) is None and model_source.resolve(how.model) == folder
    assert (folder / "tokenizer.json").is_file()
    for name, tensor in found.items():
        wanted = expected.get(name, original[name]).float()
        near = 2**-7 if expected or "proj" not in name else 0.2  # bf16; packed ones against the source
        assert float((tensor.float() - wanted).abs().max()) <= near * float(wanted.abs().max()), name
    assert any(not torch.equal(found[name], original[name]) for name in found)


def test_the_experts_of_gpt_oss_are_dequantized(tmp_path: Path) -> None:
    """MXFP4 in the layout that the hub has: a byte for two values, a power of two for each 32."""
    from transformers import GptOssConfig, GptOssForCausalLM

    tokenizer, source = build_tokenizer(), tmp_path / "plain"
    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 16}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}
    config = GptOssConfig(vocab_size=len(tokenizer), pad_token_id=0, eos_token_id=2, **sizes, **heads)
    torch.manual_seed(0)
    GptOssForCausalLM(config).to(torch.bfloat16).save_pretrained(source)
    tokenizer.save_pretrained(source)
    weights, expected = load_file(source / "model.safetensors"), {}
    for name in [name for name in weights if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        blocks = weights.pop(name).float().transpose(1, 2).unflatten(-1, (-1, 32))
        powers = torch.floor(torch.log2(blocks.abs().amax(-1) / 6)) + 1
        codes = ((blocks / 2 ** powers[..., None])[..., None] - FP4).abs().argmin(-1).to(torch.uint8)
        weights[f"{name}_blocks"] = codes[..., ::2] | codes[..., 1::2] << 4
        weights[f"{name}_scales"] = (powers + 127).to(torch.uint8)
        expected[name] = (FP4[codes.long()] * 2 ** powers[..., None]).flatten(-2).transpose(1, 2)
    _rewritten(source, tmp_path / "quantized", weights, {"quant_method": "mxfp4"})
    found = load_file(model_source.resolve(recipe_of(tmp_path / "quantized").model) / "model.safetensors")
    assert found.keys() == load_file(source / "model.safetensors").keys() and len(expected) == 4
    assert all(torch.equal(found[name].float(), tensor) for name, tensor in expected.items())


def test_a_base_in_nf4_stays_what_it_was_when_it_is_quantized_again(tiny_model: Path, tmp_path: Path) -> None:
    """Its levels are found again: rounding to bf16 in between moves no weight to another one."""
    expected = _nf4(tiny_model, tmp_path / "quantized")
    how = recipe_of(tmp_path / "quantized")
    base = load.load_base(model_source.resolve(how.model), how, detect())
    model_source.dequantize(base)
    held = dict(base.named_parameters())
    for name, wanted in expected.items():
        torch.testing.assert_close(held[name].float(), wanted.float(), rtol=2**-6, atol=0, msg=name)


# --- refused ----------------------------------------------------------------------------------------------------------


REFUSED = {
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 128},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True},
    "auto-round": {"quant_method": "auto-round", "bits": 4},
    "hqq": {"quant_method": "hqq"},
    "torchao": {"quant_method": "torchao"},
    "quark": {"quant_method": "quark"},
    "modelopt": {"quant_method": "modelopt", "quant_algo": "NVFP4"},
    "MLX": {"bits": 4, "group_size": 64},
    "someone's new one": {"quant_method": "someone's new one"},
}


@pytest.mark.parametrize("named", REFUSED)
def test_what_is_not_dequantized_is_refused_by_plan_and_before_training(
    tiny_model: Path, tmp_path: Path, named: str
) -> None:
    folder = tmp_path / "base"
    shutil.copytree(tiny_model, folder)
    changed_config(folder, quantization_config=REFUSED[named])
    said = rf"already quantized \({named} in its config.json\).*set model.source to the 16-bit model"
    how = recipe_of(folder)
    asked: tuple[Callable[[Recipe], object], ...] = (sheet.sheet, deployable.check)
    for ask in asked:
        with pytest.raises(ModelError, match=said):
            ask(how)
    with pytest.raises(ModelError, match=said):
        model_source.resolve(how.model)


@pytest.mark.parametrize("file", prequantized.NOTES)
def test_a_quantized_model_without_a_word_in_its_config_is_refused(tiny_model: Path, tmp_path: Path, file: str) -> None:
    folder = tmp_path / "base"
    shutil.copytree(tiny_model, folder)
    (folder / file).write_text(json.dumps({"bits": 4}))
    with pytest.raises(ModelError, match=r"the notes of .* no quantization_config"):
        model_source.resolve(recipe_of(folder).model)


def test_packed_tensors_are_seen_whatever_the_config_says(tiny_model: Path, tmp_path: Path) -> None:
    _fp8(tiny_model, tmp_path / "base")
    changed_config(tmp_path / "base", quantization_config=None)
    with pytest.raises(ModelError, match=r"14 packed tensors such as model\.layers.*_scale_inv"):
        model_source.resolve(recipe_of(tmp_path / "base").model)


def test_a_package_that_is_missing_is_named(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prequantized.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match="pip install compressed-tensors"):
        prequantized.check({"quantization_config": {"quant_method": "compressed-tensors"}}, "base")
