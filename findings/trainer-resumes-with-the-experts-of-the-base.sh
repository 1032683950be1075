#!/usr/bin/env bash
# transformers' Trainer resumes the full fine-tuning of a mixture of experts with the experts that it began with, without an error.
#
# Versions: torch 2.13.0 (CPU), transformers 5.19.0, accelerate 1.15.0. Date: 2026-11-29.
#
# What happens: a checkpoint is written by save_pretrained, which gives every expert tensors of its own, as published checkpoints have them. In
# memory all experts of a layer are one parameter. The Trainer reads the checkpoint with load_state_dict(strict=False), by the names in memory:
# those of the experts are missing, the published names are unexpected, and both are a warning. All other weights and the optimizer's state are
# those of the checkpoint; the experts are those of the base. A run that was interrupted goes on as another run than one that was not.
#
# The guess before it was run: the Trainer reads what the Trainer wrote, so resuming gives the same weights whatever the architecture; it does
# for a dense model. `save_original_format=False` in save_pretrained gives a checkpoint that is read back whole.
#
# Fails if the experts are resumed, or if those of a checkpoint in the names of memory are not.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.19.0 accelerate==1.15.0
HF_HUB_OFFLINE=1 "$work/venv/bin/python" - "$work" 2>"$work/log" <<'PYTHON' || { cat "$work/log"; exit 1; }
import functools
import sys

import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM, Trainer, TrainingArguments

config = Qwen3MoeConfig(
    vocab_size=50, hidden_size=32, intermediate_size=64, moe_intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, head_dim=16, num_experts=4, num_experts_per_tok=2,
)
rows = [{"input_ids": torch.arange(1, 9), "labels": torch.arange(1, 9)} for _ in range(8)]


def trained(folder, steps, resume=None, names_of_memory=False):
    torch.manual_seed(0)
    model = Qwen3MoeForCausalLM(config)
    if names_of_memory:
        model.save_pretrained = functools.partial(model.save_pretrained, save_original_format=False)
    given = dict(output_dir=folder, max_steps=steps, save_steps=2, learning_rate=1e-2, report_to=[], use_cpu=True, disable_tqdm=True)
    trainer = Trainer(model=model, args=TrainingArguments(lr_scheduler_type="constant", **given), train_dataset=rows)
    trainer.train(resume_from_checkpoint=resume)
    return {name: value.detach().clone() for name, value in model.named_parameters()}


for names_of_memory in (False, True):
    folder = f"{sys.argv[1]}/{names_of_memory}"
    whole = trained(folder, 4, names_of_memory=names_of_memory)
    again = trained(folder, 4, f"{folder}/checkpoint-2", names_of_memory)
    apart = {part: max(float((again[n] - whole[n]).abs().max()) for n in whole if (".experts." in n) == (part == "experts")) for part in ("experts", "rest")}
    print(f"names of memory: {names_of_memory}; after resuming the experts differ by {apart['experts']:.4f}, the rest by {apart['rest']:.4f}")
    if (apart["experts"] < 1e-5) != names_of_memory:
        sys.exit("the behaviour has changed")
PYTHON
