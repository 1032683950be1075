"""Load model folders with whatever transformers this python has; what their tokenizers and weights say goes to standard output as JSON.

Run by benchmarks/transformers4.py, twice: by qkit's python and by that of an environment with transformers 4. Imports nothing of qkit.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

TEXT = "Steps:\n\n1. Do it by 2025-01-02, <|im_start|>user hello wo\u0301rld\t🙂 x['a'] = 1234567"
TURNS = [
    {"role": "user", "content": "Say a."},
    {"role": "assistant", "content": "a"},
    {"role": "user", "content": "And b?"},
]
LENGTH = 96  # tokens: long enough that another base of the rotary positions shows


def main() -> None:
    warnings.simplefilter("ignore")
    print(json.dumps({folder: _read(Path(folder)) for folder in sys.argv[1:]}))


def _read(folder: Path) -> dict[str, Any]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder))
        said: dict[str, Any] = {
            "ids": tokenizer(TEXT)["input_ids"],
            "turns": tokenizer.apply_chat_template(TURNS, add_generation_prompt=True, tokenize=False),
            "stop": GenerationConfig.from_pretrained(str(folder)).eos_token_id,
        }
        if any(folder.glob("*.safetensors")):
            model = AutoModelForCausalLM.from_pretrained(str(folder), dtype="auto")
            said["dtype"] = str(getattr(model, "dtype", None))
            ids = torch.arange(LENGTH)[None] * 7 % 250
            with torch.no_grad():
                said["logits"] = model.eval()(ids).logits[0, -1].float().tolist()
    except Exception as error:  # the finding
        return {"error": f"{type(error).__name__}: {error}"[:300]}
    return said


if __name__ == "__main__":
    main()
