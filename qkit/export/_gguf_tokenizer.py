"""A byte-level BPE tokenizer in GGUF's words."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qkit.template import DEFAULT, OTHERS

if TYPE_CHECKING:
    from gguf import GGUFWriter

FILE = "tokenizer.json"
# How text is cut before merging, and what llama.cpp calls it (src/llama-vocab.cpp, the table of tokenizer_pre).
SPLITS = {
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+": "llama-bpe",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+": "qwen2",
    (
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
        r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
        r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ): "tekken",
}
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # gguf.TokenType
SPECIAL = {"bos_token": "bos", "pad_token": "pad", "unk_token": "unk"}


def unwritten(folder: Path) -> str | None:
    """Why the tokenizer in `folder` cannot be written, or None."""
    if not (folder / FILE).is_file():
        return f"{folder} has no {FILE}; save the tokenizer with `save_pretrained` once"
    tokenizer = _read(folder / FILE)
    if tokenizer["model"].get("type") != "BPE" or tokenizer["model"].get("byte_fallback"):
        return "its tokenizer is no byte-level BPE (it comes from sentencepiece): such are not written by this version"
    if cut(tokenizer) is None:
        return "its tokenizer cuts text in a way that llama.cpp has no name for, or none that is known here"
    return None


def cut(tokenizer: Mapping[str, Any]) -> str | None:
    """llama.cpp's name for how a tokenizer.json cuts text before merging; None when it is not known."""
    outer = tokenizer.get("pre_tokenizer") or {}
    steps = outer.get("pretokenizers", [outer])
    kinds = [step.get("type") for step in steps]
    if kinds[-1] != "ByteLevel" or steps[-1].get("add_prefix_space"):
        return None
    if kinds == ["ByteLevel"] and steps[0].get("use_regex", True):
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits") and steps[1].get("use_regex", True):
        return "smollm"
    if kinds == ["Split", "ByteLevel"] and not steps[1].get("use_regex", True):
        return SPLITS.get(steps[0]["pattern"].get("Regex", ""))
    return None


def add_tokenizer(writer: GGUFWriter, folder: Path, vocabulary: int) -> None:
    """Put tokens, merges, special tokens, stop token and chat template of `folder` into the file's header."""
    tokenizer = _read(folder / FILE)
    tokens, types = _tokens(tokenizer, vocabulary)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(str(cut(tokenizer)))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    merges = tokenizer["model"]["merges"]
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    _special(writer, folder, tokens)
    if templates := templates_of(folder):
        writer.add_chat_template([{"name": name, "template": text} for name, text in templates.items()])


def stops(folder: Path) -> list[int]:
    """Ids of the tokens that end a turn, as the generation config has them."""
    found = _read(folder / "generation_config.json").get("eos_token_id")
    return found if isinstance(found, list) else [] if found is None else [found]


def template_of(folder: Path) -> str | None:
    """The chat template for conversations that offer no tools."""
    return templates_of(folder).get(DEFAULT)


def templates_of(folder: Path) -> dict[str, str]:
    """The chat templates by name, from their own files or from the tokenizer's settings; llama.cpp takes tool_use for tools as well."""
    held = _read(folder / "tokenizer_config.json").get("chat_template")
    listed = held if isinstance(held, list) else [{"name": DEFAULT, "template": held}] if isinstance(held, str) else []
    files = [*folder.glob("chat_template.jinja"), *sorted((folder / OTHERS).glob("*.jinja"))]
    named = {DEFAULT if file.parent == folder else file.stem: file.read_text(encoding="utf-8") for file in files}
    return {one["name"]: one["template"] for one in listed} | named


def _read(file: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return loaded


def _tokens(tokenizer: Mapping[str, Any], vocabulary: int) -> tuple[list[str], list[int]]:
    """Text and type of each id; ids that no token has are unused."""
    tokens, types = [f"[PAD{number}]" for number in range(vocabulary)], [UNUSED] * vocabulary
    for text, number in tokenizer["model"]["vocab"].items():
        tokens[number], types[number] = text, NORMAL
    for added in tokenizer.get("added_tokens", ()):
        tokens[added["id"]] = added["content"]
        types[added["id"]] = CONTROL if added["special"] else USER_DEFINED
    return tokens, types


def _special(writer: GGUFWriter, folder: Path, tokens: list[str]) -> None:
    """Ids of the special tokens. What ends a turn is the generation config's: that is what training ended them with."""
    import tokenizers

    settings = _read(folder / "tokenizer_config.json")
    texts = {
        key: value["content"] if isinstance(value, dict) else value for key, value in settings.items() if key in SPECIAL
    }
    ids = {SPECIAL[key]: tokens.index(text) for key, text in texts.items() if text in tokens}
    for name, number in ids.items():
        getattr(writer, f"add_{name}_token_id")(number)
    for number, name in zip(stops(folder), ("eos", "eot"), strict=False):
        getattr(writer, f"add_{name}_token_id")(number)
    encoded = tokenizers.Tokenizer.from_file(str(folder / FILE)).encode("a").ids
    writer.add_add_bos_token(encoded[0] == ids.get("bos"))
