"""Tiny models with a head, of each architecture that is exported to ONNX, with random weights; and rows for them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

WIDE = {
    "vocab_size": 259,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "initializer_range": 0.2,
}
MARKS = {"bos_token_id": 1, "eos_token_id": 2}
ARCHITECTURES: Mapping[str, Mapping[str, Any]] = {
    "bert": {},
    "roberta": {"pad_token_id": 1, "type_vocab_size": 1},  # positions are counted from the padding token
    "distilbert": {"dim": 64, "hidden_dim": 128, "n_layers": 2, "n_heads": 4},
    "electra": {"embedding_size": 32},
    "deberta-v2": {  # attention of its own, with relative positions
        "relative_attention": True, "position_buckets": 16, "pos_att_type": ["p2c", "c2p"], "share_att_key": True,
        "norm_rel_ebd": "layer_norm", "position_biased_input": False,
    },
    "modernbert": {  # layers with a window, which most rows leave, and one without
        "local_attention": 8, "global_attn_every_n_layers": 2, "cls_token_id": 1, "sep_token_id": 2, **MARKS,
    },
    "llama": {"num_key_value_heads": 2, **MARKS},  # causal; the head reads the last token that is not padding
}  # fmt: skip
LABELS = 5


def headed(architecture: str, task: str = "SequenceClassification", **changes: Any) -> Any:
    """A model in fp32. `task`: of transformers' class, such as "TokenClassification"."""
    import torch
    import transformers

    torch.manual_seed(0)
    labels = 2 if task == "QuestionAnswering" else LABELS
    settings = {**WIDE, **ARCHITECTURES[architecture], "num_labels": labels, **changes}
    config = transformers.AutoConfig.for_model(architecture, **settings)
    return getattr(transformers, f"AutoModelFor{task}").from_config(config).eval()


def uneven(model: Any) -> Any:
    """The model with channels of unlike sizes, as trained ones have them, a few of them far larger than the others."""
    import torch

    torch.manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name.lower() and name.endswith("weight"):
                weight.mul_(torch.exp(0.5 * torch.randn_like(weight)))
                weight[3] *= 12
            elif weight.ndim == 2 and "embed" not in name:
                weight.mul_(torch.exp(0.5 * torch.randn(len(weight), 1)))
                weight.mul_(0.5)
    return model


def rows_of(count: int, longest: int, seed: int = 0, types: bool = False) -> list[dict[str, list[int]]]:
    """Rows of random ids, each of a random length."""
    import random

    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        length = rng.randint(1, longest)
        row = {"input_ids": [rng.randint(5, 258) for _ in range(length)]}
        if types:
            row["token_type_ids"] = [int(place > length // 2) for place in range(length)]
        rows.append(row)
    return rows


def outputs_of(model: Any, row: Mapping[str, list[int]]) -> dict[str, Any]:
    """What transformers says of one row, without padding, by the name of the output."""
    import torch

    given = {name: torch.tensor([values]) for name, values in row.items()}
    with torch.inference_mode():
        found = model(**given)
    names = [name for name in ("logits", "start_logits", "end_logits") if name in found]
    return {name: found[name][0].numpy() for name in names}
