#!/usr/bin/env bash
# PEFT's model for question answering drops token_type_ids: a fresh LoRA adapter, which adds nothing, changes what a BERT answers.
#
# Versions: torch 2.13.0 (CPU), transformers 5.19.0, peft 0.21.2. Date: 2026-11-29.
#
# What happens: the second matrix of a fresh LoRA adapter is zero, so the model with it must compute what the model computes without it.
# With task_type TOKEN_CLS and SEQ_CLS it does. With QUESTION_ANS the logits of question and context differ, and are those of the model without
# token types, by which a BERT tells one from the other: PeftModelForQuestionAnswering.forward takes token_type_ids by name and does not hand
# them on. So a LoRA is trained on other inputs than the ones given, without a word, and behaves otherwise once it is merged into the model.
#
# The guess before it was run: PEFT hands every argument of the model on, whatever the task type, so an adapter of zeros is neutral.
#
# Fails if QUESTION_ANS is neutral, or one of the others is not.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.19.0 peft==0.21.2 accelerate==1.15.0
HF_HUB_OFFLINE=1 "$work/venv/bin/python" - 2>"$work/log" <<'PYTHON' || { cat "$work/log"; exit 1; }
import copy
import sys

import torch
from peft import LoraConfig, get_peft_model
from transformers import BertConfig, BertForQuestionAnswering, BertForSequenceClassification, BertForTokenClassification

config = BertConfig(vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, initializer_range=0.3)
ids = torch.tensor([[1, 7, 8, 2, 9, 10, 11, 2]])
types = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1]])


def logits(model, **given):
    with torch.no_grad():
        out = model(input_ids=ids, **given)
    return out["start_logits"] if "start_logits" in out else out["logits"]


for task_type, kind in (("TOKEN_CLS", BertForTokenClassification), ("SEQ_CLS", BertForSequenceClassification), ("QUESTION_ANS", BertForQuestionAnswering)):
    torch.manual_seed(0)
    model = kind(config).eval()
    adapted = get_peft_model(copy.deepcopy(model), LoraConfig(task_type=task_type, target_modules=["query", "value"])).eval()
    with_types, without = logits(model, token_type_ids=types), logits(model)
    given = logits(adapted, token_type_ids=types)
    apart, like_none = float((given - with_types).abs().max()), float((given - without).abs().max())
    print(f"{task_type}: logits with a fresh LoRA differ by {apart:.4f} from those without it, and by {like_none:.4f} from those without token types")
    if (apart < 1e-5) == (task_type == "QUESTION_ANS") or (like_none < 1e-5) != (task_type == "QUESTION_ANS"):
        sys.exit("the behaviour has changed")
PYTHON
