"""Builds the tokenizer that a .gguf file describes, as llama.cpp reads it.

The header names the pre-tokenizer and lists tokens, their types, and merges or scores. transformers knows few of the names and silently uses
GPT-2's for all others; it also ignores whole pieces, control tokens outside GPT-2's alphabet, bos_token, and the space before a text.
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
RSTRIPPED = ("phi-3", "phi3")  # in a model's name: llama.cpp drops the white space after its control tokens
NOT_RSTRIPPED = ("<unk>", "<s>", "<|endoftext|>")


class Header:
    """The tokenizer part of a .gguf header.

    Raises:
        ModelError: the file holds no tokenizer, or its lists contradict each other.
    """

    def __init__(self, file: Path):
        self.file = file
        self.all, _ = read_gguf(file, arrays="tokenizer.")
        self.tokens: list[str] = self._get("tokens") or []
        if not self.tokens:
            raise ModelError(
                f"{file}: contains no tokenizer; use a .gguf file with one, or the model's folder", source=file
            )
        types = self._get("token_type") or [NORMAL] * len(self.tokens)
        self._check_lists(types)
        self.types = [
            CONTROL if kind == NORMAL and text in ENDS else kind for text, kind in zip(self.tokens, types, strict=True)
        ]
        self.model = str(self._get("model"))

    def _check_lists(self, types: Sequence[int]) -> None:
        if len(types) != len(self.tokens):
            raise self.damaged(f"{len(self.tokens)} tokens and {len(types)} token types (tokenizer.ggml.token_type)")
        ids: dict[str, int] = {}
        for number, text in enumerate(self.tokens):
            if text and text in ids:  # llama.cpp gives empty tokens names of their own
                raise self.damaged(f"the token {text!r} twice, as {ids[text]} and {number}")
            ids[text] = number

    def damaged(self, contents: str) -> ModelError:
        return ModelError(
            f"{self.file}: its tokenizer lists {contents}; download the file again, or set model.source to the folder or hub id that it was "
            "made from",
            source=self.file,
        )

    def _get(self, key: str) -> Any:
        return self.all.get(KEY + key)

    def id(self, name: str) -> int | None:
        """The id of a special token by its name in the header; None if it is missing or beyond the tokens."""
        number = self._get(f"{name}_token_id")
        return number if number is not None and number < len(self.tokens) else None

    def flag(self, key: str, default: bool) -> bool:
        value = self._get(key)
        return default if value is None else bool(value)

    @property
    def stops(self) -> list[int]:
        """Ids of the tokens that end an answer: end of sequence, of turn, of message."""
        return list(dict.fromkeys(number for name in STOPS if (number := self.id(name)) is not None))

    @property
    def cut(self) -> Cut:
        """The pre-tokenizer: how text is split before merging.

        Raises:
            ModelError: the header names none, or one that qkit does not know.
        """
        name = self._get("pre")
        if name in CUTS:
            return CUTS[name]
        if name is None:
            problem = "names no pre-tokenizer (tokenizer.ggml.pre is missing: it was converted before April 2024)"
        elif name in OWN_CODE:
            problem = f"names the pre-tokenizer {name!r}, for which llama.cpp has code of its own"
        else:
            problem = f"names the pre-tokenizer {name!r}, which qkit does not know"
        raise ModelError(
            f"{self.file}: {problem}; with another pre-tokenizer every text would become other tokens than the model knows. "
            "Use a newer conversion, or set model.source to the folder or hub id that the file was made from",
            source=self.file,
        )

    @property
    def template(self) -> str | dict[str, str] | None:
        """The chat template; if there are several, all of them by name."""
        own = self.all.get(TEMPLATE)
        named = {name: self.all[f"{TEMPLATE}.{name}"] for name in self.all.get(f"{TEMPLATE}s") or ()}
        return {**({"default": own} if own else {}), **named} if named else own


def build(file: Path, served: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a .gguf file. `served`: with llama.cpp's own patterns, which for some models differ from those of training.

    Raises:
        ModelError: its kind or its pre-tokenizer cannot be built.
    """
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    header = Header(file)
    describe = {"llama": _sentencepiece, "gpt2": _byte_pairs, "gemma4": _byte_pairs}.get(header.model)
    if describe is None:
        raise ModelError(
            f"{file}: its tokenizer is of the kind {header.model!r} (tokenizer.ggml.model); the supported kinds are gpt2, llama and gemma4. "
            "Set model.source to the folder or hub id that the file was made from",
            source=file,
        )
    description = describe(header)
    if served and header.model == "gpt2" and header.cut.served:
        description["pre_tokenizer"]["pretokenizers"] = [dict(step) for step in header.cut.served]
    try:
        backend = Tokenizer.from_str(json.dumps(description))
    except Exception as error:  # the bindings raise Exception itself
        raise ModelError(f"{file}: its tokenizer cannot be built ({error}); download it again", source=file) from None
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
    """The last id that is a token. Rows that pad the embedding are named [PAD<id>] and come after all tokens.

    Raises:
        ModelError: there are only such rows.
    """
    for number in reversed(range(len(header.tokens))):
        if header.types[number] != UNUSED or header.tokens[number] != f"[PAD{number}]":
            return number
    raise header.damaged("only padding")


def _added(header: Header) -> Iterator[dict[str, Any]]:
    """Tokens that are matched before the text is split. llama.cpp decides by the model's name whether they take the space that follows."""
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
    """The tokens added before and after every text."""
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
    # llama.cpp takes line ends that are one token as that token, and always adds bos_token
    gemma = cut is CUTS["gemma4"]
    begins = header.flag("add_bos_token", cut.begins) or gemma
    written = [merge for merge in merges if "\n" in merge[0]]
    lines = [merge for merge in _line_ends(header) if merge not in written] if gemma else []
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
        ModelError: a merge uses a token that is missing.
    """
    known = set(header.tokens)
    for merge in header.all.get(f"{KEY}merges") or ():
        at = merge.find(" ", 1)
        first, second = merge[:at], merge[at + 1 :]
        if at < 1 or not {first, second, first + second} <= known:
            raise ModelError(
                f"{header.file}: its tokenizer has a merge of tokens that it lacks ({merge!r}); download the file again",
                source=header.file,
            )
        yield [first, second]


def _line_ends(header: Header) -> list[list[str]]:
    """Merges of any two runs of line ends into a longer run that is a token."""
    runs = sorted(len(text) for text in header.tokens if text and not text.strip("\n"))
    return [["\n" * first, "\n" * (size - first)] for size in runs for first in runs if size - first in runs]


SPACES = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}


def _sentencepiece(header: Header) -> dict[str, Any]:
    """Pairs are merged by the score of the result. The space before a text is repeated after each token that is matched whole."""
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
    """Every pair of tokens that makes a token, the best score first."""
    scores: Sequence[float] = header.all.get(f"{KEY}scores") or ()
    if len(scores) < len(header.tokens):
        raise ModelError(
            f"{header.file}: its tokenizer has {len(scores)} scores for {len(header.tokens)} tokens; download the file again",
            source=header.file,
        )
    normal = {text for text, kind in zip(header.tokens, header.types, strict=True) if kind == NORMAL}
    ordered = sorted(
        (number for number, text in enumerate(header.tokens) if text in normal and len(text) > 1),
        key=lambda number: (-scores[number], number),
    )
    texts = (header.tokens[number] for number in ordered)
    return [
        [text[:at], text[at:]]
        for text in texts
        for at in range(1, len(text))
        if text[:at] in normal and text[at:] in normal
    ]
