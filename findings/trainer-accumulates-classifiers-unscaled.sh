#!/usr/bin/env bash
# gradient_accumulation_steps=8 in transformers' Trainer gives a classifier 8 times the gradient of one batch with the same rows.
#
# Versions: torch 2.13.0 (CPU), transformers 5.19.0, accelerate 1.15.0. Date: 2026-11-29.
#
# What happens: 8 rows, no dropout, the first step's gradient before clipping. As one batch of 8 and as 8 batches of 1, the norms of a
# BertForSequenceClassification (one label, several labels, or a number), a BertForTokenClassification and a LlamaForSequenceClassification
# differ by a factor of 8. Trainer leaves the division by the number of steps to models whose forward takes **kwargs, and expects them to
# divide a sum by num_items_in_batch; these take **kwargs, do nothing with it, and return the mean of each batch. A LlamaForCausalLM, which does
# divide by it, and a BertForQuestionAnswering, whose rows have no "labels", give the same norm both ways. Adam hides most of it, but not what
# max_grad_norm=1.0, the default, then cuts, nor the loss that is logged, which is 8 times too large as well.
#
# The guess before it was run: since transformers 4.46, accumulated gradients are those of the whole batch, for every model of the library.
# (A second guess, that only older architectures such as BERT are concerned and Llama's classifier is not, was wrong as well.)
#
# Fails if a factor is not 8 where it is said to be, or not 1 elsewhere.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.19.0 accelerate==1.15.0
HF_HUB_OFFLINE=1 "$work/venv/bin/python" - "$work" 2>"$work/log" <<'PYTHON' || { cat "$work/log"; exit 1; }
import sys

import torch
from transformers import (
    BertConfig, BertForQuestionAnswering, BertForSequenceClassification, BertForTokenClassification, LlamaConfig,
    LlamaForCausalLM, LlamaForSequenceClassification, Trainer, TrainingArguments,
)

SIZES = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "pad_token_id": 0}
QUIET = {**SIZES, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
torch.manual_seed(0)
ids = [torch.randint(5, 50, (8,)) for _ in range(8)]
one = [{"input_ids": row, "labels": index % 3} for index, row in enumerate(ids)]
several = [{"input_ids": row, "labels": torch.randint(0, 2, (3,)).float()} for row in ids]
number = [{"input_ids": row, "labels": float(index)} for index, row in enumerate(ids)]
tags = [{"input_ids": row, "labels": torch.randint(0, 3, (8,))} for row in ids]
spans = [{"input_ids": row, "start_positions": 1, "end_positions": 3} for row in ids]
CASES = {
    "BERT, one label": (BertForSequenceClassification, BertConfig(**QUIET, num_labels=3), one, 8),
    "BERT, several labels": (BertForSequenceClassification, BertConfig(**QUIET, num_labels=3, problem_type="multi_label_classification"), several, 8),
    "BERT, a number": (BertForSequenceClassification, BertConfig(**QUIET, num_labels=1, problem_type="regression"), number, 8),
    "BERT, tags": (BertForTokenClassification, BertConfig(**QUIET, num_labels=3), tags, 8),
    "BERT, spans": (BertForQuestionAnswering, BertConfig(**QUIET, num_labels=2), spans, 1),
    "Llama, one label": (LlamaForSequenceClassification, LlamaConfig(**SIZES, num_labels=3), one, 8),
    "Llama, next tokens": (LlamaForCausalLM, LlamaConfig(**SIZES), [{"input_ids": row, "labels": row} for row in ids], 1),
}


class Watched(Trainer):
    def _clip_grad_norm(self, model, *_):
        gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        self.norm = torch.cat(gradients).norm().item()
        return torch.tensor(1.0)


def norm(kind, config, rows, batch, steps):
    torch.manual_seed(1)
    arguments = TrainingArguments(
        sys.argv[1], per_device_train_batch_size=batch, gradient_accumulation_steps=steps, max_steps=1, use_cpu=True, report_to=[],
        save_strategy="no", logging_strategy="no", disable_tqdm=True,
    )
    trainer = Watched(kind(config), arguments, train_dataset=rows)
    trainer.log = lambda *_: None
    trainer.train()
    return trainer.norm


for name, (kind, config, rows, wanted) in CASES.items():
    whole, parts = norm(kind, config, rows, 8, 1), norm(kind, config, rows, 1, 8)
    print(f"{name}: gradient norm {whole:.4f} as 1 batch of 8, {parts:.4f} as 8 batches of 1: factor {parts / whole:.3f}")
    if abs(parts / whole - wanted) > 0.01:
        sys.exit("the behaviour has changed")
PYTHON
