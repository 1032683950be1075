"""Every folder that qkit writes, read by transformers 4 as well: token ids, rendered conversations, stop tokens, dtype and logits.

    python benchmarks/transformers4.py                 makes an environment with transformers 4.57 in a folder of its own first
    python benchmarks/transformers4.py --python P      P: a python that has transformers 4.57 already

A tiny model of each architecture (2 layers, hidden 64, rotary positions of a base and a scaling that are not the defaults) is saved by the
transformers that qkit uses, merged with a LoRA adapter in fp32, and loaded by both. A run with a template and tokens of its own, and all
formats that plain transformers reads, is made as well. Writes benchmarks/results/transformers4.json; exits with 1 where the two differ.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import subprocess
import sys
import tempfile
import venv
from pathlib import Path
from typing import Any

from qkit import pipeline
from qkit.commands import merge_any
from qkit.commands.combine import MergeRequest
from qkit.core.device import detect
from qkit.core.files import write_json
from qkit.core.progress import Progress
from qkit.recipe.load import from_dict
from qkit.run.directory import Run
from qkit.run.environment import environment

READER = Path(__file__).with_name("transformers4_reader.py")
NEEDS = ("transformers==4.57.*", "sentencepiece", "protobuf", "jinja2")
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CLOSE = 1e-4  # of the logits' standard deviation, in fp32
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LONG = {"rope_type": "longrope", "short_factor": [1.1] * 8, "long_factor": [2.0] * 8}
FAR = {"rope_type": "default", "rope_theta": 500000.0}
MIXTURE = {"num_experts_per_tok": 2}
# model_type, what differs from SIZES, and the modules that the adapter is on.
CASES: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "llama": ("llama", {"rope_parameters": FAR}, ["q_proj", "down_proj"]),
    "llama, tied": ("llama", {"rope_parameters": FAR, "tie_word_embeddings": True}, ["q_proj"]),
    "llama 3.1": ("llama", {"rope_parameters": {**LLAMA3, "rope_theta": 500000.0}}, ["q_proj"]),
    "mistral": ("mistral", {"rope_parameters": FAR, "sliding_window": 32}, ["q_proj"]),
    "qwen2": ("qwen2", {"rope_parameters": FAR}, ["q_proj"]),
    "qwen2, yarn": ("qwen2", {"rope_parameters": {**YARN, "rope_theta": 1000000.0}}, ["q_proj"]),
    "qwen3": ("qwen3", {"rope_parameters": FAR}, ["q_proj"]),
    "qwen3 moe": (
        "qwen3_moe",
        {"rope_parameters": FAR, "num_experts": 4, "moe_intermediate_size": 32, **MIXTURE},
        ["q_proj"],
    ),
    "mixtral": ("mixtral", {"rope_parameters": FAR, "num_local_experts": 4, **MIXTURE}, ["q_proj"]),
    "gemma": ("gemma", {"rope_parameters": FAR}, ["q_proj"]),
    "gemma 2": ("gemma2", {"rope_parameters": FAR, "sliding_window": 32}, ["q_proj"]),
    "gemma 3": (
        "gemma3_text",
        {
            "sliding_window": 32,
            "layer_types": ["sliding_attention", "full_attention"],
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 20000.0},
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 500000.0},
            },
        },
        ["q_proj"],
    ),
    "phi 3": ("phi3", {"rope_parameters": FAR}, ["qkv_proj"]),
    "phi 3, long": (
        "phi3",
        {"rope_parameters": {**LONG, "rope_theta": 20000.0}, "original_max_position_embeddings": 64},
        ["qkv_proj"],
    ),
    "phi": ("phi", {"rope_parameters": {**FAR, "partial_rotary_factor": 0.5}}, ["q_proj"]),
    "stablelm": ("stablelm", {"rope_parameters": {**FAR, "partial_rotary_factor": 0.25}}, ["q_proj"]),
    "gpt 2": ("gpt2", {}, ["c_attn"]),
    "gpt neox": ("gpt_neox", {"rope_parameters": {**FAR, "partial_rotary_factor": 0.5}}, ["query_key_value"]),
    "olmo 2": ("olmo2", {"rope_parameters": FAR}, ["q_proj"]),
    "granite": ("granite", {"rope_parameters": FAR}, ["q_proj"]),
    "smollm 3": ("smollm3", {"rope_parameters": FAR}, ["q_proj"]),
    "gpt oss": (
        "gpt_oss",
        {"rope_parameters": {**YARN, "rope_theta": 150000.0, "factor": 32.0}, "num_local_experts": 4, **MIXTURE},
        ["q_proj"],
    ),
}
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", type=Path, help="of an environment with transformers 4")
    parser.add_argument("--case", action="append", help="only these of the architectures")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        python = given.python or _environment(work / "environment")
        folders = {name: _merged(work, name) for name in given.case or CASES}
        folders |= {} if given.case else _run_folders(work)
        rows = _compared(folders, *(_read(who, folders) for who in (Path(sys.executable), python)))
        version = _version(python)
    given.out.mkdir(parents=True, exist_ok=True)
    result = {
        "what": f"folders that qkit writes, read by its own transformers and by {version}",
        "command": f"python benchmarks/transformers4.py {' '.join(sys.argv[1:])}".strip(),
        "date": dt.date.today().isoformat(),
        "rows": rows,
        "environment": environment(detect().to_dict()),
    }
    write_json(given.out / "transformers4.json", result)
    for row in rows:
        print(f"{row['folder']:>40}  {'same' if not row['differs'] else '; '.join(row['differs'])}")
    sys.exit(any(row["differs"] for row in rows))


def _environment(folder: Path) -> Path:
    """A fresh environment with transformers 4 and this environment's torch."""
    from importlib.metadata import version

    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    torch = f"torch=={version('torch').partition('+')[0]}"
    subprocess.run([python, "-m", "pip", "install", "--quiet", torch, *NEEDS], check=True)
    return python


