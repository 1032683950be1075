"""The tokenizer of a .gguf file: cut as its pre-tokenizer's name says, llama.cpp's rules for the rest; what is not known is refused."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import regex
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer

from qkit.core.errors import ModelError
from qkit.model import source
from qkit.model import tokenizer as model_tokenizer
from qkit.model.gguf import llama_cpp
from qkit.model.gguf.tokenizer import build
from qkit.recipe import schema

HIDDEN = 64
CONTROL, USER_DEFINED, UNUSED, BYTE = 3, 4, 5, 6
TEXTS = (
    "Steps:\n\n1. Do this.\n2. Then 1234567 more; it's DON'T we'LL",
    "  two  spaces   three\n   \n\n\n x \t\ty\r\n\r\nz ",
    "def f(x):\n    return x['a']  # 100% !!\n\n\n",
    "Grüße, naïve café HTMLParser camelCase a/b\n",
    "日本語のテキスト、漢字。123円 한국어 Привет МИР",
    "1,234,567.89 0x1F ½ ² ٣٤٥ $5.00 <tag> a=b+c ~x |y|",
)
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
CLAUSE = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CAMEL = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+@"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*@"
    r"|\p{N}# ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
ASCII_SIGNS = r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~]"
DEEPSEEK = (
    ASCII_SIGNS + r"[A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# The definitions of names, as patterns for the package `regex`: one after the other, matches and what is between them are pieces.
DEFINED: dict[str, Sequence[str]] = {
    "gpt-2": [GPT2],
    "mpt": [GPT2],
    "smollm": [r"\p{N}", GPT2],
    "starcoder": [r"\p{N}", GPT2],
    "command-r": [r"\p{N}", GPT2],
    "llama-bpe": [CLAUSE + r"\p{N}{1,3}" + REST],
    "dbrx": [CLAUSE + r"\p{N}{1,3}" + REST],
    "glm4": [CLAUSE + r"\p{N}{1,3}" + REST],
    "qwen2": [CLAUSE + r"\p{N}" + REST],
    "stablelm2": [CLAUSE + r"\p{N}" + REST],
    "qwen35": [
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    ],
    "tekken": [CAMEL.replace("@", "").replace("#", "|")],
    "gpt-4o": [CAMEL.replace("@", "(?i:'s|'t|'re|'ve|'m|'ll|'d)?").replace("#", "{1,3}|")],
    "deepseek-v3": [r"\p{N}{1,3}", "[一-\u9fa5\u3040-\u309f\u30a0-\u30ff]+", DEEPSEEK],
    "deepseek-coder": ["[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+", r"\p{N}"],
    "falcon": [r"[\p{P}$+<=>^~|`]+", GPT2, "[0-9]{3}"],
    "bloom": [" ?[^(\\s|.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c)]+"],
    "viking": [" ?[^(\\s|.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c)]+", r"\p{N}"],
    "default": [r"[\p{P}$+<=>^~|]+", GPT2, r"\p{N}+", "[0-9]{3}"],
}


def pieces(text: str, patterns: Sequence[str]) -> list[str]:
    """`text` as a name's definition cuts it."""
    found = [text]
    for pattern in patterns:
        parts: list[str] = []
        for piece in found:
            at = 0
            for match in regex.finditer(pattern, piece):
                parts += [piece[at : match.start()], match.group()]
                at = match.end()
            parts.append(piece[at:])
        found = [part for part in parts if part]
    return found


