"""GGUF: read back by transformers, the file says what the merged model says; its header, tokenizer and Modelfile."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from helpers.exporting import ROWS, changed_config, exported, job_of, kl, recipe_of
from helpers.paths import TEMPLATES
from helpers.tiny import CHATML, build_tokenizer
from qkit.core.device import detect
from qkit.core.errors import NotDeployable
from qkit.export._gguf.modelfile import turns_of, write_modelfile
from qkit.export._gguf.tokenizer import cut, placed_stops, unwritten
from qkit.export.formats import gguf
from qkit.model.gguf.header import read_gguf
from qkit.model.gguf.llama_cpp import CUTS
from qkit.model.gguf.tokenizer import build as build_from
from qkit.model.provenance import NOTE
from qkit.plugins.runtime import open_runtime

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
SCALED = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
KINDS: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 2, "rms_norm_eps": 1e-5},
    "llama, scaled": {"num_key_value_heads": 2, "rope_parameters": SCALED, "max_position_embeddings": 256},
    "llama, tied": {"num_key_value_heads": 4, "tie_word_embeddings": True},
    "mistral": {"num_key_value_heads": 2, "head_dim": 16, "sliding_window": None},
    "qwen2": {"num_key_value_heads": 2, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 128},  # transformers reads no other width of a head from GGUF
}


def build(folder: Path, kind: str) -> Path:
    """A small model of that kind whose every weight matters, in float32 values that float16 holds."""
    tokenizer = build_tokenizer()
    config = AutoConfig.for_model(
        kind.partition(",")[0], **SIZES, **KINDS[kind], vocab_size=len(tokenizer), initializer_range=0.2
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 1:
                weight.copy_(torch.rand_like(weight) + (0 if "bias" in name else 0.5))
    model.half().float().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_each_family_comes_back_as_it_was(tmp_path: Path, kind: str) -> None:
    """Rows of query and key change places on the way for some families, biases and norms for others: all of it would show here."""
    model = build(tmp_path / "model", kind)
    out = exported(job_of(model, tmp_path), "gguf-f16", tmp_path)
    with open_runtime("transformers", out, detect()) as opened:
        found = list(opened.score(ROWS))
    with open_runtime("transformers", model, detect()) as opened:
        wanted = list(opened.score(ROWS))
    for row, expected in zip(found, wanted, strict=True):
        np.testing.assert_allclose(row.full, expected.full, atol=1e-3)


def test_fewer_bits_are_further_away_and_smaller(tmp_path: Path) -> None:
    model = build(tmp_path / "model", "llama")
    folders = {name: exported(job_of(model, tmp_path), f"gguf-{name}", tmp_path) for name in gguf.VARIANTS}
    scores = {}
    for name, folder in folders.items():
        with open_runtime("transformers", folder, detect()) as opened:
            scores[name] = list(opened.score(ROWS))
    sizes = [(folder / gguf.FILE).stat().st_size for folder in folders.values()]
    assert sizes == sorted(sizes, reverse=True)
    assert 1e-6 < kl(scores["f16"], scores["q8_0"]) < 0.01 < 4 * kl(scores["f16"], scores["q4_0"]) < 4


def test_the_header_says_the_sizes(tiny_model: Path, tmp_path: Path) -> None:
    out = exported(job_of(tiny_model, tmp_path), "gguf-q8_0", tmp_path)
    header, tensors = read_gguf(out / gguf.FILE)
    config = json.loads((tiny_model / "config.json").read_text())
    wanted = {
        "general.architecture": "llama",
        "general.file_type": 7,  # MOSTLY_Q8_0
        "llama.context_length": config["max_position_embeddings"],
        "llama.embedding_length": 64,
        "llama.feed_forward_length": 128,
        "llama.block_count": 2,
        "llama.attention.head_count": 2,
        "llama.attention.head_count_kv": 1,
        "llama.rope.dimension_count": 32,
        "llama.rope.freq_base": 10000.0,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": CHATML,
        "tokenizer.ggml.tokens": 259,
    }
    assert {key: header.get(key) for key in wanted} == wanted
    assert header["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(config["rms_norm_eps"])
    assert {"token_embd.weight", "output.weight", "output_norm.weight", "blk.1.attn_q.weight"} <= tensors


def test_the_stop_tokens_are_those_of_training(tiny_model: Path, tmp_path: Path) -> None:
    """The tokenizer's own end token is another one than what ended the turns."""
    model = shutil.copytree(tiny_model, tmp_path / "model")
    file = model / "generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "eos_token_id": [0, 2]}))
    out = exported(job_of(model, tmp_path), "gguf-f16", tmp_path)
    header, _ = read_gguf(out / gguf.FILE)
    assert (header["tokenizer.ggml.eos_token_id"], header["tokenizer.ggml.eot_token_id"]) == (0, 2)
    stops = [line for line in (out / "Modelfile").read_text().splitlines() if line.startswith("PARAMETER")]
    assert stops == ['PARAMETER stop "<|endoftext|>"', 'PARAMETER stop "<|im_end|>"']


