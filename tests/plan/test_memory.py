"""What autograd keeps of a layer, counted on real models by its own hooks, against the formulas."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from qkit.core import figures, memory_watch
from qkit.core.device import Device
from qkit.model.config import from_config, shape_of
from qkit.model.shape import Shape
from qkit.plan import _overhead, fixed_memory, gpus, stage_memory, train_step
from qkit.recipe.load import from_dict
from qkit.recipe.schema import Recipe

CPU = Device("cpu", "Some CPU", 2**34, 2)
GPU = Device("cuda", "Some GPU", 2**34, 2)
CONFIG = {
    "hidden_size": 128,
    "intermediate_size": 320,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 97,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
RANK, TOKENS = 8, 64


def recipe(attention: str = "sdpa", dropout: float = 0.0, **sections: Any) -> Recipe:
    raw = {
        "task": "chat",
        "model": {"source": "x", "attn_implementation": attention},
        "lora": {"r": RANK, "lora_dropout": dropout},
        "data": {"max_length": TOKENS, "batch_tokens": TOKENS},
    }
    return Recipe.model_validate({**raw, **sections})


def model(kind: str, layers: int, how: Recipe) -> Any:
    """A model of the family with frozen bf16 weights and an fp32 adapter, as training has it."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(kind, num_hidden_layers=layers, **CONFIG)
    base = AutoModelForCausalLM.from_config(
        config, dtype=torch.bfloat16, attn_implementation=how.model.attn_implementation
    )
    targets = how.lora.target_modules if isinstance(how.lora.target_modules, str) else list(how.lora.target_modules)
    section = LoraConfig(r=RANK, lora_dropout=how.lora.lora_dropout, target_modules=targets, task_type="CAUSAL_LM")
    return get_peft_model(base, section).train()


def kept_bytes(made: Any, positions: torch.Tensor | None = None) -> int:
    """Bytes of distinct storages that a forward pass keeps for the backward pass, the model's own left out."""
    known = {tensor.untyped_storage().data_ptr() for tensor in [*made.parameters(), *made.buffers()]}
    found: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in known:
            found[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    ids = torch.randint(2, 97, (1, TOKENS))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16):
        made.get_base_model().get_decoder()(input_ids=ids, position_ids=positions, use_cache=False)
    return sum(tensor.untyped_storage().nbytes() for tensor in found.values())


def shape(kind: str, layers: int) -> Shape:
    return from_config({"model_type": kind, "num_hidden_layers": layers, **CONFIG}, "x")


@pytest.mark.parametrize(
    ("kind", "attention", "dropout"),
    [
        *(
            (kind, "sdpa", 0.0)
            for kind in ("llama", "mistral", "qwen2", "qwen3", "phi3", "gemma", "gemma2", "gemma3_text")
        ),
        ("smollm3", "sdpa", 0.0),
        ("llama", "eager", 0.0),
        ("gemma2", "eager", 0.0),
        ("llama", "sdpa", 0.1),
    ],
)
def test_a_layer_keeps_what_the_formula_says_to_the_byte(kind: str, attention: str, dropout: float) -> None:
    how = recipe(attention, dropout)
    torch.manual_seed(0)
    counted = (kept_bytes(model(kind, 4, how)) - kept_bytes(model(kind, 2, how))) / 2
    four = shape(kind, 4)
    copies = train_step.AUTOCAST_BYTES * fixed_memory.adapter_count(how, four) / 4
    asked = train_step.step_of(how, four, CPU, None)
    assert counted == TOKENS * sum(train_step.kept_terms(asked).values()) + train_step.norm_offset_bytes(four) + copies


@pytest.mark.parametrize(
    "targets", [("q_proj", "v_proj"), ("o_proj",), ("gate_proj", "down_proj"), ("k_proj", "up_proj")]
)
def test_inputs_are_kept_for_adapters_only(targets: tuple[str, ...]) -> None:
    how = recipe(lora={"r": RANK, "target_modules": targets})
    counted = (kept_bytes(model("llama", 4, how)) - kept_bytes(model("llama", 2, how))) / 2
    four = shape("llama", 4)
    copies = train_step.AUTOCAST_BYTES * fixed_memory.adapter_count(how, four) / 4
    assert counted == TOKENS * sum(train_step.kept_terms(train_step.step_of(how, four, CPU, None)).values()) + copies


def test_a_layer_of_a_pack_keeps_its_mask_and_repeated_keys() -> None:
    how = recipe(data={"max_length": TOKENS, "batch_tokens": TOKENS, "packing": True})
    positions = (torch.arange(TOKENS) % 16)[None]
    counted = (kept_bytes(model("llama", 4, how), positions) - kept_bytes(model("llama", 2, how), positions)) / 2
    four = shape("llama", 4)
    copies = train_step.AUTOCAST_BYTES * fixed_memory.adapter_count(how, four) / 4
    assert counted == TOKENS * sum(train_step.kept_terms(train_step.step_of(how, four, CPU, None)).values()) + copies


def test_adapters_share_their_inputs_on_a_gpu() -> None:
    terms = [
        train_step.kept_terms(train_step.step_of(recipe(), shape("llama", 2), device, None)) for device in (CPU, GPU)
    ]
    assert terms[0].pop("adapters' inputs") == 2 * (5 * 128 + 128 + 320)
    assert terms[1].pop("adapters' inputs") == 2 * (2 * 128 + 320)
    assert terms[0] == terms[1]


