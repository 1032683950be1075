"""The tokenizers that qkit builds from .gguf headers, against llama.cpp itself: ids of the same texts, for every way of cutting.

    python benchmarks/gguf_tokens.py

llama.cpp comes in an environment of its own (xllamacpp, 34 MB). For each way a tiny model is written whose vocabulary has a token for every two
bytes, so that every cut shows in the ids; for sentencepiece one with pieces of two and three letters, by random scores. Texts: code, lists,
numbers, white space, scripts, and a sample of all code points between letters, spaces and digits. `differ` counts texts with other ids than
llama.cpp's, `differ_served` the same where qkit takes llama.cpp's own patterns, as it does to count what an exported model reads otherwise.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import random
import subprocess
import sys
import tempfile
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from tokenizers import pre_tokenizers

from qkit.core.device import detect
from qkit.model.gguf.llama_cpp import CUTS
from qkit.model.gguf.tokenizer import BYTE, CONTROL, NORMAL, UNKNOWN, build
from qkit.run.environment import environment

LLAMA_CPP = "xllamacpp==2026.10.11549"
HIDDEN = 32
STEP = 7  # of the code points beyond the first blocks, every so many
TEXTS = (
    "Steps:\n\n1. Do this.\n2. Then 1234567 more; it's DON'T we'LL I've",
    "  two  spaces   three\n   \n\n\n x \t\ty\r\n\r\nz ",
    "def f(x):\n    return x['a']  # comment!!\n\n\n",
    "Grüße aus Köln, naïve café É àB aÉb HTMLParser camelCase XMLHttp",
    "日本語のテキスト、漢字とかな。123円 한국어 텍스트 Привет МИР ภาษาไทย हिन्दी में",
    "!!! ??? ... --- $5.00 <tag> a=b+c ~x |y| `z` ^ a/b\n/d //\n",
    "1,234,567.89 0x1F ½ ² Ⅷ ٣٤٥ 3.14\n1\n22\n333\n4444\n55555\n666666",
    "<|im_start|>user\nhi<|im_end|>\n  x",
)
ASK = """
import json, sys, urllib.request
import xllamacpp
texts, found = json.load(open(sys.argv[1])), {}
for file in sys.argv[3:]:
    how = xllamacpp.CommonParams()
    how.model.path, how.n_ctx, how.cpuparams.n_threads, how.warmup = file, 256, 1, False
    server = xllamacpp.Server(how)
    def ids(text):
        body = json.dumps({"content": text, "add_special": True, "parse_special": True}).encode()
        asked = urllib.request.Request(server.listening_address + "/tokenize", body, {"Content-Type": "application/json"})
        return json.load(urllib.request.urlopen(asked))["tokens"]
    found[file] = [ids(text) for text in texts]
    del server
json.dump(found, open(sys.argv[2], "w"))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument(
        "--only", nargs="*", help="names of pre-tokenizers, and sentencepiece; default: one of every way"
    )
    given = parser.parse_args()
    texts = [*TEXTS, *_sampled()]
    with tempfile.TemporaryDirectory() as folder:
        files = {name: Path(folder) / f"{name}.gguf" for name in given.only or [*_ways(), "sentencepiece"]}
        for name, file in files.items():
            _sentencepiece(file) if name == "sentencepiece" else _byte_pairs(file, name)
        theirs = _llama_cpp(Path(folder), list(files.values()), texts)
        rows = [_compared(name, file, texts, theirs[str(file)]) for name, file in files.items()]
    for row in rows:
        print("{name:24} {texts} texts, {differ} differ, {differ_served} as served".format(**row))
    _write(given.out, rows)


def _ways() -> Iterator[str]:
    """The first name of every way of cutting; raw vocabularies are of another kind."""
    seen: list[Any] = []
    for name, cut in CUTS.items():
        if not cut.raw and cut not in seen:
            seen.append(cut)
            yield name


def _sampled() -> Iterator[str]:
    points = [*range(0x20, 0x3400), *range(0x3400, 0x10000, STEP), *range(0x10000, 0x1FA00, STEP)]
    shown = [chr(point) for point in points if unicodedata.category(chr(point)) not in ("Cs", "Cn", "Co", "Cc")]
    for begin in range(0, len(shown), 40):
        yield "".join(f"a{letter}b {letter}{letter}1" for letter in shown[begin : begin + 40])


