"""config.json and tokenizer_config.json in the words of transformers 4 beside those of 5. Against 4 itself: benchmarks/transformers4.py."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tokenizers import normalizers
from transformers import AutoConfig, AutoTokenizer

from helpers.tiny import build_tokenizer
from qkit.core.errors import ModelError
from qkit.core.progress import Progress
from qkit.merging import folder as merging_folder
from qkit.model import added_tokens, older_forms, source
from qkit.model import tokenizer as model_tokenizer
from qkit.recipe.schema import Data, Model, Recipe
from qkit.run.directory import Run

FAR = {"rope_type": "default", "rope_theta": 500000.0}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LONG = {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [2.0], "original_max_position_embeddings": 64}
GEMMA3 = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}

# model_type and rope_parameters; what the older form of it is.
FORMS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "a base": ("llama", FAR, {"rope_theta": 500000.0}),
    "scaled": (
        "llama",
        {**LLAMA3, "rope_theta": 5e5},
        {"rope_theta": 5e5, "rope_scaling": {**LLAMA3, "type": "llama3"}},
    ),
    "linear": (
        "llama",
        {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4},
        {"rope_theta": 1e4, "rope_scaling": {"rope_type": "linear", "type": "linear", "factor": 2.0}},
    ),
    "by layer": (
        "gemma3_text",
        GEMMA3,
        {
            "rope_theta": 1e6,
            "rope_local_base_freq": 1e4,
            "rope_scaling": {"rope_type": "linear", "type": "linear", "factor": 8.0},
        },
    ),
    "three fields and no more": (
        "phi3",
        {**LONG, "rope_theta": 1e4},
        {
            "rope_theta": 1e4,
            "original_max_position_embeddings": 64,
            "rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [2.0]},
        },
    ),
    "a share of the width": (
        "phi",
        {**FAR, "partial_rotary_factor": 0.5},
        {"rope_theta": 500000.0, "partial_rotary_factor": 0.5},
    ),
    "other names": (
        "gpt_neox",
        {**FAR, "partial_rotary_factor": 0.25},
        {"rotary_emb_base": 500000.0, "rotary_pct": 0.25},
    ),
    "one base for all layers": (
        "olmo3",
        {"full_attention": {**LLAMA3, "rope_theta": 5e5}, "sliding_attention": FAR},
        {"rope_theta": 5e5, "rope_scaling": {**LLAMA3, "type": "llama3"}},
    ),
    "younger than the older form": (
        "gemma4_text",
        {"full_attention": FAR, "sliding_attention": {**FAR, "rope_theta": 1e4}},
        {},
    ),
    "none": ("gpt2", {}, {}),
}


@pytest.mark.parametrize("kind", FORMS)
def test_positions_have_both_forms(kind: str) -> None:
    model_type, rope, older = FORMS[kind]
    given = {"model_type": model_type, "dtype": "bfloat16", "rope_parameters": rope}
    assert older_forms.config(given) == {**given, "torch_dtype": "bfloat16", **older}
    inside = {"text_config": {"model_type": model_type, "rope_parameters": rope}}
    assert older_forms.config(inside)["text_config"] == {**inside["text_config"], **older}
    assert older_forms.config({**given, "rope_theta": 7.0})["rope_theta"] == 7.0 if "rope_theta" in older else True


@pytest.mark.parametrize("kind", [kind for kind in FORMS if kind != "younger than the older form"])
def test_the_newer_library_reads_what_it_read_before(kind: str, tmp_path: Path) -> None:
    model_type, rope, _ = FORMS[kind]
    extra = {"rope_parameters": rope} if rope else {}
    layers = (
        {"layer_types": ["sliding_attention", "full_attention"], "num_hidden_layers": 2}
        if len(rope) == 2 and "full_attention" in rope
        else {}
    )
    length = {"original_max_position_embeddings": 64} if kind == "three fields and no more" else {}
    width = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2}
    if kind == "three fields and no more":
        rope = {**rope, "short_factor": [1.0] * 16, "long_factor": [2.0] * 16}
        extra = {"rope_parameters": rope}
    AutoConfig.for_model(model_type, **width, **layers, **length, **json.loads(json.dumps(extra))).save_pretrained(
        tmp_path
    )
    before = AutoConfig.from_pretrained(tmp_path).to_dict()
    older_forms.settle(tmp_path)
    after = AutoConfig.from_pretrained(tmp_path).to_dict()
    assert _without_type(after.pop("rope_parameters", {})) == before.pop("rope_parameters", {})
    assert {key: after[key] for key in before} == before and not list(older_forms.unreadable(tmp_path))


def _without_type(rope: dict[str, Any]) -> dict[str, Any]:
    """`type` is the older name of `rope_type`, which the newer library keeps beside it and does not read."""
    return {
        key: _without_type(value) if isinstance(value, dict) else value for key, value in rope.items() if key != "type"
    }


def test_a_mixture_is_given_the_older_name_of_its_count(tmp_path: Path) -> None:
    AutoConfig.for_model("qwen3_moe", num_experts=6).save_pretrained(tmp_path)
    older_forms.settle(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["num_experts"] == 6
    assert AutoConfig.from_pretrained(tmp_path).num_local_experts == 6


@pytest.mark.parametrize("listed", [None, ["<|im_start|>"]])
def test_special_tokens_are_listed_once_by_their_content(listed: Any) -> None:
    """As strings or as the fields of an AddedToken, and with a null where 4 wrote an empty list."""
    fields = {"__type": "AddedToken", "content": "<|im_start|>", "special": True}
    other = {"__type": "AddedToken", "content": "<|im_end|>", "special": True}
    both = older_forms.tokenizer(
        {"additional_special_tokens": listed, "extra_special_tokens": [fields, other, "<|im_end|>"]}
    )
    assert both == {"additional_special_tokens": [(listed or [fields])[0], other]}


def _saved(folder: Path, **more: Any) -> dict[str, Any]:
    build_tokenizer().save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **more}))
    return dict(json.loads(file.read_text()))


def test_a_tokenizer_s_class_and_tokens_are_ones_that_4_knows(tmp_path: Path) -> None:
    saved = _saved(
        tmp_path, extra_special_tokens=["<|im_start|>"], model_specific_special_tokens={"image_token": "<|endoftext|>"}
    )
    assert (
        saved["tokenizer_class"] == "TokenizersBackend"
    )  # what transformers 5 writes; else this test is about nothing
    assert len(list(older_forms.unreadable(tmp_path))) == 2
    before = AutoTokenizer.from_pretrained(tmp_path)
    older_forms.settle(tmp_path)
    made = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert made["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert made["additional_special_tokens"] == ["<|im_start|>"]
    assert made["extra_special_tokens"] == {"image_token": "<|endoftext|>"}
    assert list(older_forms.unreadable(tmp_path)) == []
    after = AutoTokenizer.from_pretrained(tmp_path)
    assert set(after.all_special_tokens) == set(before.all_special_tokens) and after.image_token == "<|endoftext|>"
    assert after("<|im_start|>a b")["input_ids"] == before("<|im_start|>a b")["input_ids"]


@pytest.mark.parametrize(
    ("base", "wanted"), [("Qwen2Tokenizer", "Qwen2Tokenizer"), ("TokenizersBackend", "PreTrainedTokenizerFast")]
)
def test_the_base_s_own_class_stays(base: str, wanted: str) -> None:
    before = {"tokenizer_class": base, "add_bos_token": False, "chat_template": "the base's"}
    assert older_forms.tokenizer({"tokenizer_class": "TokenizersBackend"}, before) == {
        "tokenizer_class": wanted,
        "add_bos_token": False,
    }


def test_what_older_readers_would_take_for_something_else_is_named(tmp_path: Path) -> None:
    config = {"model_type": "llama", "dtype": "bfloat16", "rope_parameters": FAR}
    (tmp_path / "config.json").write_text(json.dumps(config))
    said = list(older_forms.unreadable(tmp_path))
    assert sorted(said) == [f"config.json has {key} only in the new form" for key in ("rope_theta", "torch_dtype")]
    (tmp_path / "config.json").write_text(json.dumps({**older_forms.config(config), "rope_theta": 10000.0}))
    assert list(older_forms.unreadable(tmp_path)) == ["config.json has rope_theta 10000, but 500000 in the new form"]
    (tmp_path / "config.json").write_text(json.dumps({**older_forms.config(config), "torch_dtype": "float16"}))
    assert list(older_forms.unreadable(tmp_path)) == [
        "config.json has torch_dtype float16, but bfloat16 in the new form"
    ]


LINEAR, PLAIN = {"rope_type": "linear", "factor": 4.0}, {"rope_type": "default", "rope_theta": 5e5}


@pytest.mark.parametrize(
    "said",
    [
        {"rope_theta": 1e4, "rope_scaling": LINEAR, "rope_parameters": PLAIN},
        {"rope_scaling": {"type": "linear", "factor": 4.0}, "rope_parameters": PLAIN},
        {"rope_scaling": {**LINEAR, "rope_theta": 9.0}, "rope_parameters": PLAIN},
        {"rope_scaling": LINEAR, "rope_parameters": {**PLAIN, **LINEAR, "factor": 2.0}},
        {"rope_scaling": {}, "rope_parameters": {**PLAIN, **LINEAR}},
        {"rope_theta": 7.0, "rope_parameters": {"rope_type": "default"}},
        {"rope_theta": 7.0},
    ],
    ids=str,
)
def test_two_forms_that_contradict_each_other_are_read_as_the_library_reads_them(
    said: dict[str, Any], tmp_path: Path
) -> None:
    given = {"model_type": "llama", "hidden_size": 64, "num_attention_heads": 2, **said}
    (tmp_path / "config.json").write_text(json.dumps(given))
    wanted = _without_type(AutoConfig.from_pretrained(tmp_path).rope_parameters)
    assert _without_type(older_forms.rope(given)) == wanted
    both = said.get("rope_scaling") and said.get("rope_parameters")
    assert bool(both) == any("rope_scaling" in one and "linear" in one for one in older_forms.unreadable(tmp_path))
    older_forms.settle(tmp_path)
    assert _without_type(AutoConfig.from_pretrained(tmp_path).rope_parameters) == wanted
    assert list(older_forms.unreadable(tmp_path)) == []


def test_weights_of_another_dtype_are_said_to_be_so_everywhere() -> None:
    inside = {"text_config": {"dtype": "bfloat16", "torch_dtype": "bfloat16"}, "vision_config": {"depth": 2}}
    made = older_forms.in_dtype(
        {"torch_dtype": "bfloat16", **inside, "quantization_config": {"dtype": "int"}}, "float16"
    )
    both = {"dtype": "float16", "torch_dtype": "float16"}
    assert made == {**both, "text_config": both, "vision_config": {"depth": 2}, "quantization_config": {"dtype": "int"}}


# --- the folders that are made ----------------------------------------------------------------------------------------


def _recipe(folder: Path, **section: Any) -> Recipe:
    return Recipe(task="chat", model=Model(source=str(folder), **section), data=Data())


@pytest.mark.parametrize("section", [{"chat_template": "chatml"}, {"add_tokens": ["<tool>"]}, {}], ids=str)
def test_a_written_tokenizer_is_one_for_all(section: dict[str, Any], tiny_model: Path, tmp_path: Path) -> None:
    run = Run(tmp_path, _recipe(tiny_model, **section), Progress())
    out = shutil.copytree(tiny_model, tmp_path / "out")
    (out / "additional_chat_templates").mkdir()
    (out / "additional_chat_templates" / "tool_use.jinja").write_text("the base's, for tools")
    merging_folder._write_tokenizer(run, out, trained_here=True)
    older_forms.settle(out, tiny_model)
    assert list(older_forms.unreadable(out)) == []
    if section.get("chat_template"):  # one for tools beside it would be taken in its place when there are any
        assert (
            AutoTokenizer.from_pretrained(out).chat_template
            == model_tokenizer.tokenizer_of(run.recipe.model).chat_template
        )
    if section.get("add_tokens"):
        prepared = source.resolve(run.recipe.model)
        assert list(older_forms.unreadable(prepared)) == []
        assert "<tool>" in AutoTokenizer.from_pretrained(prepared).all_special_tokens


def test_rules_that_the_newer_library_puts_in_are_written_down(tiny_model: Path, tmp_path: Path) -> None:
    """transformers 5 gives every tokenizer of a Qwen 2 model NFC, whatever its file says; other readers have nothing but the file."""
    base = shutil.copytree(tiny_model, tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(
        json.dumps({**config, "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]})
    )
    tokenizer = added_tokens.bare_tokenizer(base, False)
    assert str(tokenizer.backend_tokenizer.normalizer) == str(normalizers.NFC()) and not older_forms.cuts_alike(
        tokenizer, base
    )
    out = shutil.copytree(base, tmp_path / "out")
    merging_folder._write_tokenizer(Run(tmp_path, _recipe(base), Progress()), out, trained_here=True)
    assert older_forms.cuts_alike(tokenizer, out)
    assert json.loads((out / "tokenizer.json").read_text())["normalizer"] == {"type": "NFC"}
    assert older_forms.cuts_alike(added_tokens.bare_tokenizer(tiny_model, False), tiny_model)


STOPS = [
    # in generation_config.json, in config.json, trained; what both say afterwards
    ([0, 5, 2], 2, [2], [2, 0, 5]),
    ([0, 5, 2], 2, [7], [7, 0, 5, 2]),
    (None, [0, 5], [2], [2, 0, 5]),
    (None, None, [2], 2),
    (5, 6, [2, 9], [2, 9, 5, 6]),
    (50256, 2, [2], 2),  # a default of the library, of another vocabulary
    (-1, [-1, 5], [2], [2, 5]),  # what some configs have for "none"
]


@pytest.mark.parametrize(("generation", "config", "trained", "wanted"), STOPS)
def test_the_base_s_stop_tokens_stay(
    generation: Any, config: Any, trained: list[int], wanted: Any, tmp_path: Path
) -> None:
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(
            json.dumps({"eos_token_id": generation, "temperature": 0.6, "do_sample": False})
        )
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 100, "eos_token_id": config}))
    merging_folder.add_stop_tokens(tmp_path, trained)
    made = json.loads((tmp_path / "generation_config.json").read_text())
    assert made["eos_token_id"] == wanted == json.loads((tmp_path / "config.json").read_text())["eos_token_id"]
    assert generation is None or made["temperature"] == 0.6  # as it stood, whatever a library thinks of it


@pytest.mark.parametrize("wrong", ["</s>", 2.0, [[1]], [2, None], True])
@pytest.mark.parametrize("name", merging_folder.STOP_FILES)
def test_a_stop_token_that_is_not_an_id_is_refused(wrong: Any, name: str, tmp_path: Path) -> None:
    for file in merging_folder.STOP_FILES:
        value = {"eos_token_id": wrong if file == name else 2, "vocab_size": 100}
        (tmp_path / file).write_text(json.dumps(value), encoding="utf-8")
    with pytest.raises(ModelError, match="eos_token_id must be a token id") as caught:
        merging_folder.add_stop_tokens(tmp_path, [2])
    assert caught.value.source == tmp_path / name