def spelled(text: str) -> str:
    """Text in GPT-2's alphabet of bytes, by its own rule: printable bytes stand for themselves, the others follow from 256 on."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = [byte for byte in range(256) if byte not in printable]
    return "".join(chr(b) if b in printable else chr(256 + others.index(b)) for b in text.encode())


def write(
    file: Path, tokens: Sequence[str], types: Sequence[int], kind: str = "gpt2", name: str = "tiny", **keys: Any
) -> Path:
    """A .gguf file of one small layer. `keys`: more of the header, by the writer's methods."""
    writer = gguf.GGUFWriter(str(file), keys.pop("arch", "llama"))
    writer.add_name(name)
    writer.add_tokenizer_model(kind)
    writer.add_token_list(list(tokens))
    writer.add_token_types(list(types))
    sizes = {"context_length": 512, "embedding_length": HIDDEN, "block_count": 1, "feed_forward_length": HIDDEN}
    factors = keys.pop("factors", None)
    more = {"head_count": 2, "head_count_kv": 2, "layer_norm_rms_eps": 1e-5, "rope_dimension_count": HIDDEN // 2}
    for key, value in {**sizes, **more, "rope_freq_base": 10000.0, "vocab_size": len(tokens), **keys}.items():
        getattr(writer, f"add_{key}")(value)
    random = np.random.default_rng(0)
    layer = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    shapes: dict[str, tuple[int, ...]] = {"token_embd": (len(tokens), HIDDEN), "output": (len(tokens), HIDDEN)}
    shapes |= {"output_norm": (HIDDEN,), "blk.0.attn_norm": (HIDDEN,), "blk.0.ffn_norm": (HIDDEN,)}
    for key, shape in (shapes | {f"blk.0.{part}": (HIDDEN, HIDDEN) for part in layer}).items():
        writer.add_tensor(f"{key}.weight", random.normal(size=shape).astype(np.float32) / 10)
    if factors is not None:
        writer.add_tensor(llama_cpp.ROPE_FACTORS, factors)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.fixture(scope="module")
def pairs() -> tuple[list[str], list[str]]:
    """Tokens of one byte and of every two that stand side by side in TEXTS, and their merges: in such ids every cut shows."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    written = [spelled(text) for text in TEXTS]
    both = sorted({text[at : at + 2] for text in written for at in range(len(text) - 1)})
    return ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *alphabet, *both], [f"{pair[0]} {pair[1]}" for pair in both]


def merged(piece: str, ranks: dict[tuple[str, str], int]) -> list[str]:
    """A piece by the definition of byte pair encoding: the first merge in the list, leftmost first, until there is none."""
    parts = list(piece)
    while found := [(ranks[pair], at) for at, pair in enumerate(pairwise(parts)) if pair in ranks]:
        _, at = min(found)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts


@pytest.mark.parametrize("name", DEFINED)
def test_ids_are_those_of_the_names_definition(name: str, pairs: tuple[list[str], list[str]], tmp_path: Path) -> None:
    tokens, merges = pairs
    kinds = [CONTROL if number < 3 else 1 for number in range(len(tokens))]
    file = write(tmp_path / "m.gguf", tokens, kinds, tokenizer_pre=name, token_merges=merges)
    ranks = {(merge[0], merge[-1]): rank for rank, merge in enumerate(merges)}
    known = {token: number for number, token in enumerate(tokens)}
    tokenizer = build(file)
    for text in TEXTS:
        wanted = [known[part] for piece in pieces(text, DEFINED[name]) for part in merged(spelled(piece), ranks)]
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == wanted, text
        assert tokenizer.decode(wanted) == text


def test_numbered_lists_are_read_as_smollm_was_trained(tmp_path: Path) -> None:
    """Two line ends are one token there; GPT-2's cut, which transformers takes for every name that it does not know, leaves two."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["ĊĊ", "St", "eps", "Steps", "ep", "Do", "ĠDo"]
    merges = ["Ċ Ċ", "S t", "e p", "ep s", "St eps", "D o", "Ġ Do"]
    tokens = ["<|endoftext|>", *alphabet, *words]
    file = write(
        tmp_path / "m.gguf", tokens, [CONTROL] + [1] * (len(tokens) - 1), tokenizer_pre="smollm", token_merges=merges
    )
    found = build(file)
    assert found.convert_ids_to_tokens(found("Steps:\n\n1. Do")["input_ids"]) == ["Steps", ":", "ĊĊ", "1", ".", "ĠDo"]
    assert found.convert_ids_to_tokens(found("1234")["input_ids"]) == ["1", "2", "3", "4"]


def test_every_name_can_be_built(pairs: tuple[list[str], list[str]], tmp_path: Path) -> None:
    """A pattern that the engine refuses would only show once a model of that name comes."""
    tokens, merges = pairs
    for name, cut in llama_cpp.CUTS.items():
        if not cut.raw:
            file = write(tmp_path / "m.gguf", tokens, [1] * len(tokens), tokenizer_pre=name, token_merges=merges)
            ids = build(file)(TEXTS[0], add_special_tokens=False)["input_ids"]
            assert "".join(tokens[number] for number in ids) == spelled(TEXTS[0]), name


@pytest.mark.parametrize(
    ("tokens", "types", "words"),
    [
        (["a", "b"], [1, 1, 1], "2 tokens and 3 token types"),
        (["a", "b"], [1], "2 tokens and 1 token types"),
        (["[PAD0]", "[PAD1]"], [5, 5], "only padding"),
        (["a", "b", "a"], [1, 1, 1], "the token 'a' twice, as 0 and 2"),
    ],
)
def test_lists_that_contradict_each_other_are_refused(
    tokens: list[str], types: list[int], words: str, tmp_path: Path
) -> None:
    file = write(tmp_path / "m.gguf", tokens, types, token_merges=[], tokenizer_pre="gpt-2")
    with pytest.raises(ModelError, match=words) as caught:
        build(file)
    assert caught.value.source == file


def test_names_that_transformers_knows_mean_the_same_here() -> None:
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    for name, pattern in GGUF_PRE_TOKENIZER_SPLITS.items():
        assert llama_cpp.CUTS[name].steps[0]["pattern"]["Regex"] == pattern, name


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"tokenizer_pre": "brand-new"}, "brand-new"),
        ({}, "names no pre-tokenizer"),
        ({"tokenizer_pre": "kimi-k2"}, "code of its own"),
        ({"kind": "t5"}, "of the kind 't5'"),
        ({"kind": "bert"}, "of the kind 'bert'"),
        ({"kind": "llama"}, "0 scores for 2 tokens"),
        ({"tokenizer_pre": "gpt-2"}, "merge of tokens that it lacks"),
    ],
)
def test_what_is_not_known_is_refused(keys: dict[str, Any], words: str, tmp_path: Path) -> None:
    file = write(tmp_path / "m.gguf", ["a", "b"], [1, 1], token_merges=["a b"], **keys)
    with pytest.raises(ModelError, match=words):
        model_tokenizer.tokenizer_of(schema.Model(source=str(file)))