def _byte_pairs(file: Path, name: str) -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = [first + second for first in alphabet for second in alphabet]
    random.Random(0).shuffle(pairs)
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *alphabet, *pairs]
    types = [CONTROL] * 3 + [NORMAL] * (len(tokens) - 3)
    merges = [f"{pair[0]} {pair[1]}" for pair in pairs]
    _model(
        file,
        tokens,
        types,
        tokenizer_model="gpt2",
        tokenizer_pre=name,
        token_merges=merges,
        bos_token_id=1,
        eos_token_id=2,
    )


def _sentencepiece(file: Path) -> None:
    """The first and third control token are no bos_token, so that templates' marks come up as well."""
    written = [text.replace(" ", "▁") for text in TEXTS]
    parts = {text[at : at + size] for text in written for size in (1, 2, 3) for at in range(len(text) - size + 1)}
    made = sorted(part for part in parts if "<" not in part)  # every letter of a piece is one itself, as in real models
    random.Random(0).shuffle(made)
    head = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", *(f"<0x{byte:02X}>" for byte in range(256))]
    types = [UNKNOWN, *[CONTROL] * 4, *[BYTE] * 256, *[NORMAL] * len(made)]
    scores = [0.0] * len(head) + [-float(number + 1) for number in range(len(made))]
    special = {"bos_token_id": 1, "eos_token_id": 2, "unk_token_id": 0}
    _model(file, [*head, *made], types, tokenizer_model="llama", token_scores=scores, **special)


def _model(file: Path, tokens: list[str], types: list[int], **keys: Any) -> None:
    """One layer that llama.cpp loads."""
    writer = gguf.GGUFWriter(str(file), "llama")
    sizes = {"context_length": 512, "embedding_length": HIDDEN, "block_count": 1, "feed_forward_length": HIDDEN}
    more = {"head_count": 1, "head_count_kv": 1, "layer_norm_rms_eps": 1e-5, "rope_dimension_count": HIDDEN}
    listed = {"vocab_size": len(tokens), "token_list": tokens, "token_types": types}
    for key, value in {**sizes, **more, **listed, **keys}.items():
        getattr(writer, f"add_{key}")(value)
    layer = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    shapes = {"token_embd": (len(tokens), HIDDEN), "output_norm": (HIDDEN,), "blk.0.attn_norm": (HIDDEN,)}
    for name, shape in {
        **shapes,
        "blk.0.ffn_norm": (HIDDEN,),
        **{f"blk.0.{part}": (HIDDEN, HIDDEN) for part in layer},
    }.items():
        writer.add_tensor(f"{name}.weight", np.full(shape, 0.1, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _llama_cpp(folder: Path, files: list[Path], texts: list[str]) -> dict[str, list[list[int]]]:
    """Ids by llama.cpp, in an environment of its own."""
    home, asked, answered = folder / "environment", folder / "texts.json", folder / "ids.json"
    subprocess.run([sys.executable, "-m", "venv", str(home)], check=True)
    python = str(home / "bin" / "python")
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", LLAMA_CPP], check=True)
    asked.write_text(json.dumps(texts), encoding="utf-8")
    command = [python, "-c", ASK, str(asked), str(answered), *map(str, files)]
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL, timeout=1800)
    found: dict[str, list[list[int]]] = json.loads(answered.read_text(encoding="utf-8"))
    return found


def _compared(name: str, file: Path, texts: list[str], theirs: list[list[int]]) -> dict[str, Any]:
    differing = [
        sum(ids != wanted for ids, wanted in zip(build(file, served)(texts)["input_ids"], theirs, strict=True))
        for served in (False, True)
    ]
    return {"name": name, "texts": len(texts), "differ": differing[0], "differ_served": differing[1]}


def _write(out: Path, rows: list[dict[str, Any]]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    document = {
        "date": dt.date.today().isoformat(),
        "llama_cpp": LLAMA_CPP,
        "environment": environment(detect().to_dict()),
        "rows": rows,
    }
    (out / "gguf_tokens.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
