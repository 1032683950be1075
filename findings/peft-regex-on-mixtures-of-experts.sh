#!/usr/bin/env bash
# A regular expression in LoraConfig.target_modules that names one layer adapts every layer, where the model is a mixture of experts.
#
# Versions: torch 2.13.0 (CPU), transformers 5.19.0, peft 0.21.2. Date: 2026-11-29.
#
# What happens: target_modules=r"model\.layers\.0\..*q_proj" on a Llama adapts one module, q_proj of layer 0, as documented: a string is matched
# against the whole name. On a Mixtral of the same size it adapts q_proj of all layers: for models whose experts transformers 5 has put
# together, PEFT translates names of older checkpoints and replaces the expression by the last parts of the names that it matched
# ({"q_proj"}). Nothing is said, and adapter_config.json keeps the short names: the adapter has as many times the parameters as there are
# layers, and trains what was meant to be left alone.
#
# The guess before it was run: the kind of MLP makes no difference to which attention layers an expression matches.
#
# Fails if both models have one adapted module, or the Llama more.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.19.0 peft==0.21.2 accelerate==1.15.0
HF_HUB_OFFLINE=1 "$work/venv/bin/python" - 2>"$work/log" <<'PYTHON' || { cat "$work/log"; exit 1; }
import sys

from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 2}
models = {"llama": LlamaForCausalLM(LlamaConfig(**sizes)), "mixtral": MixtralForCausalLM(MixtralConfig(**sizes, num_local_experts=2))}
wish = r"model\.layers\.0\..*q_proj"
adapted = {}
for name, model in models.items():
    made = get_peft_model(model, LoraConfig(r=2, target_modules=wish, task_type="CAUSAL_LM"))
    adapted[name] = made.base_model.targeted_module_names
    print(f"{name}: {wish} adapts {adapted[name]}; the config says {made.peft_config['default'].target_modules}")
if len(adapted["llama"]) != 1 or len(adapted["mixtral"]) != 3:
    sys.exit("the behaviour has changed")
PYTHON