def test_a_whole_piece_that_is_a_token_is_taken_where_the_name_says_so(tmp_path: Path) -> None:
    tokens = ["a", "b", "c", "ab", "abc"]  # no merge makes the last one
    for name, wanted in {"llama-bpe": [4], "tekken": [4], "dbrx": [3, 2], "qwen2": [3, 2]}.items():
        file = write(tmp_path / "m.gguf", tokens, [1] * 5, tokenizer_pre=name, token_merges=["a b"])
        assert build(file)("abc", add_special_tokens=False)["input_ids"] == wanted, name


@pytest.mark.parametrize(
    ("name", "said", "wanted"),
    [("llama-bpe", None, [5, 0]), ("llama-bpe", False, [0]), ("qwen2", None, [0]), ("qwen2", True, [5, 0])],
)
def test_a_text_begins_as_the_header_or_the_name_says(
    name: str, said: bool | None, wanted: list[int], tmp_path: Path
) -> None:
    keys = {} if said is None else {"add_bos_token": said}
    tokens = ["a", "b", "ab", "x", "y", "<s>"]
    file = write(
        tmp_path / "m.gguf",
        tokens,
        [1] * 5 + [CONTROL],
        tokenizer_pre=name,
        token_merges=["a b"],
        bos_token_id=5,
        **keys,
    )
    assert build(file)("a")["input_ids"] == wanted


