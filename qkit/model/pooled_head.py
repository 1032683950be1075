"""A body of transformers with a head that pools the states of a text's tokens: by the first or last one, their mean, or their maximum.

This file stands alone: a copy of it lies in the folder of each such model, so that plain transformers opens the folder with
`AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=True)`.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.modeling_outputs import SequenceClassifierOutput

KEY = "pooled_head"  # in config.json: pooling, layers, activation, dropout


def pooled(states: Tensor, mask: Tensor, pooling: str) -> Tensor:
    """One state for each text, [rows, width]. `states`: [rows, length, width]; `mask`: [rows, length], 1 for tokens and 0 for padding."""
    if pooling == "cls":
        return states[:, 0]
    if pooling == "last":
        places = torch.arange(mask.shape[1], device=mask.device) * mask
        last = places.argmax(1)[:, None, None].expand(-1, 1, states.shape[2])
        return states.gather(1, last)[:, 0]
    real = mask[..., None].to(torch.bool)
    if pooling == "max":
        return states.masked_fill(~real, torch.finfo(states.dtype).min).max(1).values
    total: Tensor = states.masked_fill(~real, 0).sum(1)
    return total / mask.sum(1, keepdim=True).to(states.dtype)


class PooledHead(nn.Module):
    """Hidden layers of the body's width, then a logit for each label: [rows, width] -> [rows, labels]."""

    def __init__(self, width: int, labels: int, layers: int, activation: str, dropout: float):
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.activation = ACT2FN[activation]
        self.out = nn.Linear(width, labels)

    def forward(self, state: Tensor) -> Tensor:
        state = self.dropout(state)
        for layer in self.layers:
            state = self.dropout(self.activation(layer(state)))
        logits: Tensor = self.out(state)
        return logits


class PooledForSequenceClassification(PreTrainedModel):
    """Logits of whole texts, [rows, labels]. `body`: a model of transformers without its own head, loaded already; None: with new weights."""

    base_model_prefix = "body"
    _auto_class = "AutoModelForSequenceClassification"  # saving copies this file and says so in config.json
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True

    def __init__(self, config: Any, body: PreTrainedModel | None = None):
        super().__init__(config)
        settings = getattr(config, KEY)
        self.pooling = settings["pooling"]
        self.body = AutoModel.from_config(config, **without_pooler(config)) if body is None else body
        self.config = self.body.config  # one object, as in models of transformers: the body may have a copy
        text = self.config.get_text_config()
        self.head = PooledHead(
            text.hidden_size, config.num_labels, settings["layers"], settings["activation"], settings["dropout"]
        )
        self._reads = inspect.signature(self.body.forward).parameters
        self.post_init()

    @classmethod
    def from_pretrained(cls, name: Any, *args: Any, config: Any = None, **options: Any) -> Any:
        """As of every model of transformers; the class of the configuration is the body's, so it is read here."""
        if config is None:
            config = AutoConfig.from_pretrained(name)
            for key in [key for key in options if key != "dtype" and hasattr(config, key)]:
                setattr(config, key, options.pop(key))
        return super().from_pretrained(name, *args, config=config, **options)

    def _can_set_attn_implementation(self) -> bool:
        return bool(self.body._can_set_attn_implementation())

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **options: Any,
    ) -> SequenceClassifierOutput:
        """`input_ids`, `attention_mask`, `token_type_ids`: [rows, length]; without a mask, every position is a token."""
        given: dict[str, Any] = {
            "input_ids": input_ids,
            "inputs_embeds": inputs_embeds,
            "attention_mask": attention_mask,
        }
        if "token_type_ids" in self._reads:
            given["token_type_ids"] = token_type_ids
        options = {name: value for name, value in options.items() if name in self._reads}
        states = self.body(**given, **options).last_hidden_state
        mask = torch.ones(states.shape[:2], dtype=torch.long, device=states.device)
        state = pooled(states, mask if attention_mask is None else attention_mask, self.pooling)
        return SequenceClassifierOutput(logits=self.head(state.to(self.head.out.weight.dtype)))


def without_pooler(config: Any) -> dict[str, bool]:
    """The arguments that leave out the pooler that some bodies, such as BERT's, put on the first token."""
    body = AutoModel._model_mapping[type(config)]
    body = body[0] if isinstance(body, tuple) else body
    return {"add_pooling_layer": False} if "add_pooling_layer" in inspect.signature(body.__init__).parameters else {}