# --- tokenizer --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """The tiny model with a tokenizer that has merges, and that cuts as Qwen's does."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    folder = shutil.copytree(tiny_model, tmp_path_factory.mktemp("trained") / "model")
    tokenizer = Tokenizer(models.BPE())
    split = CUTS["qwen2"].steps[0]["pattern"]["Regex"]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(split), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=259, special_tokens=["<|im_end|>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(["the theme of the thing, then"] * 9, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>")
    fast.chat_template = CHATML
    fast.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(CHATML)
    return folder


@pytest.mark.parametrize("text", ["the thing", "1234 5, Grüße\n\n  <|im_end|>x", "don't THE 日本"])
def test_the_tokenizer_comes_back(trained: Path, tmp_path: Path, text: str) -> None:
    out = exported(job_of(trained, tmp_path), "gguf-f16", tmp_path)
    alone = tmp_path / "alone"  # without tokenizer.json beside it
    alone.mkdir()
    shutil.copy(out / gguf.FILE, alone)
    back = AutoTokenizer.from_pretrained(str(alone), gguf_file=gguf.FILE)
    ids = AutoTokenizer.from_pretrained(trained)(text).input_ids
    assert back(text).input_ids == ids
    assert back.chat_template == CHATML


def steps(*kinds: dict[str, Any]) -> dict[str, Any]:
    return {"pre_tokenizer": {"type": "Sequence", "pretokenizers": list(kinds)}}


def as_named(name: str, ignore_merges: bool | None = None, **split: Any) -> dict[str, Any]:
    """A tokenizer.json that cuts as the name says."""
    whole = CUTS[name].whole if ignore_merges is None else ignore_merges
    cuts = [{**step, **split} if step["type"] == "Split" else dict(step) for step in CUTS[name].steps]
    return {**steps(*cuts), "model": {"ignore_merges": whole}}


BYTES, REST = {"type": "ByteLevel", "add_prefix_space": False}, {"type": "ByteLevel", "use_regex": False}


@pytest.mark.parametrize(
    ("tokenizer", "name"),
    [
        ({"pre_tokenizer": BYTES}, "gpt-2"),
        (steps({"type": "Digits", "individual_digits": True}, BYTES), "smollm"),
        *(
            (as_named(name), name)
            for name in ("llama-bpe", "dbrx", "qwen2", "qwen35", "tekken", "gpt-4o", "deepseek-v3", "falcon")
        ),
        (as_named("llama-bpe", ignore_merges=False), "dbrx"),
        (as_named("dbrx", ignore_merges=True), "llama-bpe"),
        (as_named("qwen2", ignore_merges=True), None),
        (as_named("qwen2", behavior="MergedWithNext"), None),
        (steps({"type": "Split", "pattern": {"Regex": "[a-z]+"}}, REST), None),
        ({"pre_tokenizer": {**BYTES, "add_prefix_space": True}}, None),
        ({"pre_tokenizer": {"type": "Metaspace"}}, None),
        ({"pre_tokenizer": None}, None),
    ],
)
def test_how_text_is_cut_has_a_name_or_is_refused(tokenizer: dict[str, Any], name: str | None) -> None:
    assert cut(tokenizer) == name


@pytest.mark.parametrize(
    ("change", "reason"), [({"byte_fallback": True}, "sentencepiece"), ({"type": "Unigram"}, "sentencepiece")]
)
def test_a_tokenizer_that_is_not_written(tiny_model: Path, tmp_path: Path, change: dict[str, Any], reason: str) -> None:
    model = shutil.copytree(tiny_model, tmp_path / "model")
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    tokenizer["model"].update(change)
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(NotDeployable, match=reason):
        exported(job_of(model, tmp_path), "gguf-f16", tmp_path)
    (model / "tokenizer.json").unlink()
    assert "has no tokenizer.json" in str(unwritten(model))


def with_tokenizer(model: Path, target: Path, **change: Any) -> Path:
    """A copy of a model with other parts in its tokenizer.json."""
    shutil.copytree(model, target)
    file = target / "tokenizer.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    return target


