"""Tiny models with a tokenizer of words, texts whose label a word decides, and a recipe that trains on them in seconds."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from helpers.tiny_encoders import ENCODERS
from qkit.recipe.load import load
from qkit.run.directory import Run

if TYPE_CHECKING:
    from qkit.core.progress import Progress

SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")
TELLING = ("apple", "pear", "plum")
FILLING = tuple(f"{first}{last}" for first in "bdfgk" for last in ("an", "en", "in", "on", "un", "ar", "er", "or"))
WORDS = (*TELLING, *FILLING)
LABELS = ("fruit", "tree", "wood")
LLAMA = {
    "vocab_size": 99,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def build_tokenizer(pairs: bool = True, **special: str | None) -> Any:
    """One token per word, <s> and </s> around a text. `pairs`: the second text of a pair has token types of its own."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: number for number, word in enumerate((*SPECIAL, *WORDS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B:1 </s>:1", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", **special}
    inputs = ["input_ids", *(["token_type_ids"] if pairs else []), "attention_mask"]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_input_names=inputs, **{k: v for k, v in names.items() if v is not None}
    )


def build_model(folder: Path, kind: str, head: str = "AutoModel", dtype: str = "float32", **changes: Any) -> Path:
    """A body with random weights and its tokenizer. `head`: the class it is saved as; BERT has no pooler as AutoModelForMaskedLM."""
    import torch
    import transformers

    sizes = LLAMA if kind == "llama" else ENCODERS[kind]
    config = transformers.AutoConfig.for_model(kind, **{**sizes, **changes})
    torch.manual_seed(0)
    getattr(transformers, head).from_config(config).to(getattr(torch, dtype)).save_pretrained(folder)
    build_tokenizer(pairs=kind == "bert").save_pretrained(folder)
    return folder


def text(number: int) -> str:
    """A text of 3 to 9 words; that of `number` is no other's, and one of its words decides its label."""
    filling = [FILLING[(number * step + step) % len(FILLING)] for step in range(1, 3 + number % 7)]
    place = number % (len(filling) + 1)
    return " ".join([*filling[:place], TELLING[number % 3], *filling[place:]])


def labelled_rows(count: int) -> list[dict[str, Any]]:
    """Texts of three labels, as many of each."""
    return [{"text": text(number), "label": LABELS[number % 3]} for number in range(count)]


def write_rows(file: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    """Rows as JSON lines."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def settings(folder: Path, rows: Path, held_out: int = 24, **sections: Any) -> dict[str, Any]:
    """A whole recipe; `sections` change it. `held_out`: the first rows, which are not trained on."""
    whole: dict[str, Any] = {
        "task": "classify",
        "model": {"source": str(folder)},
        "data": {
            "train": [{"source": str(rows), "rows": f"{held_out}:"}],
            "test": [{"source": str(rows), "rows": f":{held_out}"}] if held_out else [],
            "max_length": 32,
            "batch_tokens": 128,
        },
        "train": {"max_steps": 12, "learning_rate": 1e-2, "save_steps": 4},
        "export": {"formats": []},
    }
    if sections.get("method", "lora") == "lora":
        whole["lora"] = {"r": 4, "lora_alpha": 8}
    for name, section in sections.items():
        whole[name] = {**whole.get(name, {}), **section} if isinstance(section, dict) else section
    return whole


def labelled_run(root: Path, folder: Path, progress: Progress | None = None, rows: Any = None, **sections: Any) -> Run:
    """A run directory for a recipe on the model in `folder`; nothing has been run. `rows`: 96 of `labelled_rows` if None."""
    file = write_rows(root / "rows.jsonl", labelled_rows(96) if rows is None else rows)
    (root / "recipe.yaml").write_text(yaml.safe_dump(settings(folder, file, **sections)), encoding="utf-8")
    return Run.create(root / "run", load(root / "recipe.yaml"), progress)
