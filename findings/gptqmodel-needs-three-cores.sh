#!/usr/bin/env bash
# GPTQModel 7.6.0 cannot quantize on a machine with one or two CPU cores, as it is installed.
#
# Versions: torch 2.13.0 (CPU), transformers 5.19.0, gptqmodel 7.6.0. Date: 2026-11-29.
#
# What happens: its pool of CPU workers has by default half as many workers as there are cores, so one on a machine with two, and it asks for
# two of them to load models. `quantize` then ends before the first layer with "Virtual pool 'model_loader:cpu' requests 2 workers but parent
# 'cpu' only has 1". The environment variable GPTQMODEL_CPU_WORKERS, with a value of 2 or more, makes it work on the same machine.
#
# The guess before it was run: fewer cores make it slower.
#
# So that it shows on any machine, the variable is set to 1, which is the default of two cores; the script checks that too.
# Fails if one worker quantizes, two workers do not, or the default for two cores is no longer 1.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
cd "$work"  # it writes logs where it is run
"$work/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.19.0 gptqmodel==7.6.0
cat > "$work/quantize.py" <<'PYTHON'
import sys

import tokenizers
from gptqmodel import GPTQModel, QuantizeConfig
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

folder = sys.argv[1]
sizes = {"vocab_size": 64, "hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(folder)
words = {f"w{number}": number for number in range(64)}
tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0", pad_token="w1", eos_token="w2").save_pretrained(folder)
model = GPTQModel.load(folder, QuantizeConfig(bits=4, group_size=32), device="cpu")
rows = [{"input_ids": [(3 + row + 7 * place) % 64 for place in range(64)], "attention_mask": [1] * 64} for row in range(32)]
try:
    model.quantize(rows, batch_size=1)
    outcome = "quantized"
except ValueError as error:
    outcome = str(error)
with open(sys.argv[2], "w") as file:  # apart from its progress bars
    file.write(outcome)
PYTHON
run() {
    GPTQMODEL_CPU_WORKERS=$1 HF_HUB_OFFLINE=1 "$work/venv/bin/python" "$work/quantize.py" "$work/model-$1" "$work/outcome" >"$work/log" 2>&1 || { cat "$work/log"; exit 1; }
    cat "$work/outcome"
}
one=$(run 1)
two=$(run 2)
default=$("$work/venv/bin/python" -c 'import os; os.cpu_count = lambda: 2; import gptqmodel; print("DEFAULT", gptqmodel._default_cpu_workers())' 2>/dev/null | sed -n 's/^DEFAULT //p')
printf 'one worker:  %s\ntwo workers: %s\ndefault for two cores: %s\n' "$one" "$two" "$default"
[[ $one == *"only has 1"* && $two == quantized && $default == 1 ]] || { echo "the behaviour has changed"; exit 1; }
