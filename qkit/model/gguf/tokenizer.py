"""The tokenizer that a .gguf file describes, as llama.cpp reads it.

The header names how text is cut and lists tokens, their types and merges or scores. transformers knows few of the names, and takes GPT-2's cut
for all others without a word; whole pieces, control tokens in other letters than GPT-2's, bos_token and the space before a text it leaves out.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qkit.core.errors import ModelError
from qkit.model.gguf.header import read_gguf
from qkit.model.gguf.llama_cpp import BYTES, CUTS, ENDS, OWN_CODE, Cut

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # gguf.TokenType
SPECIAL = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}  # in the header, and in transformers
STOPS = ("eos", "eot", "eom")
KEY = "tokenizer.ggml."
TEMPLATE = "tokenizer.chat_template"
RSTRIPPED = ("phi-3", "phi3")  # models of such a name: llama.cpp drops the white space after their control tokens
NOT_RSTRIPPED = ("<unk>", "<s>", "<|endoftext|>")


class Header:
    """What a .gguf file says of its tokenizer."""

    def __init__(self, file: Path):
        self.file = file
        self.all, _ = read_gguf(file, arrays="tokenizer.")
        self.tokens: list[str] = self._get("tokens") or []
        types = self._get("token_type") or [NORMAL] * len(self.tokens)
        self.types = [
            CONTROL if kind == NORMAL and text in ENDS else kind for text, kind in zip(self.tokens, types, strict=True)
        ]
        self.model = str(self._get("model"))
        if not self.tokens:
            raise ModelError(f"{file}: holds no tokenizer; take a .gguf file with one, or the model's folder")

    def _get(self, key: str) -> Any:
        return self.all.get(KEY + key)

    def id(self, name: str) -> int | None:
        """The id of a special token by its name in the header; None where it has none among the tokens."""
        found = self._get(f"{name}_token_id")
        return found if found is not None and found < len(self.tokens) else None

    def flag(self, key: str, default: bool) -> bool:
        found = self._get(key)
        return default if found is None else bool(found)

    @property
    def stops(self) -> list[int]:
        """Ids of the tokens that end an answer: of a sequence, a turn, a message."""
        return list(dict.fromkeys(number for name in STOPS if (number := self.id(name)) is not None))

    @property
    def cut(self) -> Cut:
        """How text is cut before merging.

        Raises:
            ModelError: the header does not say, or names a way that is not known here.
        """
        name = self._get("pre")
        if name in CUTS:
            return CUTS[name]
        if name is None:
            said = "does not say how its tokenizer cuts text (tokenizer.ggml.pre: it was converted before April 2024)"
        elif name in OWN_CODE:
            said = f"names the pre-tokenizer {name!r}, for which llama.cpp has code of its own"
        else:
            said = f"names the pre-tokenizer {name!r}, which is not known here"
        raise ModelError(
            f"{self.file}: {said}; with another cut all texts would be trained on in other tokens than those of the model. "
            "Take a newer conversion, or model.source with the folder or hub id that the file was made from"
        )

    @property
    def template(self) -> str | dict[str, str] | None:
        """The chat template; where there are several, all by their names."""
        own = self.all.get(TEMPLATE)
        named = {name: self.all[f"{TEMPLATE}.{name}"] for name in self.all.get(f"{TEMPLATE}s") or ()}
        return {**({"default": own} if own else {}), **named} if named else own


def build(file: Path, served: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a .gguf file; `served`: as llama.cpp's own patterns cut, where they are not those that models were trained with.

    Raises:
        ModelError: it is of a kind, or cuts text in a way, that cannot be built.
    """
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    header = Header(file)
    made = {"llama": _sentencepiece, "gpt2": _byte_pairs, "gemma4": _byte_pairs}.get(header.model)
    if made is None:
        raise ModelError(
            f"{file}: its tokenizer is of the kind {header.model!r} (tokenizer.ggml.model); those of decoders that are read are gpt2, llama "
            "and gemma4. Give model.source the folder or hub id that the file was made from"
        )
    description = made(header)
    if served and header.model == "gpt2" and header.cut.served:
        description["pre_tokenizer"]["pretokenizers"] = [dict(step) for step in header.cut.served]
    try:
        backend = Tokenizer.from_str(json.dumps(description))
    except Exception as error:  # the bindings raise Exception itself
        raise ModelError(f"{file}: its tokenizer cannot be built ({error}); download it again") from None
    special = {
        f"{name}_token": header.tokens[number]
        for key, name in SPECIAL.items()
        if (number := header.id(key)) is not None
    }
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, clean_up_tokenization_spaces=False, model_max_length=_longest(header), **special
    )
    tokenizer.chat_template = header.template
    return tokenizer


def _longest(header: Header) -> int:
    return int(header.all.get(f"{header.all.get('general.architecture')}.context_length") or 10**30)


def _described(header: Header, model: Mapping[str, Any], begins: bool, ends: bool, **parts: Any) -> dict[str, Any]:
    """A tokenizer.json."""
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": list(_added(header)),
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": _around(header, begins, ends),
        **parts,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {text: number for number, text in enumerate(header.tokens[: _last(header) + 1])},
            **model,
        },
    }


def _last(header: Header) -> int:
    """The last id that is a token. Rows that pad the embedding have a name in the file, and come after all tokens."""
    fillers = zip(header.types, header.tokens, strict=True)
    real = [number for number, (kind, text) in enumerate(fillers) if kind != UNUSED or text != f"[PAD{number}]"]
    return real[-1]


