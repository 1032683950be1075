"""Writes a byte-level BPE tokenizer into a GGUF header."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qkit.chat.template import DEFAULT, OTHERS
from qkit.model.gguf.llama_cpp import ENDS, cut_name

if TYPE_CHECKING:
    from gguf import GGUFWriter


FILE = "tokenizer.json"
STOPS = ("eos", "eot", "eom")  # the header's keys for tokens that end an answer
SENTENCEPIECE = "its tokenizer is not a byte-level BPE (it comes from sentencepiece), which is not supported"
PLAIN = "Steps: 1. Write a plain sentence."
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # gguf.TokenType
SPECIAL = {"bos_token": "bos", "pad_token": "pad", "unk_token": "unk"}


def unwritten(folder: Path) -> str | None:
    """Return why the tokenizer in `folder` cannot be written, or None."""
    if not (folder / FILE).is_file():
        return f"{folder} has no {FILE}; create it with the tokenizer's `save_pretrained`"
    tokenizer = _read(folder / FILE)
    if tokenizer["model"].get("type") != "BPE" or tokenizer["model"].get("byte_fallback"):
        return SENTENCEPIECE
    if cut(tokenizer) is None:
        return "llama.cpp has no known name for the way in which its tokenizer splits text"
    return _changes_plain_text(tokenizer)


def _changes_plain_text(tokenizer: Mapping[str, Any]) -> str | None:
    """Return why the normalizer cannot be dropped, or None. llama.cpp has none, so one that changes every text makes all prompts differ."""
    from tokenizers import Tokenizer

    if not (rule := tokenizer.get("normalizer")):
        return None
    normalized = Tokenizer.from_str(json.dumps({**tokenizer, "post_processor": None})).normalizer.normalize_str(PLAIN)
    if normalized == PLAIN:
        return None
    kinds = ", ".join(step["type"] for step in rule.get("normalizers", [rule]))
    return f"its tokenizer changes {PLAIN!r} to {normalized!r} before splitting ({kinds}), and llama.cpp does not: all prompts would differ"


def cut(tokenizer: Mapping[str, Any]) -> str | None:
    """Return llama.cpp's name for the way in which a tokenizer.json splits text before merging; None if it is unknown."""
    outer = tokenizer.get("pre_tokenizer") or {}
    steps = outer.get("pretokenizers", [outer])
    return cut_name(steps, bool(tokenizer.get("model", {}).get("ignore_merges")))


def add_tokenizer(writer: GGUFWriter, folder: Path, vocabulary: int) -> None:
    """Write tokens, merges, special tokens, stop tokens and chat templates of `folder` into the header. `vocabulary`: rows of the embedding."""
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
    """Return the ids of the tokens that end a turn, from the generation config."""
    ids = _read(folder / "generation_config.json").get("eos_token_id")
    return ids if isinstance(ids, list) else [] if ids is None else [ids]


def placed_stops(folder: Path) -> tuple[list[int], list[int]]:
    """Return the stop tokens that fit into a header, in its order, and those that llama.cpp will not stop at.

    The first is the one that the template writes as eos_token, if any. Tokens that llama.cpp recognizes by their text come last.
    """
    tokenizer, rows = _read(folder / FILE), int(_read(folder / "config.json")["vocab_size"])
    texts = {number: text for text, number in tokenizer["model"]["vocab"].items()}
    texts |= {added["id"]: added["content"] for added in tokenizer.get("added_tokens", ())}
    present = [number for number in stops(folder) if number in texts and number < rows]
    eos = _special_ids(folder, texts).get("eos_token")
    first = [eos] if eos in present and "eos_token" in (template_of(folder) or "") else present[:1]
    others = sorted((number for number in present if number not in first), key=lambda number: texts.get(number) in ENDS)
    ordered = [*(number for number in first if number is not None), *others]
    return ordered[: len(STOPS)], [number for number in ordered[len(STOPS) :] if texts.get(number) not in ENDS]


def _special_ids(folder: Path, texts: Mapping[int, str]) -> dict[str, int]:
    """Return the ids of the special tokens that tokenizer_config.json names."""
    ids = {text: number for number, text in texts.items()}
    settings = _read(folder / "tokenizer_config.json")
    named = {
        key: value["content"] if isinstance(value, dict) else value
        for key, value in settings.items()
        if key.endswith("_token")
    }
    return {key: ids[text] for key, text in named.items() if isinstance(text, str) and text in ids}


def template_of(folder: Path) -> str | None:
    """Return the chat template for conversations without tools."""
    return templates_of(folder).get(DEFAULT)


def templates_of(folder: Path) -> dict[str, str]:
    """Return the chat templates by name, from their files or from the tokenizer's settings; llama.cpp also uses `tool_use`, for tools."""
    value = _read(folder / "tokenizer_config.json").get("chat_template")
    listed = (
        value if isinstance(value, list) else [{"name": DEFAULT, "template": value}] if isinstance(value, str) else []
    )
    files = [*folder.glob("chat_template.jinja"), *sorted((folder / OTHERS).glob("*.jinja"))]
    in_files = {DEFAULT if file.parent == folder else file.stem: file.read_text(encoding="utf-8") for file in files}
    return {one["name"]: one["template"] for one in listed} | in_files


def _read(file: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return loaded


def _tokens(tokenizer: Mapping[str, Any], vocabulary: int) -> tuple[list[str], list[int]]:
    """Return the text and type of each id. Ids without a token are unused; tokens without a row in the embedding are left out."""
    tokens, types = [f"[PAD{number}]" for number in range(vocabulary)], [UNUSED] * vocabulary
    for text, number in tokenizer["model"]["vocab"].items():
        if number < vocabulary:
            tokens[number], types[number] = text, NORMAL
    for added in tokenizer.get("added_tokens", ()):
        if added["id"] >= vocabulary:
            continue
        tokens[added["id"]] = added["content"]
        types[added["id"]] = CONTROL if added["special"] else USER_DEFINED
    return tokens, types


def _special(writer: GGUFWriter, folder: Path, tokens: list[str]) -> None:
    """Write the ids of the special tokens. The stop tokens are those of the generation config, which training ended turns with."""
    import tokenizers

    settings = _read(folder / "tokenizer_config.json")
    texts = {
        key: value["content"] if isinstance(value, dict) else value for key, value in settings.items() if key in SPECIAL
    }
    ids = {SPECIAL[key]: tokens.index(text) for key, text in texts.items() if text in tokens}
    for name, number in ids.items():
        getattr(writer, f"add_{name}_token_id")(number)
    placed, _ = placed_stops(folder)
    for number, name in zip(placed, STOPS, strict=False):
        getattr(writer, f"add_{name}_token_id")(number)
    encoded = tokenizers.Tokenizer.from_file(str(folder / FILE)).encode("a").ids
    writer.add_add_bos_token(encoded[0] == ids.get("bos"))
    writer.add_add_eos_token(bool(placed) and encoded[-1] == placed[0])
