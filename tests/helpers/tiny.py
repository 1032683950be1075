"""A tiny real Llama, a byte-level tokenizer with a chat template, and a recipe that runs in seconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def build_model(folder: Path, seed: int) -> Path:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = build_tokenizer()
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,  # of 32: the narrowest that vLLM's CPU attention takes
        num_key_value_heads=1,
        max_position_embeddings=512,
        tie_word_embeddings=False,  # tied and with small weights it would say its last token for ever,
        initializer_range=0.2,  # and a fault in positions or caches would not show
        bos_token_id=tokenizer.convert_tokens_to_ids("<|im_start|>"),
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def build_tokenizer() -> Any:
    """One token per byte, and three special ones; ChatML."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", bos_token="<|im_start|>"
    )
    fast.chat_template = CHATML
    return fast


def chat_rows(count: int) -> list[dict[str, Any]]:
    """Conversations that a tiny model can learn: repeat the letter."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    return [
        {
            "messages": [
                {"role": "user", "content": f"say {letters[i % 26]} {'please ' * (i % 4)}"},
                {"role": "assistant", "content": letters[i % 26] * 3},
            ]
        }
        for i in range(count)
    ]


def tiny_settings(model: Path, rows: Path) -> dict[str, Any]:
    """A whole recipe that runs in seconds."""
    return {
        "task": "chat",
        "model": {"source": str(model)},
        "data": {
            "train": [{"source": str(rows), "rows": "4:"}],
            "test": [{"source": str(rows), "rows": ":4"}],
            "max_length": 128,
            "batch_tokens": 256,
        },
        "lora": {"r": 4, "lora_alpha": 8},
        "train": {"max_steps": 4, "learning_rate": 1e-2, "save_steps": 2},
        "evaluate": {"max_new_tokens": 8},
        # Random weights as large as these magnify every rounding: no measure of a format.
        "verify": {"gates": {"vllm": {"kl_mean": 0.01}, "onnx-int4": {"kl_mean": 0.5}}},
        "serve": {"port": 0, "max_model_len": 256, "enforce_eager": True},
        "bench": {"concurrency": [1, 2], "output_tokens": 4, "repeats": 1},
    }