def test_control_tokens_in_other_letters_stay_whole(tmp_path: Path) -> None:
    """DeepSeek's are written with a wide bar; transformers takes those for mistakes and cuts them into bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [
        *alphabet,
        "<\uff5cUser\uff5c>",
        "<end_of_turn>",
        "<think>",
        "[PAD259]",
    ]  # the last one fills the embedding
    kinds = [1] * 256 + [CONTROL, 1, USER_DEFINED, UNUSED]  # llama.cpp makes a control token of the second by its name
    found = build(write(tmp_path / "m.gguf", tokens, kinds, tokenizer_pre="qwen2", token_merges=[]))
    assert found("<\uff5cUser\uff5c><think><end_of_turn>")["input_ids"] == [256, 258, 257]
    assert {256, 257} <= set(found.all_special_ids) | {
        n for n, token in found.added_tokens_decoder.items() if token.special
    }
    assert len(found) == 259  # what only fills the embedding is no token


# --- sentencepiece ------------------------------------------------------------------------------------------------------

PIECES = [
    "<unk>",
    "<s>",
    "</s>",
    *(f"<0x{byte:02X}>" for byte in range(256)),
    *"▁helo",
    "▁h",
    "el",
    "lo",
    "▁hel",
    "▁▁",
    "  ",
]
SCORES = [0.0] * 259 + [-100.0] * 5 + [-1.0, -2.0, -3.0, -4.0, -5.0, 0.0]
KINDS = [2, CONTROL, CONTROL] + [BYTE] * 256 + [1] * 10 + [USER_DEFINED]


@pytest.mark.parametrize(
    ("keys", "text", "wanted"),
    [
        ({}, "hello", ["<s>", "▁hel", "lo"]),
        ({"add_bos_token": False}, "hello", ["▁hel", "lo"]),
        ({"add_bos_token": False, "add_space_prefix": False}, "hello", ["h", "el", "lo"]),
        (
            {"add_bos_token": False},
            " hello",
            ["▁", "▁hel", "lo"],
        ),  # a space of one's own comes beside that which is put first
        ({"add_bos_token": False}, "hello</s>hello", ["▁hel", "lo", "</s>", "▁hel", "lo"]),
        ({"add_bos_token": False}, "h  h", ["▁h", "  ", "▁h"]),
        ({"add_bos_token": False}, "hé", ["▁h", "<0xC3>", "<0xA9>"]),
        ({"add_eos_token": True}, "h", ["<s>", "▁h", "</s>"]),
    ],
)
def test_sentencepiece_as_llama_cpp_reads_it(
    keys: dict[str, Any], text: str, wanted: list[str], tmp_path: Path
) -> None:
    special = {"bos_token_id": 1, "eos_token_id": 2, "unk_token_id": 0}
    file = write(tmp_path / "m.gguf", PIECES, KINDS, kind="llama", token_scores=SCORES, **special, **keys)
    found = build(file)
    ids = found(text)["input_ids"]
    assert [PIECES[number] for number in ids] == wanted


# --- the whole folder -----------------------------------------------------------------------------------------------------


@pytest.fixture
def described(tmp_path: Path) -> Path:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *alphabet, "ĊĊ"]
    return write(
        tmp_path / "m.gguf",
        tokens,
        [CONTROL] * 3 + [1] * 257,
        tokenizer_pre="smollm",
        token_merges=["Ċ Ċ"],
        bos_token_id=1,
        eos_token_id=2,
        eot_token_id=0,
        pad_token_id=0,
        chat_template=[
            {"name": "default", "template": "{{ messages[0]['content'] }}"},
            {"name": "tool_use", "template": "{{ tools }}"},
        ],
    )


def test_the_folder_has_what_the_header_says(described: Path) -> None:
    folder = source.companions(schema.Model(source=str(described)))
    back = AutoTokenizer.from_pretrained(folder)
    assert back("1\n\n2")["input_ids"] == build(described)("1\n\n2")["input_ids"]
    assert back.convert_ids_to_tokens(back("1\n\n2")["input_ids"]) == ["1", "ĊĊ", "2"]
    assert back.chat_template == {"default": "{{ messages[0]['content'] }}", "tool_use": "{{ tools }}"}
    generation = json.loads((folder / "generation_config.json").read_text())
    assert (generation["eos_token_id"], generation["pad_token_id"]) == ([2, 0], 0)


def test_what_an_earlier_conversion_left_in_the_cache_is_not_taken(described: Path) -> None:
    from qkit.core.files import sha256_of
    from qkit.core.sources import cache_dir

    old = cache_dir() / "models" / f"{described.stem}-{sha256_of(described)[:12]}"
    old.mkdir(parents=True)
    (old / "config.json").write_text("{}")
    assert source.companions(schema.Model(source=str(described))) != old


@pytest.mark.parametrize(
    ("keys", "wanted"),
    [
        ({}, {"rope_type": "default"}),
        (
            {"rope_scaling_type": gguf.RopeScalingType.LINEAR, "rope_scaling_factor": 4.0},
            {"rope_type": "linear", "factor": 4.0},
        ),
        (
            {
                "rope_scaling_type": gguf.RopeScalingType.YARN,
                "rope_scaling_factor": 4.0,
                "rope_scaling_orig_ctx_len": 128,
            },
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
        ),
    ],
)
def test_scaled_positions_come_over(keys: dict[str, Any], wanted: dict[str, Any], tmp_path: Path) -> None:
    file = write(tmp_path / "m.gguf", ["a", "b", "ab"], [1] * 3, tokenizer_pre="gpt-2", token_merges=["a b"], **keys)
    config = json.loads((source.companions(schema.Model(source=str(file))) / "config.json").read_text())
    assert wanted.items() <= config["rope_parameters"].items()


def test_positions_that_are_scaled_in_an_unknown_way_are_refused(tmp_path: Path) -> None:
    keys = {"rope_scaling_type": gguf.RopeScalingType.LONGROPE, "tokenizer_pre": "gpt-2", "token_merges": ["a b"]}
    file = write(tmp_path / "m.gguf", ["a", "b", "ab"], [1] * 3, **keys)
    with pytest.raises(ModelError, match="longrope"):
        source.companions(schema.Model(source=str(file)))


def test_an_architecture_that_transformers_does_not_read_is_a_message(tmp_path: Path) -> None:
    file = write(tmp_path / "m.gguf", ["a", "aa"], [1, 1], arch="brandnew", tokenizer_pre="gpt-2", token_merges=["a a"])
    with pytest.raises(ModelError, match=r"transformers cannot read it .*brandnew"):
        source.companions(schema.Model(source=str(file)))


def test_llama_31s_scaling_is_read_from_its_factors(tmp_path: Path) -> None:
    """The file holds by what frequencies are divided, and transformers passes over that tensor."""
    wanted = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    factors = llama_cpp.rope_factors({**wanted, "rope_theta": 500000.0}, 32)
    keys = {"tokenizer_pre": "gpt-2", "token_merges": ["a b"], "rope_freq_base": 500000.0}
    file = write(tmp_path / "m.gguf", ["a", "b", "ab"], [1] * 3, factors=factors, **keys)
    config = json.loads((source.companions(schema.Model(source=str(file))) / "config.json").read_text())
    assert wanted.items() <= config["rope_parameters"].items()
    odd = write(
        tmp_path / "odd.gguf", ["a", "b", "ab"], [1] * 3, factors=np.linspace(1, 5, 16, dtype=np.float32), **keys
    )
    with pytest.raises(ModelError, match="does not follow Llama 3"):
        source.companions(schema.Model(source=str(odd)))
