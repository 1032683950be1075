"""Definitions that llama.cpp keeps in its code and a GGUF header only names: pre-tokenizers, and tokens that end an answer.

Source: ggml-org/llama.cpp, src/llama-vocab.cpp and src/unicode.cpp as of November 2026. llama.cpp adapts some regular expressions of
tokenizer.json to std::regex and quotes the original in a comment. This module uses the original, because models were trained with it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np


SplitStep = Mapping[str, Any]  # one step of a pre-tokenizer, in the form of tokenizer.json


WORDS: SplitStep = {
    "type": "ByteLevel",
    "add_prefix_space": False,
    "trim_offsets": True,
    "use_regex": True,
}  # as in GPT-2
BYTES: SplitStep = {**WORDS, "use_regex": False}
DIGITS: SplitStep = {"type": "Digits", "individual_digits": True}


@dataclass(frozen=True)
class Cut:
    """How a pre-tokenizer splits text before merging.

    `whole`: a piece that is a token is not merged again. `begins`: text begins with bos_token if the header does not say. `raw`: tokens are
    text with ▁ for a space, not GPT-2's byte alphabet. `served`: the steps of llama.cpp, if they differ from `steps`.
    """

    steps: tuple[SplitStep, ...]
    whole: bool = False
    begins: bool = False
    raw: bool = False
    served: tuple[SplitStep, ...] = ()


def _split(pattern: str) -> SplitStep:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def _cut(*patterns: str) -> Cut:
    """Apply the patterns in order. Matches are pieces, and so is the text between them."""
    return Cut((*map(_split, patterns), BYTES))


_GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_SIGNS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_SPACE = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = (rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+", rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*")
# In llama.cpp only ASCII letters have case, and marks are not letters: "aÉ" is one piece, and a Hindi word is several.
_SERVED_CASED = (
    r"[^\r\n\p{L}\p{N}]?((?=\p{L})[^a-z])*((?=\p{L})[^A-Z])+",
    r"[^\r\n\p{L}\p{N}]?((?=\p{L})[^a-z])+((?=\p{L})[^A-Z])*",
)
_LLAMA3 = rf"{_SHORT}|{_WORD}|\p{{N}}{{1,3}}|{_SIGNS}|{_SPACE}"
_QWEN2 = rf"{_SHORT}|{_WORD}|\p{{N}}|{_SIGNS}|{_SPACE}"
_CASED_SHORT = f"{_CASED[0]}{_SHORT}?|{_CASED[1]}{_SHORT}?"
_GPT4O = rf"%s|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACE}"
_TEKKEN = rf"%s|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACE}"
_WIDE_SPACE = "|".join(rf"\s{{{2**n}}}(?!\S)" for n in range(9, 1, -1)) + r"|\s{1,2}(?!\S)|\s{1}"
_HAN_KANA = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
_PUNCTUATED = r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
_DEEPSEEK3 = rf"{_PUNCTUATED}| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_SPACE}"
_HAN_HANGUL = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
_DEEPSEEK_LETTERS = (
    r"\s?["
    "A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373\u0376"
    "\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f\u0531-"
    "\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77\u1d79-\u1d9a"
    "\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d\u1f80-\u1fb4"
    "\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc"
    "\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f"
    "\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b"
    "\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a"
    "\U00010400-\U0001044f\U000104b0-\U000104d3\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2"
    "\U000118a0-\U000118df\U0001e900-\U0001e943"
    "]+"
)
_AFMOE_DIGITS = r"\p{N}{1,2}(?=(?:\p{N}{3})+(?!\p{N}))|\p{N}{3}|\p{N}{1,2}"
_AFMOE_ASIA = (
    "[\u4e00-\u9fff\u3400-\u4dbf\uf900-\ufaff\u3040-\u309f\u30a0-\u30ff\uff65-\uff9f\u2f00-\u2fdf\u0e40-\u0e7f"
    "\u0e80-\u0eff\u1780-\u17ff\u1000-\u109f\uaa60-\uaa7f\ua9e0-\ua9ff\uac00-\ud7af\u1100-\u11ff]+"
)
_YOUTU_ASIA = (
    "[\uac00-\ud7a3\u3131-\u318e]+|[\uff01\u2026\u201c\u201d\u2018\u2019\u2014\uff1a\uff1b\uff0c\u3001-\u303f"
    "\ufe30-\ufe4f]+|[\u3105-\u312f]+|[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
)
_BLOOM = r" ?[^(\s|.,!?" "\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c" ")]+"


_GPT2 = Cut((WORDS,))
_ONE_DIGIT = Cut((DIGITS, WORDS))
_BPE_LLAMA3 = replace(_cut(_LLAMA3), whole=True, begins=True)


# If several names have the same definition, an exported file gets the first one.
CUTS: Mapping[str, Cut] = {
    **dict.fromkeys(("gpt-2", "phi-2", "jina-es", "jina-de", "gigachat", "jina-v2-es", "jina-v2-de", "a.x-4.0"), _GPT2),
    **dict.fromkeys(("mellum", "modern-bert", "jina-v1-en", "jina-v2-code", "roberta-bpe", "mpt", "olmo"), _GPT2),
    **dict.fromkeys(("jais", "trillion", "granite-docling", "exaone4"), _GPT2),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone"), _ONE_DIGIT),
    **dict.fromkeys(("minerva-7b", "mellum2"), _ONE_DIGIT),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral"), _BPE_LLAMA3),
    **dict.fromkeys(("midm-2.0", "lfm2", "jina-v5-nano"), _BPE_LLAMA3),
    **dict.fromkeys(("dbrx", "smaug-bpe", "chatglm-bpe"), _cut(_LLAMA3)),
    "glm4": replace(_cut(_LLAMA3), whole=True),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "kormo", "f2llmv2", "megrez", "stablelm2"), _cut(_QWEN2)),
    **dict.fromkeys(("hunyuan", "solar-open", "grok-2"), _cut(_QWEN2)),
    "qwen35": _cut(
        rf"{_SHORT}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_SPACE}"
    ),
    "tekken": replace(
        _cut(_TEKKEN % "|".join(_CASED)), whole=True, begins=True, served=_cut(_TEKKEN % "|".join(_SERVED_CASED)).steps
    ),
    **dict.fromkeys(
        ("gpt-4o", "llama4", "kanana2", "talkie", "minimax-m2"),
        replace(
            _cut(_GPT4O % _CASED_SHORT),
            served=_cut(_GPT4O % f"{_SERVED_CASED[0]}{_SHORT}?|{_SERVED_CASED[1]}{_SHORT}?").steps,
        ),
    ),
    "granite-embed-multi-97m": replace(_cut(_GPT4O % _CASED_SHORT), whole=True),
    **dict.fromkeys(("tiny_aya", "cohere2moe"), _cut(r"\d{1,3}(?=(?:\d{3})*\b)", _GPT4O % _CASED_SHORT)),
    "jais-2": _cut(rf"{_SHORT}|{_WORD}|\p{{N}}{{1,3}}|{_SIGNS}|\s*[\r\n]+|{_WIDE_SPACE}"),
    "deepseek-llm": _cut(
        r"[\r\n]",
        _DEEPSEEK_LETTERS,
        r"\s?[!-/:-~" "\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002" "]+",
        r"\s+$",
        _HAN_HANGUL,
        r"\p{N}+",
    ),
    "deepseek-coder": _cut(r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _HAN_HANGUL, r"\p{N}"),
    **dict.fromkeys(("deepseek-v3", "hunyuan-dense", "joyai-llm", "hy_v4"), _cut(r"\p{N}{1,3}", _HAN_KANA, _DEEPSEEK3)),
    "spark2_5": _cut(r"\p{N}{1,3}", _HAN_KANA, rf"{_PUNCTUATED}| ?[\p{{P}}\p{{S}}]+|[\r\n]|\s+(?!\S)|\s+", r"\p{N}"),
    "youtu": replace(_cut(_YOUTU_ASIA, rf"{_CASED_SHORT}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACE}"), whole=True),
    "falcon": _cut(r"[\p{P}\$\+<=>\^~\|`]+", _GPT2_WORDS, "[0-9][0-9][0-9]"),
    **dict.fromkeys(("bloom", "poro-chat", "gpt3-finnish"), _cut(_BLOOM)),
    "viking": _cut(_BLOOM, r"\p{N}"),
    **dict.fromkeys(
        ("bailingmoe", "bailingmoe2", "llada-moe"),
        _cut(
            r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
        ),
    ),
    "seed-coder": _cut(rf"{_SHORT}|{_WORD}|\p{{N}}{{1}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_SPACE}"),
    "ufakzeka": _cut(rf"{_WORD}|\p{{N}}|{_SIGNS}|{_SPACE}"),
    "afmoe": _cut(_AFMOE_DIGITS, _AFMOE_ASIA, _DEEPSEEK3),
    "laguna": _cut(r"[^\n]+|[\n]+", _QWEN2),
    "exaone-moe": _cut(
        rf"{_SHORT}|[^\r\n\p{{L}}\p{{N}}]?(?:\p{{L}}\p{{M}}*(?: \p{{L}}\p{{M}}*)*)+|\p{{N}}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+"
    ),
    "minicpm5": replace(_cut(r"\p{N}{1,3}", rf"{_SHORT}|{_WORD}|\p{{N}}+|{_SIGNS}|{_SPACE}"), whole=True),
    "chameleon": replace(
        _cut(
            "<sentinel:[0-9]+>",
            "(IMGIMG)((A|B|C|D|E|F|G|H|I){1,4})Z",
            r"([\t\n]|    |  )",
            r"\p{N}",
            r"[\p{P}!-/:-@\[-`{-~]",
            _GPT2_WORDS,
        ),
        begins=True,
    ),
    "superbpe": _cut(r"\p{N}+", r"(?=(\d{3})+(?!\d))"),
    "gemma4": Cut((_split(r"[^\n]+|[\n]+"),), raw=True, begins=True),
    "sarvam-moe": Cut((_split(r"[^\n]+|[\n]+"),), raw=True),
    "default": _cut(r"[\p{P}\$\+<=>\^~\|]+", _GPT2_WORDS, r"\p{N}+", "[0-9][0-9][0-9]"),
}


ROPE_FACTORS = "rope_freqs.weight"  # the tensor with Llama 3.1's position scaling


# Names that llama.cpp implements in code; they are not supported here.
OWN_CODE = ("kimi-k2", "granite-embed-multi-311m", "whitespace")


# Tokens that end an answer in llama.cpp regardless of the header. A token with such a name is treated as a control token.
ENDS = frozenset(
    (
        *("<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<end_of_turn>"),
        *("<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>"),
        *(
            "<end_of_utterance>",
            "<eos>",
            "<turn|>",
            "<|tool_response>",
            "<\uff5cend\u2581of\u2581sentence\uff5c>",
            "[e~[",
        ),
    )
)


def cut_name(steps: Sequence[SplitStep], whole: bool) -> str | None:
    """llama.cpp's name for a sequence of pre-tokenizer steps; None if it has no name."""
    behavior = [_plain(step) for step in steps]
    return next(
        (name for name, cut in CUTS.items() if cut.whole == whole and behavior == [*map(_plain, cut.steps)]), None
    )


def _plain(step: SplitStep) -> Any:
    """What a step does, for comparison. Keeping only the matches equals keeping all pieces if the pattern covers all text."""
    if step.get("type") == "Split":
        kept = (step.get("behavior", "Isolated"), step.get("invert", False)) in (("Isolated", False), ("Removed", True))
        return ("Split", step["pattern"].get("Regex"), kept)
    if step.get("type") == "ByteLevel":
        return ("ByteLevel", step.get("add_prefix_space", False), step.get("use_regex", True))
    return dict(step)


def rope_factors(rope: Mapping[str, Any], width: int) -> np.ndarray[Any, Any]:
    """The divisors of Llama 3.1's position scaling for each frequency, [width / 2]. `rope`: rope_parameters of config.json."""
    import numpy as np

    frequencies = float(rope["rope_theta"]) ** -(np.arange(0, width, 2, dtype=np.float64) / width)
    turns = float(rope["original_max_position_embeddings"]) * frequencies / (2 * np.pi)
    low, high, factor = (float(rope[key]) for key in ("low_freq_factor", "high_freq_factor", "factor"))
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return (1 / (smooth + (1 - smooth) / factor)).astype(np.float32)
