"""Shapes are right to the last parameter: published totals of known models, and the real model and files built here."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest

from qkit.core.errors import ModelError
from qkit.model import inventory
from qkit.model.config import FAMILIES, from_config, known_models, shape_of, source_of
from qkit.model.shape import (
    Shape,
    experts,
    layer_linears,
    linear_parameters,
    linears,
    modules,
    parameters,
    routers,
    vocabulary_modules,
)
from qkit.recipe.schema import Model

# Parameters as the models' safetensors files count them.
PUBLISHED = {
    "Qwen/Qwen2.5-0.5B": 494_032_768,
    "Qwen/Qwen2.5-1.5B": 1_543_714_304,
    "Qwen/Qwen2.5-3B": 3_085_938_688,
    "Qwen/Qwen2.5-7B": 7_615_616_512,
    "Qwen/Qwen2.5-14B": 14_770_033_664,
    "meta-llama/Llama-2-7b-hf": 6_738_415_616,
    "meta-llama/Llama-3.1-8B": 8_030_261_248,
    "meta-llama/Llama-3.2-1B": 1_235_814_400,
    "meta-llama/Llama-3.2-3B": 3_212_749_824,
    "mistralai/Mistral-7B-v0.1": 7_241_732_096,
    "mistralai/Mistral-7B-v0.3": 7_248_023_552,
    "HuggingFaceTB/SmolLM2-135M": 134_515_008,
    "HuggingFaceTB/SmolLM2-360M": 361_821_120,
    "HuggingFaceTB/SmolLM2-1.7B": 1_711_376_384,
    "microsoft/Phi-3-mini-4k-instruct": 3_821_079_552,
    "google/gemma-2-2b": 2_614_341_888,
    "google/gemma-2-9b": 9_241_705_984,
    "google/gemma-3-1b-it": 999_885_952,
    "Qwen/Qwen2.5-32B": 32_763_876_352,
    "Qwen/Qwen2.5-72B": 72_706_203_648,
    "Qwen/Qwen3-0.6B": 596_049_920,
    "Qwen/Qwen3-1.7B": 1_720_574_976,
    "Qwen/Qwen3-4B": 4_022_468_096,
    "Qwen/Qwen3-8B": 8_190_735_360,
    "Qwen/Qwen3-14B": 14_768_307_200,
    "Qwen/Qwen3-30B-A3B": 30_532_122_624,
    "meta-llama/Llama-3.1-70B": 70_553_706_496,
    "mistralai/Mixtral-8x7B-v0.1": 46_702_792_704,
    "microsoft/phi-4": 14_659_507_200,
    "microsoft/Phi-4-mini-instruct": 3_836_021_760,
}
TINY = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
}
TINY_GGUF = {
    "general.architecture": "llama",
    "llama.embedding_length": 64,
    "llama.feed_forward_length": 128,
    "llama.block_count": 2,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "llama.rope.freq_base": 10000.0,
    "tokenizer.ggml.tokens": [f"t{i}" for i in range(300)],
    "tokenizer.ggml.token_type": [1] * 300,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_known_models_have_their_published_number_of_parameters(name: str) -> None:
    shape = shape_of(Model(source=name))
    assert shape.exact
    assert parameters(shape) == PUBLISHED[name]


def test_every_known_model_is_checked() -> None:
    groups: dict[str, list[str]] = {}
    for name, config in known_models().items():
        groups.setdefault(json.dumps(config, sort_keys=True), []).append(name)
    unchecked = [names for names in groups.values() if not set(names) & set(PUBLISHED)]
    assert unchecked == []


def test_folder_agrees_with_the_real_model(tiny_model: Path) -> None:
    from transformers import AutoModelForCausalLM

    shape = shape_of(Model(source=str(tiny_model)))
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    assert parameters(shape) == model.num_parameters()
    assert (shape.kv, shape.attention, shape.tied) == (32, 64, model.config.tie_word_embeddings)


EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}


@pytest.mark.parametrize(
    "change",
    [
        {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
        {"model_type": "mistral", "head_dim": 32, "sliding_window": 16},
        {"model_type": "mixtral", "num_local_experts": 4},
        {"model_type": "qwen2", "tie_word_embeddings": True},
        {"model_type": "qwen2_moe", "num_experts": 4, "shared_expert_intermediate_size": 48, **EXPERTS},
        {"model_type": "qwen3", "head_dim": 32},
        {"model_type": "qwen3_moe", "num_experts": 4, "decoder_sparse_step": 2, **EXPERTS},
        {"model_type": "qwen3_moe", "num_experts": 4, "mlp_only_layers": [0], **EXPERTS},
        {"model_type": "phi3"},
        {"model_type": "phimoe", "num_local_experts": 4, "attention_bias": True, "lm_head_bias": True},
        {"model_type": "gemma", "head_dim": 32},
        {"model_type": "gemma2", "head_dim": 32},
        {"model_type": "gemma3_text", "head_dim": 32},
        {"model_type": "smollm3"},
        {"model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 96},
        {"model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 4, "n_inner": 96, "tie_word_embeddings": True},
        {"model_type": "olmo2"},
        {"model_type": "gpt_oss", "num_local_experts": 4, "num_experts_per_tok": 2},
        {"model_type": "granite", "attention_bias": True, "mlp_bias": True},
    ],
    ids=lambda change: " ".join(map(str, change.values())),
)
def test_every_family_has_as_many_parameters_as_its_class_in_transformers(change: dict[str, Any]) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    special = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 1}
    config = AutoConfig.for_model(**{**TINY, **special, "tie_word_embeddings": False, **change})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shape = from_config(config.to_dict(), "x")
    assert shape.exact
    assert parameters(shape) == model.num_parameters()
    found = inventory.inventory_of(model)
    assert (set(found.linears), set(found.others)) == (set(modules(shape)), set(vocabulary_modules(shape)))
    assert (found.experts, found.routers) == (experts(shape), routers(shape))
    assert found.renamed == dict(shape.expert_names)
    assert sum(linear.weights * count for linear, count in linears(shape)) == linear_parameters(shape)


def test_families_are_all_checked_against_transformers() -> None:
    checked = test_every_family_has_as_many_parameters_as_its_class_in_transformers.pytestmark[0].args[1]
    assert {change["model_type"] for change in checked} == set(FAMILIES)


def test_model_that_sees_images_is_planned_by_its_text_part_and_not_called_exact() -> None:
    shape = from_config({"model_type": "gemma3", "text_config": {**TINY, "model_type": "gemma3_text"}}, "x")
    assert (shape.architecture, shape.exact) == ("gemma3_text", False)


def test_known_model_is_found_by_its_name_alone() -> None:
    assert source_of("qwen3-8b") == "Qwen/Qwen3-8B"
    assert source_of("nobody/nothing") == "nobody/nothing"


def test_config_file_itself_is_a_source(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(TINY), encoding="utf-8")
    assert shape_of(Model(source=str(tmp_path / "config.json"))) == shape_of(Model(source=str(tmp_path)))


def test_families_differ_in_biases_and_matrices() -> None:
    names = {kind: layer_linears(from_config({**TINY, "model_type": kind}, "x")) for kind in ("llama", "qwen2", "phi3")}
    assert [linear.bias for linear in names["llama"]] == [False] * 7
    assert [linear.bias for linear in names["qwen2"]] == [True, True, True, False, False, False, False]
    assert [linear.name for linear in names["phi3"]] == [
        "self_attn.qkv_proj",
        "self_attn.o_proj",
        "mlp.gate_up_proj",
        "mlp.down_proj",
    ]


def test_unknown_family_is_planned_and_not_called_exact() -> None:
    assert not from_config({**TINY, "model_type": "newcomer"}, "x").exact


def test_unknown_experts_are_planned_and_not_called_exact() -> None:
    shape = from_config({**TINY, "num_local_experts": 8}, "x")
    assert (len(shape.sparse), shape.exact) == (2, False)


def test_config_that_lacks_a_size_is_refused() -> None:
    with pytest.raises(ModelError, match="lacks intermediate_size"):
        from_config({**TINY, "intermediate_size": None}, "somewhere")


def test_folder_without_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"contains no config\.json"):
        shape_of(Model(source=str(tmp_path)))


def test_damaged_config_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{", encoding="utf-8")
    with pytest.raises(ModelError, match="cannot be read"):
        shape_of(Model(source=str(tmp_path)))


def test_hub_model_that_cannot_be_had_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = pytest.importorskip("huggingface_hub")

    def unreachable(*_: Any, **__: Any) -> str:
        raise hub.errors.LocalEntryNotFoundError("offline")

    monkeypatch.setattr(hub, "hf_hub_download", unreachable)
    with pytest.raises(ModelError, match=r"nobody/nothing: .*not in the hub's cache.*local folder"):
        shape_of(Model(source="nobody/nothing"))


def test_gated_model_says_where_to_log_in(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = pytest.importorskip("huggingface_hub")

    def gated(*_: Any, **__: Any) -> str:
        raise hub.errors.GatedRepoError.__new__(hub.errors.GatedRepoError)

    monkeypatch.setattr(hub, "hf_hub_download", gated)
    with pytest.raises(ModelError, match=r"is gated; accept its licence .* `hf auth login`"):
        shape_of(Model(source="nobody/nothing"))


# --- .gguf ----------------------------------------------------------------------------------------------------------


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def encoded(value: Any) -> bytes:
    """A GGUF value with its type before it."""
    match value:
        case str():
            return struct.pack("<I", 8) + text(value)
        case float():
            return struct.pack("<If", 6, value)
        case [str(), *_]:
            return struct.pack("<IIQ", 9, 8, len(value)) + b"".join(map(text, value))
        case list():
            return struct.pack("<IIQ", 9, 5, len(value)) + struct.pack(f"<{len(value)}i", *value)
        case _:
            return struct.pack("<II", 4, value)


def gguf(metadata: dict[str, Any], tensors: list[str], version: int = 3) -> bytes:
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(metadata))
    pairs = b"".join(text(key) + encoded(value) for key, value in metadata.items())
    return head + pairs + b"".join(text(name) + struct.pack("<IQQIQ", 2, 64, 64, 0, 0) for name in tensors)


def write(folder: Path, content: bytes) -> Model:
    file = folder / "model.gguf"
    file.write_bytes(content)
    return Model(source=str(file))


@pytest.mark.parametrize("tied", [True, False])
def test_gguf_header_gives_the_shape_of_its_config(tmp_path: Path, tied: bool) -> None:
    tensors = ["token_embd.weight", "blk.0.attn_q.weight", *([] if tied else ["output.weight"])]
    expected = from_config({**TINY, "tie_word_embeddings": tied}, "x")
    assert shape_of(write(tmp_path, gguf(TINY_GGUF, tensors))) == expected


def test_gguf_biases_are_read_off_the_tensors(tmp_path: Path) -> None:
    shape = shape_of(write(tmp_path, gguf(TINY_GGUF, ["token_embd.weight", "blk.0.attn_q.bias"])))
    assert shape.attention_bias


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"GGML", "not a GGUF file"),
        (gguf(TINY_GGUF, ["a"])[:200], "damaged or truncated"),
        (gguf(TINY_GGUF, ["a"])[:-3], "damaged or truncated"),
        (gguf(TINY_GGUF, [], version=1), "version 1"),
        (gguf({"general.architecture": "llama"}, ["a"]), "lacks hidden_size"),
    ],
)
def test_broken_gguf_is_refused(tmp_path: Path, content: bytes, said: str) -> None:
    with pytest.raises(ModelError, match=said):
        shape_of(write(tmp_path, content))


def test_shape_is_a_value() -> None:
    assert from_config(TINY, "x") == from_config(TINY, "y")
    assert isinstance(from_config(TINY, "x"), Shape)
