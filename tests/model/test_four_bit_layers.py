"""4-bit layers of a base that is evaluated and saved in the middle of training, on CPUs where bitsandbytes would pack them anew."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, has_avx512bf16
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, get_peft_model

from helpers.tiny import build_tokenizer
from qkit.core.device import detect
from qkit.model import load
from qkit.model import source as model_source
from qkit.recipe.schema import Recipe
from qkit.runtimes import transformers as runtime

IDS = torch.arange(3, 43).reshape(2, 20)
packs = pytest.mark.skipif(not has_avx512bf16(), reason="bitsandbytes packs weights on CPUs with AVX512-BF16 only")


@pytest.fixture(scope="module")
def narrow_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama whose widths are multiples of 16 and of nothing that bitsandbytes packs by."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder, tokenizer = tmp_path_factory.mktemp("models") / "narrow", build_tokenizer()
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "head_dim": 16}
    heads = {"num_attention_heads": 3, "num_key_value_heads": 1}
    config = LlamaConfig(vocab_size=len(tokenizer), initializer_range=0.2, **sizes, **heads)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _recipe(folder: Path, double: bool) -> Recipe:
    return Recipe.model_validate(
        {
            "task": "chat",
            "model": {"source": str(folder)},
            "data": {},
            "quantization": {"bnb_4bit_use_double_quant": double},
        }
    )


def _logits(live: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = live(input_ids=IDS, use_cache=False).logits.float()
    return found


def _layers(live: Any) -> list[Linear4bit]:
    return [module for module in live.modules() if isinstance(module, Linear4bit)]


def _weights(live: Any) -> list[torch.Tensor]:
    return [dequantize_4bit(layer.weight.data, layer.weight.quant_state) for layer in _layers(live)]


def _step(live: Any, optimizer: torch.optim.Optimizer) -> float:
    live.train()
    loss = live(input_ids=IDS, labels=IDS, use_cache=False).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.detach())


@pytest.mark.parametrize("double", [False, True], ids=["absmax in fp32", "double quantization"])
@pytest.mark.parametrize("shape", ["packable", "not packable"])
def test_training_goes_on_unharmed_after_an_evaluation_and_a_save(
    tiny_model: Path, narrow_model: Path, tmp_path: Path, shape: str, double: bool
) -> None:
    """One that is evaluated and saved after each step has the losses of one that is not, and its weights stay to the bit."""
    folder = tiny_model if shape == "packable" else narrow_model
    losses, weights = [], []
    for disturbed in (False, True):
        torch.manual_seed(0)
        base = load.load_base(folder, _recipe(folder, double), detect())
        live = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear"))
        weights.append(_weights(live))
        optimizer = torch.optim.AdamW([p for p in live.parameters() if p.requires_grad], lr=1e-2)
        losses.append([])
        for _ in range(4):
            losses[-1].append(_step(live, optimizer))
            if disturbed:
                live.eval()
                before = _logits(live)
                live.save_pretrained(str(tmp_path))
                live.state_dict()
                assert torch.equal(_logits(live), before)
        weights.append(_weights(live))
    assert losses[0] == losses[1]
    assert losses[0][-1] < losses[0][0]
    for others in weights[1:]:
        assert all(torch.equal(one, other) for one, other in zip(weights[0], others, strict=True))


@pytest.mark.parametrize("double", [False, True])
def test_weights_dequantize_to_the_same_after_a_forward(tiny_model: Path, double: bool) -> None:
    base = load.load_base(tiny_model, _recipe(tiny_model, double), detect()).eval()
    before = copy.deepcopy(_weights(base))
    in_4_bit = _logits(base)
    model_source.dequantize(base)
    assert all(
        torch.equal(weight, dict(base.named_modules())[name].weight)
        for weight, name in zip(before, _names(base), strict=True)
    )
    assert torch.equal(_logits(base), in_4_bit)


def _names(base: Any) -> list[str]:
    return [name for name, module in base.named_modules() if isinstance(module, torch.nn.Linear) and name != "lm_head"]


@packs
def test_an_artifact_in_4_bit_is_opened_whatever_its_widths(
    narrow_model: Path, tiny_model: Path, tmp_path: Path
) -> None:
    """Layers that bitsandbytes can pack are left to it, as whoever loads the folder would have them."""
    for source, packed in ((narrow_model, False), (tiny_model, True)):
        folder = tmp_path / source.name
        load.load_base(source, _recipe(source, True), detect()).save_pretrained(folder)
        opened = runtime.open(folder, detect()).model
        assert torch.isfinite(_logits(opened)).all()
        states = [getattr(layer.weight.quant_state, "packing_format_for_cpu", False) for layer in _layers(opened)]
        assert states and set(states) == {packed}
