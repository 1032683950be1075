#!/usr/bin/env bash
# A PiSSA adapter that PEFT converts to an ordinary LoRA is not the model that was trained, on a 16-bit base; and loses what else was trained.
#
# Versions: torch 2.13.0 (CPU), transformers 5.19.0, peft 0.21.2. Date: 2026-11-29.
#
# What happens: PiSSA takes the leading part of each weight out of the base. PEFT writes what is left back in the base's dtype, so that on a
# bf16 base each weight is rounded anew. `save_pretrained(path_initial_model_for_weight_conversion=...)` gives the trained factors less the first
# ones, which is exact for what was left before it was rounded: on the base as it was, the logits are off by 0.01 after three steps, and by 3e-6
# if the base is held in fp32. With `modules_to_save` the conversion keeps the factors only: the saved adapter lacks the trained head, and
# PeftModel.from_pretrained ends with a KeyError.
#
# The guess before it was run: the conversion is algebra on the factors, so it is exact up to rounding of the product in fp32, and whatever
# else the adapter has is saved as always.
#
# Fails if the converted adapter is exact in bf16, inexact in fp32, or can be loaded with modules_to_save.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.19.0 peft==0.21.2 accelerate==1.15.0
HF_HUB_OFFLINE=1 "$work/venv/bin/python" - "$work" 2>"$work/log" <<'PYTHON' || { cat "$work/log"; exit 1; }
import copy
import sys

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

config = LlamaConfig(vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, initializer_range=0.2)
ids = torch.arange(1, 20)[None]


def converted(dtype, folder, **more):
    """The largest difference of a logit between the trained model and the converted adapter on the base as it was, both computed in fp32."""
    torch.manual_seed(0)
    base = LlamaForCausalLM(config).to(dtype)
    before = copy.deepcopy(base).float()
    model = get_peft_model(base, LoraConfig(r=4, init_lora_weights="pissa", target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM", **more))
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(f"{folder}/first")
    model.peft_config["default"].init_lora_weights = "pissa"
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        live = model.float()(ids).logits
        model.save_pretrained(f"{folder}/saved", path_initial_model_for_weight_conversion=f"{folder}/first")
        return float((PeftModel.from_pretrained(before, f"{folder}/saved")(ids).logits - live).abs().max())


apart = {dtype: converted(dtype, f"{sys.argv[1]}/{dtype}") for dtype in (torch.float32, torch.bfloat16)}
print(f"converted adapter against the trained model: {apart[torch.float32]:.1e} on an fp32 base, {apart[torch.bfloat16]:.1e} on a bf16 base")
if apart[torch.float32] > 1e-4 or apart[torch.bfloat16] < 1e-3:
    sys.exit("the behaviour has changed")
try:
    converted(torch.float32, f"{sys.argv[1]}/head", modules_to_save=["lm_head"])
except KeyError as error:
    print(f"with modules_to_save: KeyError {error}")
else:
    sys.exit("the behaviour has changed")
PYTHON
