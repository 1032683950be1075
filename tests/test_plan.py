"""The plan against exact layouts, against what training was measured to take, and against common sense."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qkit import cards, plan
from qkit.device import Device
from qkit.errors import ModelError, UserError
from qkit.plan import GIB, MIB
from qkit.recipe import Recipe
from qkit.shape import Linear, Shape, shape_of

CPU = Device("cpu", "Some CPU", 16 * GIB, 2)
RTX_4090 = cards.device("rtx-4090")
MISTRAL = "mistralai/Mistral-7B-v0.1"
SMALL = "HuggingFaceTB/SmolLM2-135M-Instruct"


def recipe(source: str = SMALL, **sections: Any) -> Recipe:
    """A recipe for `source`; sections as dictionaries."""
    sections.setdefault("data", {})
    return Recipe.model_validate({"task": "chat", "model": {"source": source}, **sections})


def item(made: plan.Plan, name: str) -> plan.MemoryItem:
    return next(item for item in made.items if item.name == name)


# --- exact layouts --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "plain", "nested"),
    [
        ("meta-llama/Llama-2-7b-hf", 3.88, 3.60),
        (MISTRAL, 4.14, 3.84),
        ("Qwen/Qwen2.5-7B", 5.45, 5.17),
        ("meta-llama/Llama-3.1-8B", 5.61, 5.31),
    ],
)
def test_nf4_weights_in_gib(source: str, plain: float, nested: float) -> None:
    for double, expected in ((False, plain), (True, nested)):
        how = recipe(source, quantization={"bnb_4bit_use_double_quant": double})
        assert round(plan.weight_bytes(how, shape_of(how.model)) / GIB, 2) == pytest.approx(expected, abs=0.011)


def test_16_bit_weights_are_all_parameters_in_two_bytes() -> None:
    how = recipe(MISTRAL, quantization={"load_in_4bit": False}, merge={"base": "16bit"})
    assert plan.weight_bytes(how, shape_of(how.model)) == 2 * 7_241_732_096


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("size", [(64, 64), (576, 192), (100, 30)])
def test_4_bit_matrix_is_as_large_as_bitsandbytes_makes_it(size: tuple[int, int], double: bool) -> None:
    torch = pytest.importorskip("torch")
    functional = pytest.importorskip("bitsandbytes.functional")
    packed, state = functional.quantize_4bit(torch.randn(size), compress_statistics=double, quant_type="nf4")
    parts = [packed, state.absmax, state.code]
    if double:
        parts += [state.offset, state.state2.absmax]  # the nested code is one table for the whole model
    assert plan.quantized_bytes(size[0] * size[1], double) == sum(part.numel() * part.element_size() for part in parts)


def test_adapter_of_a_7b_has_the_known_number_of_parameters() -> None:
    how = recipe(MISTRAL)
    assert sum(plan.adapter_sizes(how, shape_of(how.model))) == 41_943_040


@pytest.mark.parametrize(
    ("targets", "modules"),
    [
        ("all-linear", 30 * 7),
        (("q_proj", "v_proj"), 30 * 2),
        (r".*layers\.[01]\..*proj", 2 * 7),
        (("lm_head", "embed_tokens"), 2),
    ],
)
def test_targets_are_read_as_peft_reads_them(targets: str | tuple[str, ...], modules: int) -> None:
    how = recipe(lora={"target_modules": targets})
    assert len(plan.adapted(how, shape_of(how.model))) == modules


def test_target_that_names_nothing_is_refused() -> None:
    how = recipe(lora={"target_modules": ["query_proj"]})
    with pytest.raises(ModelError, match="it has q_proj, k_proj"):
        plan.plan(how, device=CPU)


def test_peft_trains_as_many_parameters(tiny_model: Path) -> None:
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    how = recipe(str(tiny_model), lora={"r": 4})
    adapter = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear")
    trained = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model), adapter)
    assert sum(plan.adapter_sizes(how, shape_of(how.model))) == trained.get_nb_trainable_parameters()[0]


@pytest.mark.parametrize(
    ("optim", "expected"),
    [
        ("adamw_torch", 8 * 9096),
        ("adamw_torch_fused", 8 * 9096),
        ("paged_adamw_32bit", 8 * 9096),
        ("paged_adamw_8bit", 2 * (8192 + 4 * 32) + 8 * 904),  # matrices below 4,096 values stay in fp32
        ("adamw_bnb_8bit", 2 * (8192 + 4 * 32) + 8 * 904),
        ("lion_8bit", 8192 + 4 * 32 + 4 * 904),
        ("sgd", 0),
        ("someone_elses", 8 * 9096),
    ],
)
def test_optimizer_state(optim: str, expected: int) -> None:
    assert plan.optimizer_bytes(optim, [8192, 904]) == expected


# --- measured -------------------------------------------------------------------------------------------------------

MEASURED_SHAPE = Shape("llama", 3, 256, 1024, heads=8, kv_heads=4, head_dim=32, vocabulary=512, tied=True)


@pytest.mark.parametrize(
    ("device", "change", "bytes_per_token"),
    [
        (RTX_4090, {}, 12952),  # adapters that need no cast
        (RTX_4090, {"intermediate": 2048}, 21144),
        (RTX_4090, {"kv_heads": 8}, 13464),
        (RTX_4090, {"hidden": 512, "heads": 16, "kv_heads": 8}, 17592),
        (CPU, {}, 15000),
    ],
)
def test_bytes_of_a_layer_as_counted_by_hooks_on_saved_tensors(
    device: Device, change: dict[str, int], bytes_per_token: int
) -> None:
    from dataclasses import replace

    how = recipe(lora={"r": 8})
    assert plan.layer_bytes_per_token(how, replace(MEASURED_SHAPE, **change), device) == bytes_per_token


@pytest.mark.parametrize(
    ("source", "batch_tokens", "checkpointing", "labelled", "measured_bytes", "within"),
    [
        (SMALL, 2048, False, 552, 3949 * MIB, 0.05),  # the stage itself, 3 steps
        (SMALL, 2048, True, 552, 2590 * MIB, 0.1),
        (MISTRAL, 256, True, 256, 6.72 * GIB, 0.15),
    ],
)
def test_peak_resident_size_of_training_on_a_cpu(
    source: str, batch_tokens: int, checkpointing: bool, labelled: int, measured_bytes: float, within: float
) -> None:
    how = recipe(
        source,
        data={"batch_tokens": batch_tokens, "max_length": batch_tokens},
        train={"gradient_checkpointing": checkpointing},
    )
    assert plan.predicted_peak_bytes(how, "train", CPU, labelled) == pytest.approx(measured_bytes, rel=within)


# --- common sense ---------------------------------------------------------------------------------------------------

DEVICES = st.sampled_from([CPU, RTX_4090])
SETTINGS = st.fixed_dictionaries(
    {
        "batch_tokens": st.integers(256, 16384),
        "r": st.integers(1, 128),
        "checkpointing": st.booleans(),
        "four_bit": st.booleans(),
        "double": st.booleans(),
        "optim": st.sampled_from(["adamw_torch", "paged_adamw_8bit"]),
        "attention": st.sampled_from(["sdpa", "eager"]),
    }
)


def from_settings(values: dict[str, Any]) -> Recipe:
    four_bit = values["four_bit"]
    return Recipe.model_validate(
        {
            "task": "chat",
            "model": {"source": SMALL, "attn_implementation": values["attention"]},
            "data": {"batch_tokens": values["batch_tokens"], "max_length": 256},
            "lora": {"r": values["r"]},
            "quantization": {"load_in_4bit": four_bit, "bnb_4bit_use_double_quant": values["double"]},
            "train": {"gradient_checkpointing": values["checkpointing"], "optim": values["optim"]},
        }
    )


@settings(max_examples=40, deadline=None)
@given(SETTINGS, DEVICES)
def test_items_sum_to_the_peak_and_none_is_negative(values: dict[str, Any], device: Device) -> None:
    made = plan.plan(from_settings(values), device=device)
    assert made.peak_bytes == sum(item.bytes for item in made.items)
    assert all(item.bytes >= 0 for item in made.items)
    assert made.fits == (made.peak_bytes <= made.device_bytes)


@settings(max_examples=40, deadline=None)
@given(SETTINGS, DEVICES, st.sampled_from(["batch_tokens", "r"]), st.integers(1, 500))
def test_more_never_needs_less(values: dict[str, Any], device: Device, key: str, more: int) -> None:
    less = plan.plan(from_settings(values), device=device)
    assert plan.plan(from_settings({**values, key: values[key] + more}), device=device).peak_bytes >= less.peak_bytes


@settings(max_examples=40, deadline=None)
@given(SETTINGS, DEVICES, st.integers(400 * MIB, 3 * GIB))
def test_remedies_save_what_they_say(values: dict[str, Any], device: Device, limit: int) -> None:
    how = from_settings(values)
    made = plan.plan(how, limit, device)
    for remedy in made.remedies:
        for text in remedy.set:
            how = changed(how, text)
    saved = sum(remedy.saves_bytes for remedy in made.remedies)
    assert plan.plan(how, limit, device).peak_bytes == made.peak_bytes - saved
    assert all(remedy.saves_bytes > 0 for remedy in made.remedies)


def changed(how: Recipe, text: str) -> Recipe:
    """A recipe with one `--set` applied, the way a user would, through validation."""
    import yaml

    dotted, _, value = text.partition("=")
    section, _, key = dotted.partition(".")
    raw = how.model_dump(mode="json")
    raw[section][key] = yaml.safe_load(value)
    return Recipe.model_validate(raw)


# --- saying it ------------------------------------------------------------------------------------------------------


def test_refusal_names_numbers_the_largest_item_and_what_to_set() -> None:
    how = recipe(MISTRAL, data={"batch_tokens": 8192})
    made = plan.plan(how, device=RTX_4090)
    assert not made.fits
    text = plan.refusal(made)
    assert text.startswith(f"needs {made.peak_bytes / GIB:.1f} GiB; the RTX 4090 has 23.5 GiB. Largest: activations ")
    assert "Try train.gradient_checkpointing=true (-" in text
    assert "Even so" not in text


def test_refusal_says_when_nothing_helps() -> None:
    made = plan.plan(recipe("Qwen/Qwen2.5-14B"), device=cards.device("rtx-4060"))
    assert "Even so it needs" in plan.refusal(made)
    assert plan.refusal(made).endswith("take a smaller model or a larger device.")


def test_plan_is_json_and_screen_begins_with_the_verdict() -> None:
    from rich.console import Console

    made = plan.plan(recipe(MISTRAL), 4 * GIB, RTX_4090)
    assert json.loads(json.dumps(plan.to_dict(made)))["items"][0]["name"] == "weights"
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(plan.screen(made))
    assert console.export_text().startswith("train does not fit: needs ")


def test_prediction_leaves_out_what_the_meter_does_not_see() -> None:
    how = recipe(MISTRAL)
    names = [item.name for item in plan.plan(how, device=RTX_4090).items]
    assert [name for name in names if name not in plan.predicted_items(how, RTX_4090)] == ["context"]
    assert plan.predicted_peak_bytes(how, "train", RTX_4090) == sum(plan.predicted_items(how, RTX_4090).values())
    assert [item.name for item in plan.plan(how, device=CPU).items] == list(plan.predicted_items(how, CPU))
    assert plan.predicted_peak_bytes(how, "merge", CPU) is None


def test_prediction_of_an_unknown_shape_is_none(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}', encoding="utf-8")
    assert plan.predicted_items(recipe(str(tmp_path)), CPU) == {}
    assert plan.predicted_peak_bytes(recipe(str(tmp_path)), "train", CPU) is None


def test_serving_needs_16_bit_weights_and_a_cache() -> None:
    how = recipe(MISTRAL, serve={"max_model_len": 4096})
    made = plan.plan(how, device=RTX_4090, stage="serve")
    assert item(made, "weights").bytes == 2 * 7_241_732_096
    assert item(made, "kv_cache").bytes == 4096 * 2 * 32 * 8 * 128 * 2
    assert made.device_bytes == int(RTX_4090.memory_bytes * how.serve.gpu_memory_utilization)
    assert made.fits


# --- devices --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seen", "mebibytes", "card"),
    [
        ("NVIDIA GeForce RTX 4090", 24564, "rtx-4090"),
        ("NVIDIA GeForce RTX 4080 SUPER", 16376, None),
        ("NVIDIA GeForce RTX 3060", 12288, "rtx-3060-12gb"),
        ("NVIDIA GeForce RTX 3060", 8192, None),
        ("NVIDIA A100-SXM4-40GB", 40960, "a100-40gb"),
        ("NVIDIA A100 80GB PCIe", 81920, "a100-80gb"),
        ("NVIDIA H100 80GB HBM3", 81559, "h100"),
        ("NVIDIA H200", 143771, "h200"),
        ("NVIDIA L4", 23034, "l4"),
        ("NVIDIA L40S", 46068, "l40s"),
        ("NVIDIA A10G", 23028, "a10g"),
        ("Tesla T4", 15360, "t4"),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", 4864, None),
    ],
)
def test_detected_cards_are_recognized(seen: str, mebibytes: int, card: str | None) -> None:
    device = Device("cuda", seen, mebibytes * MIB, 8)
    found = cards.find(device)
    assert (found.name if found else None) == card
    assert 0.95 < cards.usable_bytes(device) / device.memory_bytes < 1


def test_device_for_the_command_line() -> None:
    assert plan.device_for(None, None) is None
    assert plan.device_for("rtx-4090", None) == RTX_4090
    given_size = plan.device_for(None, "24GiB")
    assert given_size is not None
    assert given_size.memory_bytes == 24 * GIB
    smaller = plan.device_for("h100", "8 gb")
    assert smaller is not None
    assert (smaller.name, smaller.memory_bytes) == ("H100", 8 * 10**9)


@pytest.mark.parametrize(("card", "memory"), [("rtx-4900", None), (None, "much"), (None, "0GiB"), (None, "-3GiB")])
def test_device_that_cannot_be_read_is_the_users_error(card: str | None, memory: str | None) -> None:
    with pytest.raises(UserError):
        plan.device_for(card, memory)


def test_unknown_card_gets_a_suggestion() -> None:
    with pytest.raises(UserError, match="did you mean rtx-4090"):
        cards.device("rtx4090")


def test_linear_counts_its_weights() -> None:
    assert Linear("x", 3, 5).weights == 15


def test_planning_loads_nothing_heavy() -> None:
    code = (
        "import sys; from pathlib import Path; from qkit import cards, plan, recipe\n"
        "for file in sorted(Path('recipes').glob('*-24gb.yaml')):\n"
        "    plan.refusal(plan.plan(recipe.load(file), device=plan.device_for(None, '8GiB')))\n"
        "heavy = {'torch', 'transformers', 'numpy', 'datasets', 'trl', 'huggingface_hub', 'rich'} & {*sys.modules}\n"
        "assert not heavy, heavy\n"
    )
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
