"""A byte-level BPE tokenizer in GGUF's words."""

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
STOPS = ("eos", "eot", "eom")  # the places that a header has for what ends an answer
SENTENCEPIECE = "its tokenizer is no byte-level BPE (it comes from sentencepiece): such are not written by this version"
PLAIN = "Steps: 1. Write a plain sentence, as anybody would."
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # gguf.TokenType
SPECIAL = {"bos_token": "bos", "pad_token": "pad", "unk_token": "unk"}


def unwritten(folder: Path) -> str | None:
    """Why the tokenizer in `folder` cannot be written, or None."""
    if not (folder / FILE).is_file():
        return f"{folder} has no {FILE}; save the tokenizer with `save_pretrained` once"
    tokenizer = _read(folder / FILE)
    if tokenizer["model"].get("type") != "BPE" or tokenizer["model"].get("byte_fallback"):
        return SENTENCEPIECE
    if cut(tokenizer) is None:
        return "its tokenizer cuts text in a way that llama.cpp has no name for, or none that is known here"
    return _changes_plain_text(tokenizer)


def _changes_plain_text(tokenizer: Mapping[str, Any]) -> str | None:
    """llama.cpp normalizes nothing: what is done to every text, such as lower case or a space put first, cannot be left out."""
    from tokenizers import Tokenizer

    if not (rule := tokenizer.get("normalizer")):
        return None
    found = Tokenizer.from_str(json.dumps({**tokenizer, "post_processor": None})).normalizer.normalize_str(PLAIN)
    if found == PLAIN:
        return None
    kinds = ", ".join(step["type"] for step in rule.get("normalizers", [rule]))
    return f"its tokenizer makes {found!r} of {PLAIN!r} before it is cut ({kinds}), and llama.cpp changes no text: all prompts would be others"


def cut(tokenizer: Mapping[str, Any]) -> str | None:
    """llama.cpp's name for how a tokenizer.json cuts text before merging; None when it is not known."""
    outer = tokenizer.get("pre_tokenizer") or {}
    steps = outer.get("pretokenizers", [outer])
    return cut_name(steps, bool(tokenizer.get("model", {}).get("ignore_merges")))


def add_tokenizer(writer: GGUFWriter, folder: Path, vocabulary: int) -> None:
    """Put tokens, merges, special tokens, stop tokens and chat template of `folder` into the file's header."""
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


def placed_stops(folder: Path) -> tuple[list[int], list[int]]:
    """The stop tokens that have a place in a header, in its order, and those that llama.cpp will not stop at.

    First the one that the template writes as eos_token, else the first; then those that llama.cpp does not know by their names.
    """
    tokenizer, rows = _read(folder / FILE), int(_read(folder / "config.json")["vocab_size"])
    texts = {number: text for text, number in tokenizer["model"]["vocab"].items()}
    texts |= {added["id"]: added["content"] for added in tokenizer.get("added_tokens", ())}
    wanted = [number for number in stops(folder) if number in texts and number < rows]
    eos = _special_ids(folder, texts).get("eos_token")
    first = [eos] if eos in wanted and "eos_token" in (template_of(folder) or "") else wanted[:1]
    others = sorted((number for number in wanted if number not in first), key=lambda number: texts.get(number) in ENDS)
    ordered = [*(number for number in first if number is not None), *others]
    return ordered[: len(STOPS)], [number for number in ordered[len(STOPS) :] if texts.get(number) not in ENDS]


def _special_ids(folder: Path, texts: Mapping[int, str]) -> dict[str, int]:
    """Ids of the special tokens that tokenizer_config.json names."""
    ids = {text: number for number, text in texts.items()}
    settings = _read(folder / "tokenizer_config.json")
    named = {
        key: value["content"] if isinstance(value, dict) else value
        for key, value in settings.items()
        if key.endswith("_token")
    }
    return {key: ids[text] for key, text in named.items() if isinstance(text, str) and text in ids}


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
    """Text and type of each id; ids that no token has are unused, and tokens that the model has no row for have no place."""
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
    """Ids of the special tokens. What ends a turn is the generation config's: that is what training ended them with."""
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