@pytest.mark.parametrize(
    "rule",
    [
        {"type": "Lowercase"},
        {"type": "Prepend", "prepend": "_"},
        {"type": "Replace", "pattern": {"String": " "}, "content": "_"},
        {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Lowercase"}]},
    ],
)
def test_what_is_done_to_every_text_before_it_is_cut_cannot_be_left_out(
    tiny_model: Path, tmp_path: Path, rule: dict[str, Any]
) -> None:
    model = with_tokenizer(tiny_model, tmp_path / "model", normalizer=rule)
    assert rule.get("normalizers", [rule])[-1]["type"] in str(unwritten(model))
    with pytest.raises(NotDeployable, match="all prompts would differ"):
        exported(job_of(model, tmp_path), "gguf-f16", tmp_path)


def rows_of(root: Path, *texts: str) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [
        {
            "input_ids": [1],
            "messages": json.dumps([{"role": "user", "content": text}]),
            "tools": "[]",
            "variables": "{}",
            "answer": "a",
            "calls": "[]",
        }
        for text in texts
    ]
    pq.write_table(pa.Table.from_pylist(rows), root / "texts.parquet")
    return root / "texts.parquet"


def test_rows_that_llama_cpp_reads_in_other_tokens_are_counted(trained: Path, tmp_path: Path) -> None:
    """NFC makes one letter of a letter and its mark, which is two bytes in training and three in llama.cpp."""
    model = with_tokenizer(trained, tmp_path / "model", normalizer={"type": "NFC"})
    messages: list[str] = []
    job = replace(
        job_of(model, tmp_path),
        rows=rows_of(tmp_path, "the e\u0301 thing", "the", "thing", "then"),
        notify=messages.append,
    )
    out = exported(job, "gguf-f16", tmp_path)
    result = json.loads((out / NOTE).read_text())["served_otherwise"]
    assert (result["rows"], result["differ"], result["because"]) == (4, 1, ["the normalizer NFC"])
    assert "e\u0301" in result["first"] and "25.0% of 4 rows" in messages[0]
    back = AutoTokenizer.from_pretrained(model)
    assert len(back("e\u0301").input_ids) == 2 and len(build_from(out / gguf.FILE)("e\u0301").input_ids) == 3


def test_what_a_token_takes_of_the_space_around_it_is_counted(tiny_model: Path, tmp_path: Path) -> None:
    added = json.loads((tiny_model / "tokenizer.json").read_text())["added_tokens"]
    marks = [{**one, "rstrip": one["content"] == "<|im_end|>"} for one in added]
    model = with_tokenizer(tiny_model, tmp_path / "model", added_tokens=marks)
    job = replace(job_of(model, tmp_path), rows=rows_of(tmp_path, "a", "b"))
    out = exported(job, "gguf-f16", tmp_path)
    result = json.loads((out / NOTE).read_text())["served_otherwise"]
    assert (result["rows"], result["differ"], result["because"]) == (2, 2, ["<|im_end|> (rstrip)"])


def test_rows_without_their_texts_cannot_be_compared_and_the_loss_is_named(trained: Path, tmp_path: Path) -> None:
    model = with_tokenizer(trained, tmp_path / "model", normalizer={"type": "NFC"})
    out = exported(job_of(model, tmp_path), "gguf-f16", tmp_path)
    result = json.loads((out / NOTE).read_text())["served_otherwise"]
    assert result == {"rows": 0, "differ": 0, "because": ["the normalizer NFC"]}


def test_where_nothing_is_lost_no_row_differs(tiny_model: Path, tmp_path: Path) -> None:
    job = replace(job_of(tiny_model, tmp_path), rows=rows_of(tmp_path, "Grüße 123\n\n  x", "e\u0301"))
    out = exported(job, "gguf-f16", tmp_path)
    assert json.loads((out / NOTE).read_text())["served_otherwise"] == {"rows": 2, "differ": 0}


def test_tokens_that_the_model_has_no_row_for_have_no_place(tiny_model: Path, tmp_path: Path) -> None:
    model = shutil.copytree(tiny_model, tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(str(model))
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(str(model))
    header, _ = read_gguf(exported(job_of(model, tmp_path), "gguf-f16", tmp_path) / gguf.FILE)
    assert header["tokenizer.ggml.tokens"] == 259 and "tokenizer.ggml.padding_token_id" not in header


@pytest.mark.parametrize(
    ("texts", "template", "placed", "unstopped"),
    [
        (["<|a|>", "<|b|>"], "", ["<|a|>", "<|b|>"], []),
        (["<|a|>", "x"], "", ["<|a|>", "x"], []),  # a token of the ordinary kind ends answers as well
        (["<|a|>", "<|im_end|>", "<|b|>", "<|c|>"], "", ["<|a|>", "<|b|>", "<|c|>"], []),  # llama.cpp knows the other
        (["<|a|>", "<|b|>", "<|c|>", "<|d|>"], "", ["<|a|>", "<|b|>", "<|c|>"], ["<|d|>"]),
        (["<|a|>", "<|im_end|>"], "{{ eos_token }}", ["<|im_end|>", "<|a|>"], []),  # what the template writes so
    ],
)
def test_which_stop_tokens_have_a_place_in_the_header(
    tiny_model: Path, tmp_path: Path, texts: list[str], template: str, placed: list[str], unstopped: list[str]
) -> None:
    model = shutil.copytree(tiny_model, tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(str(model))
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|a|>", "<|b|>", "<|c|>", "<|d|>"]})
    tokenizer.save_pretrained(str(model))
    (model / "chat_template.jinja").write_text(CHATML + template)
    changed_config(model, vocab_size=len(tokenizer))
    ids = tokenizer.convert_tokens_to_ids(texts)
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
    assert [tokenizer.convert_ids_to_tokens(part) for part in placed_stops(model)] == [placed, unstopped]
    write_modelfile(model, gguf.FILE)
    assert (model / "Modelfile").read_text().count("PARAMETER stop") == len(texts)


def test_the_header_names_three_stop_tokens(tiny_model: Path, tmp_path: Path) -> None:
    model = shutil.copytree(tiny_model, tmp_path / "model")
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 0, 1]}))
    header, _ = read_gguf(exported(job_of(model, tmp_path), "gguf-f16", tmp_path) / gguf.FILE)
    assert [header[f"tokenizer.ggml.{name}_token_id"] for name in ("eos", "eot", "eom")] == [2, 1, 0]


