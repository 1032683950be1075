"""Model folders without weights: what the data stage reads of a model is its tokenizer, its chat template and its config."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from helpers.paths import TEMPLATES


@dataclass(frozen=True)
class Tiny:
    """A byte-level model. `template`: a file in tests/templates, or the template itself; `special`: tokens with no role, only marked special.

    `adds_bos`: the tokenizer writes `bos` before a plain text; `merges`: pairs of tokens that become one; `composes`: it brings text to NFC.
    """

    template: str = "chatml"
    special: tuple[str, ...] = ("<|im_start|>",)
    bos: str | None = None
    eos: str = "<|im_end|>"
    pad: str | None = "<|endoftext|>"
    adds_bos: bool = False
    merges: tuple[tuple[str, str], ...] = ()
    composes: bool = False
    positions: int = 8192

    @property
    def chat_template(self) -> str:
        file = TEMPLATES / f"{self.template}.jinja"
        return file.read_text(encoding="utf-8").removesuffix("\n") if self.template.isidentifier() else self.template


FAMILIES = {
    "chatml": Tiny(),
    "llama2": Tiny("llama2", (), bos="<s>", eos="</s>", pad="<unk>", adds_bos=True),
    "llama3": Tiny(
        "llama3",
        ("<|start_header_id|>", "<|end_header_id|>", "<|end_of_text|>"),
        bos="<|begin_of_text|>",
        eos="<|eot_id|>",
        pad=None,
        adds_bos=True,
    ),
    "mistral": Tiny(
        "mistral",
        (
            "[INST]",
            "[/INST]",
            "[AVAILABLE_TOOLS]",
            "[/AVAILABLE_TOOLS]",
            "[TOOL_CALLS]",
            "[TOOL_RESULTS]",
            "[/TOOL_RESULTS]",
        ),
        bos="<s>",
        eos="</s>",
        pad=None,
        adds_bos=True,
    ),
    "gemma": Tiny("gemma", ("<start_of_turn>", "<end_of_turn>"), bos="<bos>", eos="<eos>", pad="<pad>", adds_bos=True),
    "phi": Tiny(
        "phi", ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"), eos="<|endoftext|>", pad="<|placeholder|>"
    ),
    "qwen3": Tiny("qwen3", composes=True),
    "deepseek": Tiny(
        "deepseek",
        (
            "<｜User｜>",
            "<｜Assistant｜>",
            "<｜tool▁call▁begin｜>",
            "<｜tool▁call▁end｜>",
            "<｜tool▁sep｜>",
            "<｜tool▁output▁begin｜>",
            "<｜tool▁output▁end｜>",
        ),
        bos="<｜begin▁of▁sentence｜>",
        eos="<｜end▁of▁sentence｜>",
        pad="<｜▁pad▁｜>",
        adds_bos=True,
    ),
}


def build(model: Tiny, folder: Path) -> Path:
    """Write the model to a folder."""
    tokenizer = tokenizer_of(model)
    tokenizer.save_pretrained(folder)
    config = {"model_type": "llama", "vocab_size": len(tokenizer), "max_position_embeddings": model.positions}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def tokenizer_of(model: Tiny) -> Any:
    """One token per byte, the merges, and the special tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = list(dict.fromkeys(token for token in (model.bos, model.eos, model.pad, *model.special) if token))
    merged = ["".join(pair) for pair in model.merges]
    vocabulary = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet()), *merged]
    made = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(vocabulary)}, merges=list(model.merges)))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    if model.composes:
        made.normalizer = normalizers.NFC()
    made.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    if model.adds_bos:
        made.post_processor = processors.TemplateProcessing(
            single=f"{model.bos} $A", special_tokens=[(model.bos, vocabulary.index(model.bos))]
        )
    fast = PreTrainedTokenizerFast(tokenizer_object=made, bos_token=model.bos, eos_token=model.eos, pad_token=model.pad)
    fast.chat_template = model.chat_template
    return fast
