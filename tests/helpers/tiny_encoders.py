"""Tiny encoders with random weights, one of each kind of layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

SIZES = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": 0,
}
SPECIAL = {"cls_token_id": 1, "sep_token_id": 2, "bos_token_id": 1, "eos_token_id": 2}

ENCODERS: Mapping[str, Mapping[str, Any]] = {
    "bert": SIZES,
    "roberta": SIZES,
    "xlm-roberta": SIZES,
    "electra": {**SIZES, "embedding_size": 16},
    "deberta": SIZES,
    "deberta-v2": {**SIZES, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "share_att_key": True},
    "mpnet": SIZES,
    "distilbert": {"vocab_size": 99, "dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64, "pad_token_id": 0},
    "modernbert": {**SIZES, **SPECIAL, "global_attn_every_n_layers": 2},
}


def classifier(name: str, **changes: Any) -> Any:
    """The encoder with a classification head, the same weights at each call; in evaluation mode."""
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification

    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_config(
        AutoConfig.for_model(name, **{**ENCODERS[name], **changes})
    ).eval()
