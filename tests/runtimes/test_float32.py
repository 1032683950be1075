"""A 16-bit model computed in fp32, block by block: the numbers of a model that is in fp32 as a whole, and 16-bit weights afterwards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from qkit.recipe.schema import Recipe
from qkit.runtimes._float32 import blocks_of, compute_in_float32, with_float32_attention

SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {**SMALL, "num_key_value_heads": 2, "tie_word_embeddings": True},
    "gemma2": {**SMALL, "num_key_value_heads": 2, "head_dim": 16},
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4},
    "gpt_neox": {**SMALL},
    "opt": {"hidden_size": 64, "ffn_dim": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "word_embed_proj_dim": 64},
    "mixtral": {**SMALL, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2},
}  # fmt: skip
IDS = torch.tensor([[5, 6, 7, 8, 9, 40, 41]])


def _model(family: str, **more: Any) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        family, vocab_size=128, initializer_range=0.2, pad_token_id=0, **{**FAMILIES[family], **more}
    )
    return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_it_gives_what_the_whole_model_in_fp32_gives(family: str) -> None:
    model, whole = _model(family), _model(family).float()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.inference_mode():
        rounded, exact = model(input_ids=IDS).logits.float(), whole(input_ids=IDS).logits
        compute_in_float32(model)
        found = model(input_ids=IDS).logits
        again = model(input_ids=IDS).logits
    assert found.dtype == torch.float32 and torch.equal(found, again)
    torch.testing.assert_close(found, exact, atol=1e-5, rtol=1e-5)
    assert (rounded - exact).abs().max() > 100 * (found - exact).abs().max()  # bf16 is another matter
    layers = list(blocks_of(model))
    assert len(layers) == 2
    for layer in layers:
        assert {p.dtype for p in layer.parameters()} == {torch.bfloat16}
    after = model.state_dict()
    assert all(torch.equal(after[name].to(tensor.dtype), tensor) for name, tensor in before.items())


@pytest.mark.parametrize(
    "options", [{}, {"use_dora": True}, {"modules_to_save": ["lm_head"]}, {"trainable_token_indices": [5, 40]}]
)
def test_an_adapter_on_it_too(options: dict[str, Any], tmp_path: Path) -> None:
    """LoRA and what PEFT has beside it, loaded as a run's adapter is."""
    base = _model("llama", tie_word_embeddings=False)
    base.save_pretrained(tmp_path / "base")
    torch.manual_seed(1)
    adapted = get_peft_model(
        base, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM", **options)
    )
    adapted.save_pretrained(tmp_path / "adapter")

    def opened() -> Any:
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.bfloat16)
        return PeftModel.from_pretrained(loaded, str(tmp_path / "adapter")).eval()

    streamed = opened()
    compute_in_float32(streamed)
    with torch.inference_mode():
        torch.testing.assert_close(
            streamed(input_ids=IDS).logits, opened().float()(input_ids=IDS).logits, atol=1e-4, rtol=1e-4
        )


def test_an_error_inside_leaves_the_weights_as_they_were() -> None:
    model = _model("llama")
    compute_in_float32(model)
    block = next(blocks_of(model))
    block.mlp.forward = None
    with pytest.raises(TypeError), torch.inference_mode():
        model(input_ids=IDS)
    assert {p.dtype for p in block.parameters()} == {torch.bfloat16}


def test_attention_in_16_bits_only_is_not_asked_for() -> None:
    """Flash attention's kernels take no fp32."""
    raw: dict[str, Any] = {
        "task": "chat",
        "model": {"source": "x", "attn_implementation": "flash_attention_2"},
        "data": {},
    }
    assert with_float32_attention(Recipe.model_validate(raw)).model.attn_implementation == "sdpa"
    raw["model"]["attn_implementation"] = "eager"
    assert with_float32_attention(Recipe.model_validate(raw)).model.attn_implementation == "eager"