def test_a_stop_token_without_a_text_is_no_line_of_the_modelfile(tiny_model: Path, tmp_path: Path) -> None:
    """The embedding may have more rows than there are tokens."""
    model = shutil.copytree(tiny_model, tmp_path / "model")
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 300]}))
    write_modelfile(model, gguf.FILE)
    assert "None" not in (model / "Modelfile").read_text()


# --- positions --------------------------------------------------------------------------------------------------------


def test_scaled_positions_are_those_of_transformers() -> None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = AutoConfig.for_model("llama", **SIZES, rope_parameters=SCALED, max_position_embeddings=256, vocab_size=8)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 10000.0 ** -(torch.arange(0, 16, 2) / 16)
    np.testing.assert_allclose(gguf.rope_scaling(config.to_dict()), (plain / scaled).numpy(), rtol=1e-4)


@pytest.mark.parametrize(
    "config",
    [{"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, {"rope_scaling": {"type": "linear", "factor": 2.0}}],
)
def test_other_scalings_are_refused(config: dict[str, Any]) -> None:
    assert "RoPE scaling" in str(gguf.unsupported("f16", recipe_of(Path("none")), {"model_type": "llama", **config}))


# --- Modelfile --------------------------------------------------------------------------------------------------------

WITH_DEFAULT = "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nBe kind<|im_end|>\n{% endif %}" + CHATML
COUNTING = "{% for m in messages %}{{ loop.index }}{{ m['content'] }}{% endfor %}"


def test_the_modelfile_is_ollamas(tiny_model: Path, tmp_path: Path) -> None:
    out = exported(job_of(tiny_model, tmp_path), "gguf-q8_0", tmp_path)
    assert (out / "Modelfile").read_text() == (
        'FROM ./model.gguf\nTEMPLATE """{{ range .Messages }}{{ if eq .Role "system" }}<|im_start|>system\n{{ .Content }}<|im_end|>\n'
        '{{ else if eq .Role "user" }}<|im_start|>user\n{{ .Content }}<|im_end|>\n<|im_start|>assistant\n'
        '{{ else if eq .Role "assistant" }}{{ .Content }}<|im_end|>\n{{ end }}{{ end }}"""\nPARAMETER stop "<|im_end|>"\n'
    )


@pytest.mark.parametrize(("template", "default"), [(CHATML, None), (WITH_DEFAULT, "Be kind")])
def test_a_template_of_fixed_text_around_turns_is_found_out(template: str, default: str | None) -> None:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = template
    turns = turns_of(tokenizer)
    assert turns is not None and turns.default == default
    talk = [{"role": r, "content": c} for r, c in (("user", "a"), ("assistant", "b"), ("user", "c"))]
    assert turns.render(talk) == tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)


@pytest.mark.parametrize(
    ("name", "begin"), [("llama3", "<s>"), ("qwen3", ""), ("phi", ""), ("mistral", None), ("llama2", None)]
)
def test_templates_of_known_models(name: str, begin: str | None) -> None:
    """Those that put the system turn into the first question are more than fixed text around turns."""
    tokenizer = build_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    tokenizer.chat_template = (TEMPLATES / f"{name}.jinja").read_text()
    turns = turns_of(tokenizer)
    assert (turns and turns.begin) == begin


def test_what_does_more_than_that_is_left_to_ollama(tiny_model: Path, tmp_path: Path) -> None:
    model = shutil.copytree(tiny_model, tmp_path / "model")
    (model / "chat_template.jinja").write_text(COUNTING)
    out = exported(job_of(model, tmp_path), "gguf-q8_0", tmp_path)
    text = (out / "Modelfile").read_text()
    assert "TEMPLATE" not in text and "cannot be expressed in Ollama's language" in text
