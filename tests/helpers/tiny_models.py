"""Tiny models of twelve architectures, and some more mixtures of experts, with the tokenizer of the tests; built from their configs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SIZES = {
    "vocab_size": 259,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
}
HEADS = {**SIZES, "head_dim": 32}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
# The positions of the models that there are: shorter ones scale to nothing.
YARN = {
    "rope_type": "yarn",
    "rope_theta": 150000.0,
    "factor": 32.0,
    "original_max_position_embeddings": 4096,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
}
GPT_OSS = {**HEADS, "num_local_experts": 4, "num_experts_per_tok": 2, "max_position_embeddings": 131072}

ARCHITECTURES: Mapping[str, Mapping[str, Any]] = {
    "llama": SIZES,
    "qwen2": SIZES,
    "qwen3": HEADS,
    "qwen3_moe": {**HEADS, **EXPERTS},
    "mixtral": {**SIZES, "num_local_experts": 4},
    "gemma2": {**HEADS, "tie_word_embeddings": True},
    "gemma3_text": {**HEADS, "tie_word_embeddings": True},
    "phi3": SIZES,
    "gpt2": {"vocab_size": 259, "n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 512, "initializer_range": 0.2},
    "olmo2": SIZES,
    "gpt_oss": {**GPT_OSS, "rope_parameters": YARN},
    "granite": SIZES,
}
MORE: Mapping[str, Mapping[str, Any]] = {
    "gpt_neox": SIZES,
    "starcoder2": SIZES,
    "hrm_text": {**SIZES, "num_key_value_heads": 2},  # one matrix on disk for several modules
    "qwen2_moe": {**SIZES, **EXPERTS, "shared_expert_intermediate_size": 96},
    "phimoe": {**SIZES, "num_local_experts": 4},
    "granitemoe": {**SIZES, "num_local_experts": 4},
    "olmoe": {**SIZES, "num_experts": 12, "num_experts_per_tok": 2},  # more than ten: names sort otherwise than numbers
}
# A model that sees images: its checkpoints hold other names than it has in memory.
SIGLIP = {
    "model_type": "siglip_vision_model",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
SEEING: Mapping[str, Any] = {
    "text_config": {**HEADS, **SPECIAL, "model_type": "gemma3_text", "tie_word_embeddings": True},
    "vision_config": SIGLIP,
    "image_token_index": 258,
    "mm_tokens_per_image": 4,
}


def config_of(name: str, **changes: Any) -> Any:
    from transformers import AutoConfig

    if name == "gemma3":
        return AutoConfig.for_model(name, **{**SEEING, **changes})
    return AutoConfig.for_model(name, **{**SPECIAL, **{**ARCHITECTURES, **MORE}[name], **changes})


def weightless(name: str, **changes: Any) -> Any:
    """The model without weights."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config_of(name, **changes))


def build(
    folder: Path, name: str, dtype: str = "bfloat16", fused: bool = False, spread: float = 0.2, **changes: Any
) -> Path:
    """A model with random weights on disk, and its tokenizer. `fused`: with tensors as the model has them in memory."""
    import torch
    from transformers import AutoModelForCausalLM

    from helpers.tiny import build_tokenizer

    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(config_of(name, **changes))
    for parameter_name, parameter in made.named_parameters():
        if parameter.ndim > 1 or parameter_name.endswith(("bias", "sinks")):
            torch.nn.init.normal_(parameter, std=spread if parameter.ndim > 1 else spread / 4)
    made.to(getattr(torch, dtype)).save_pretrained(folder, save_original_format=not fused)
    build_tokenizer().save_pretrained(folder)
    return folder