def _added(header: Header) -> Iterator[dict[str, Any]]:
    """Tokens that are found in a text before it is cut. llama.cpp knows by the model's name which of them take the white space after them."""
    strips = any(name in str(header.all.get("general.name", "")).lower() for name in RSTRIPPED)
    for number, (text, kind) in enumerate(zip(header.tokens, header.types, strict=True)):
        if kind in (UNKNOWN, CONTROL, USER_DEFINED):
            yield {
                "id": number,
                "content": text,
                "single_word": False,
                "lstrip": False,
                "rstrip": strips and text not in NOT_RSTRIPPED,
                "normalized": False,
                "special": kind != USER_DEFINED,
            }


def _around(header: Header, begins: bool, ends: bool) -> dict[str, Any] | None:
    """What is put before and after every text."""
    bos, eos = (header.id(name) if wanted else None for name, wanted in (("bos", begins), ("eos", ends)))
    named = {header.tokens[number]: number for number in (bos, eos) if number is not None}
    if not named:
        return None

    def special(number: int | None) -> list[dict[str, Any]]:
        return [] if number is None else [{"SpecialToken": {"id": header.tokens[number], "type_id": 0}}]

    text = {letter: {"Sequence": {"id": letter, "type_id": 0}} for letter in "AB"}
    return {
        "type": "TemplateProcessing",
        "single": [*special(bos), text["A"], *special(eos)],
        "pair": [*special(bos), text["A"], *special(eos), *special(bos), text["B"], *special(eos)],
        "special_tokens": {name: {"id": name, "ids": [number], "tokens": [name]} for name, number in named.items()},
    }


def _byte_pairs(header: Header) -> dict[str, Any]:
    """Byte pair encoding with the file's own merges."""
    cut = CUTS["gemma4"] if header.model == "gemma4" else header.cut
    merges = list(_written_merges(header))
    # llama.cpp: line ends that are one token are taken as it, and bos_token comes first whatever is said
    gemma = cut is CUTS["gemma4"]
    begins = header.flag("add_bos_token", cut.begins) or gemma
    own = [merge for merge in merges if "\n" in merge[0]]
    lines = [merge for merge in _line_ends(header) if merge not in own] if gemma else []
    return _described(
        header,
        {"merges": [*merges, *lines], "ignore_merges": cut.whole, "byte_fallback": cut.raw},
        begins,
        header.flag("add_eos_token", False),
        normalizer=SPACES if cut.raw else None,
        pre_tokenizer={"type": "Sequence", "pretokenizers": [dict(step) for step in cut.steps]},
        decoder=_decoder(prefixed=False) if cut.raw else dict(BYTES),
    )


def _written_merges(header: Header) -> Iterator[list[str]]:
    """The file's merges.

    Raises:
        ModelError: one is of tokens that the file does not have.
    """
    known = set(header.tokens)
    for merge in header.all.get(f"{KEY}merges") or ():
        at = merge.find(" ", 1)
        first, second = merge[:at], merge[at + 1 :]
        if at < 1 or not {first, second, first + second} <= known:
            raise ModelError(
                f"{header.file}: its tokenizer has a merge of tokens that it does not have ({merge!r}); download it again"
            )
        yield [first, second]


def _line_ends(header: Header) -> list[list[str]]:
    """Merges that make a token of so many line ends of any two parts."""
    runs = sorted(len(text) for text in header.tokens if text and not text.strip("\n"))
    return [["\n" * first, "\n" * (size - first)] for size in runs for first in runs if size - first in runs]


SPACES = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}


def _sentencepiece(header: Header) -> dict[str, Any]:
    """Pairs are merged by the score of what they make. The space before a text comes again after each token that is found whole."""
    prefixed = header.flag("add_space_prefix", True)
    first = [{"type": "Prepend", "prepend": "▁"}] if prefixed else []
    unknown = header.id("unknown") or 0
    return _described(
        header,
        {
            "merges": _merges(header),
            "byte_fallback": True,
            "fuse_unk": True,
            "unk_token": header.tokens[unknown],
        },
        header.flag("add_bos_token", True),
        header.flag("add_eos_token", False),
        normalizer={"type": "Sequence", "normalizers": [*first, SPACES]},
        decoder=_decoder(prefixed),
    )


def _decoder(prefixed: bool) -> dict[str, Any]:
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefixed else []
    back = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    return {"type": "Sequence", "decoders": [back, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip]}


def _merges(header: Header) -> list[list[str]]:
    """Every way to make a token of two others, the best score first."""
    scores: Sequence[float] = header.all.get(f"{KEY}scores") or ()
    if len(scores) < len(header.tokens):
        raise ModelError(f"{header.file}: its tokenizer has no scores for its tokens; download it again")
    made = {text for text, kind in zip(header.tokens, header.types, strict=True) if kind == NORMAL}
    ordered = sorted(
        (number for number, text in enumerate(header.tokens) if text in made and len(text) > 1),
        key=lambda number: (-scores[number], number),
    )
    texts = (header.tokens[number] for number in ordered)
    return [
        [text[:at], text[at:]]
        for text in texts
        for at in range(1, len(text))
        if text[:at] in made and text[at:] in made
    ]