def _version(python: Path) -> str:
    program = "import torch, transformers; print(f'transformers {transformers.__version__}, torch {torch.__version__}')"
    return subprocess.run([python, "-c", program], capture_output=True, text=True, check=True).stdout.strip()


def _merged(work: Path, name: str) -> Path:
    """A tiny model of the architecture, with an adapter merged into it; several stop tokens."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    kind, more, targets = CASES[name]
    here = work / name.replace(" ", "-").replace(",", "")
    tokenizer = _tokenizer(
        composed=kind == "qwen2"
    )  # the newer library gives these NFC, whatever their file says: as theirs have it
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**SIZES, "vocab_size": len(tokenizer), "pad_token_id": 0, **more})
    model = AutoModelForCausalLM.from_config(config)
    model.generation_config.eos_token_id = [0, 5, 2]
    model.save_pretrained(here / "base")
    tokenizer.save_pretrained(here / "base")
    get_peft_model(model, LoraConfig(r=4, target_modules=targets, init_lora_weights=False)).save_pretrained(
        here / "adapter"
    )
    wish = MergeRequest(str(here / "base"), [here / "adapter"], here / "merged", overrides=["merge.dtype=float32"])
    merge_any.merge(wish, Progress())
    return here / "merged"


def _tokenizer(composed: bool) -> Any:
    """One token per byte and three special ones; as PreTrainedTokenizerFast, which the newer library saves under another name."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *alphabet])}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    if composed:
        made.normalizer = normalizers.NFC()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token="<|im_end|>", pad_token="<|endoftext|>", extra_special_tokens=["<|im_start|>"]
    )
    fast.chat_template = TEMPLATE
    return fast


def _run_folders(work: Path) -> dict[str, Path]:
    """A run with a template and a token of its own through export; its base, as it was prepared, among them."""
    from qkit.model import source

    rows = work / "rows.jsonl"
    turns = [
        [{"role": "user", "content": f"say {letter}"}, {"role": "assistant", "content": letter * 3}]
        for letter in "abcdefghij"
    ]
    rows.write_text("".join(json.dumps({"messages": turn}) + "\n" for turn in turns), encoding="utf-8")
    settings = {
        "task": "chat",
        "model": {"source": str(work / "llama" / "base"), "chat_template": "chatml", "add_tokens": ["<tool>"]},
        "data": {
            "train": [{"source": str(rows), "rows": "2:"}],
            "test": [{"source": str(rows), "rows": ":2"}],
            "max_length": 128,
        },
        "quantization": {"load_in_4bit": False},
        "train": {"max_steps": 3, "learning_rate": 1e-2},
        "evaluate": {"max_new_tokens": 4},
        "bench": {"runtimes": ["transformers"]},
        "export": {"formats": ["safetensors", "safetensors-fp16", "vllm", "onnx-fp32"]},
    }
    run = Run.create(work / "run", from_dict(settings, (), "benchmarks/transformers4.py"))
    for stage in ("data", "train", "evaluate", "merge", "export"):
        pipeline.execute(run, stage)
    exports = {f"export {name}": run.folder("export") / name for name in settings["export"]["formats"]}
    prepared = source.resolve(run.recipe.model)
    return {"base with tokens": prepared, "run's merge": run.folder("merge"), **exports}


def _read(python: Path, folders: dict[str, Path]) -> dict[str, Any]:
    done = subprocess.run([python, READER, *map(str, folders.values())], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    return {name: found[str(folder)] for name, folder in folders.items()}


def _compared(folders: dict[str, Path], ours: dict[str, Any], theirs: dict[str, Any]) -> list[dict[str, Any]]:
    rows = []
    for name in folders:
        one, other = ours[name], theirs[name]
        differs = [
            f"{who}: {said['error']}" for who, said in (("ours", one), ("transformers 4", other)) if "error" in said
        ]
        row: dict[str, Any] = {"folder": name, "differs": differs, "logits_off": None}
        if not differs:
            row["differs"] = [
                f"{key}: {one[key]!r} and {other[key]!r}"
                for key in ("ids", "turns", "stop", "dtype")
                if one.get(key) != other.get(key)
            ]
            if "logits" in one:
                row["logits_off"] = _off(one["logits"], other["logits"])
                row["differs"] += [f"logits off by {row['logits_off']:.2g}"] if not row["logits_off"] < CLOSE else []
        rows.append(row)
    return rows


def _off(one: list[float], other: list[float]) -> float:
    """Largest difference of logits, over their standard deviation."""
    mean = sum(one) / len(one)
    spread = (sum((value - mean) ** 2 for value in one) / len(one)) ** 0.5
    return max(abs(a - b) for a, b in zip(one, other, strict=True)) / spread


if __name__ == "__main__":
    main()