def test_weights_by_kind_of_layer_sum_to_the_line() -> None:
    for device in (CPU, GPU):
        item = stage_memory.train_items(recipe(), shape("qwen3", 3), device, None)[0]
        assert item.name == "weights"
        assert item.bytes == sum(part.bytes for part in item.parts)


def test_experts_stay_in_16_bits() -> None:
    config = {**CONFIG, "model_type": "mixtral", "num_hidden_layers": 2, "num_local_experts": 4}
    parts = {
        part.name: part for part in stage_memory.train_items(recipe(), from_config(config, "x"), CPU, None)[0].parts
    }
    assert (parts["experts"].bytes, parts["router"].bytes) == (2 * 2 * 4 * 3 * 128 * 320, 2 * 2 * 4 * 128)
    assert "mlp" not in parts


def test_checkpointing_keeps_the_inputs_of_layers_and_one_layer() -> None:
    tokens = 4096
    data = {"max_length": tokens, "batch_tokens": tokens}
    how = recipe(train={"gradient_checkpointing": True}, data=data)
    few, many = (
        {item.name: item.bytes for item in stage_memory.train_items(how, shape("llama", layers), GPU, 1)}
        for layers in (8, 16)
    )
    assert many["activations"] - few["activations"] == 8 * tokens * 128 * 2


def test_windows_bound_the_cache() -> None:
    config = {**CONFIG, "model_type": "mistral", "num_hidden_layers": 4, "sliding_window": 100}
    windowed = from_config(config, "x")
    assert stage_memory.kv_bytes(windowed, 1000) == stage_memory.kv_bytes(windowed, 100)
    half = from_config({**config, "layer_types": ["sliding_attention", "full_attention"] * 2}, "x")
    assert stage_memory.kv_bytes(half, 1000) == (2 * 1000 + 2 * 100) * 2 * 2 * 64


@pytest.mark.parametrize("kind", ["llama", "phi3", "qwen3", "gemma2"])
def test_a_batch_of_prompts_takes_what_the_formula_says(kind: str) -> None:
    """Counted on a real model with its adapter in fp32, as answers are generated."""
    how = recipe(evaluate={"batch_size": 4, "max_new_tokens": 1})
    made, ids = model(kind, 2, how).eval(), torch.randint(2, 97, (4, TOKENS))
    with torch.inference_mode(), memory_watch.watching(made) as alive:
        before = alive.alive_bytes()
        made(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True, logits_to_keep=1)
    items = stage_memory.answer_items(how, shape(kind, 2))
    assert alive.peak_bytes() - before == pytest.approx(sum(item.bytes for item in items), rel=0.01)


def test_batches_of_answers_are_bounded_by_their_tokens() -> None:
    """A 7B model with 32 prompts of 1,024 tokens at once: what a layer made of them was in no item."""
    few, many = (
        {item.name: item.bytes for item in stage_memory.evaluate_items(how, shape_of(how.model), GPU)}
        for how in (_mistral(8), _mistral(32))
    )
    assert few["prefill"] == many["prefill"] == 8192 * 12 * (14336 + 4096)
    assert (
        few["kv_cache"] < many["kv_cache"] == 32 * stage_memory.kv_bytes(shape_of(_mistral(32).model), 8192 // 32 + 512)
    )


def _mistral(batch_size: int) -> Recipe:
    data, evaluate = {"max_length": 1024}, {"batch_size": batch_size, "max_new_tokens": 512}
    return recipe(model={"source": "mistralai/Mistral-7B-v0.3"}, data=data, evaluate=evaluate)


def test_conversations_fill_what_a_server_has_left() -> None:
    how = recipe(serve={"max_model_len": 1000})
    items = stage_memory.serve_items(how, shape("llama", 2), GPU)
    taken = sum(item.bytes for item in items if item.name != "kv_cache")
    each = stage_memory.kv_bytes(shape("llama", 2), 500)
    assert stage_memory.conversations(items, taken + 7 * each + 1, shape("llama", 2), 500) == 7
    assert stage_memory.conversations(items, taken - 1, shape("llama", 2), 500) == 0


@pytest.mark.parametrize(("block_mib", "share_mib"), [(28, 28), (8, 10), (11, 12), (0.5, 0.5), (3, 20 / 6)])
def test_blocks_leave_ends_of_their_segments(block_mib: float, share_mib: float) -> None:
    assert _overhead.segment_bytes(int(block_mib * figures.MIB)) == int(share_mib * figures.MIB)


def test_rows_of_added_tokens_are_trained_like_an_adapter() -> None:
    """Each is a row of the embedding, and of a head that is another matrix; both matrices are copied whole to put them in."""
    bare = from_dict({"task": "chat", "model": {"source": "meta-llama/Llama-3.1-8B"}, "data": {}}, (), "here")
    more = bare.model_copy(update={"model": bare.model.model_copy(update={"add_tokens": ("<a>", "<b>")})})
    shapes = [shape_of(how.model) for how in (bare, more)]
    assert shapes[1].vocabulary == shapes[0].vocabulary + 2
    before, after = (
        {item.name: item.bytes for item in stage_memory.train_items(how, of, gpus.device("rtx-4090"), 64)}
        for how, of in zip((bare, more), shapes, strict=True)
    )
    parameters = 2 * 2 * 4096
    assert after["adapter"] - before["adapter"] == 4 * parameters
    assert after["optimizer"] - before["optimizer"] == 8 * parameters + 2 * 4  # moments, and torch's counters
    assert after["weights"] - before["weights"] == 2 * parameters
    assert after["workspace"] >= 2 * shapes[1].vocabulary * 4096
