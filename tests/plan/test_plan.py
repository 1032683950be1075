"""The plan against exact layouts, against what training was measured to take, and against common sense."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.paths import ROOT
from qkit.core.device import Device
from qkit.core.errors import ModelError, UserError
from qkit.core.figures import GIB, MIB
from qkit.model.config import known_models, shape_of
from qkit.model.shape import Linear, parameters
from qkit.plan import _optimizer_state, fixed_memory, gpus, published, remedies, solve
from qkit.plan import items as plan_items
from qkit.plan import plan as plan_plan
from qkit.plan._known import Known
from qkit.recipe.load import from_dict
from qkit.recipe.schema import Recipe
from qkit.recipe.training import Train

CPU = Device("cpu", "Some CPU", 16 * GIB, 2)
RTX_4090 = gpus.device("rtx-4090")
MISTRAL = "mistralai/Mistral-7B-v0.1"
SMALL = "HuggingFaceTB/SmolLM2-135M-Instruct"


def recipe(source: str = SMALL, **sections: Any) -> Recipe:
    """A recipe for `source`; sections as dictionaries."""
    sections.setdefault("data", {})
    return Recipe.model_validate({"task": "chat", "model": {"source": source}, **sections})


def item(made: plan_plan.Plan, name: str) -> plan_items.MemoryItem:
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
        assert round(fixed_memory.weight_bytes(how, shape_of(how.model)) / GIB, 2) == pytest.approx(expected, abs=0.011)


def test_16_bit_weights_are_all_parameters_in_two_bytes() -> None:
    how = recipe(MISTRAL, quantization={"load_in_4bit": False}, merge={"base": "16bit"})
    assert (
        fixed_memory.weight_bytes(how, shape_of(how.model)) == 2 * 7_241_732_096 + 512
    )  # and the rotary frequencies, twice in fp32


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("size", [(64, 64), (576, 192), (100, 30)])
def test_4_bit_matrix_is_as_large_as_bitsandbytes_makes_it(size: tuple[int, int], double: bool) -> None:
    torch = pytest.importorskip("torch")
    functional = pytest.importorskip("bitsandbytes.functional")
    packed, state = functional.quantize_4bit(torch.randn(size), compress_statistics=double, quant_type="nf4")
    parts = [packed, state.absmax, state.code]
    if double:
        parts += [state.offset, state.state2.absmax]  # the nested code is one table for the whole model
    assert fixed_memory.quantized_bytes(size[0] * size[1], double) == sum(
        part.numel() * part.element_size() for part in parts
    )


def test_adapter_of_a_7b_has_the_known_number_of_parameters() -> None:
    how = recipe(MISTRAL)
    assert fixed_memory.adapter_count(how, shape_of(how.model)) == 41_943_040


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
    assert len(fixed_memory.adapted(how, shape_of(how.model))) == modules


def test_target_that_names_nothing_is_refused() -> None:
    how = recipe(lora={"target_modules": ["query_proj"]})
    with pytest.raises(ModelError, match="names query_proj, which this model does not have"):
        plan_plan.plan(how, device=CPU)


def test_peft_trains_as_many_parameters(tiny_model: Path) -> None:
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    how = recipe(str(tiny_model), lora={"r": 4})
    adapter = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear")
    trained = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model), adapter)
    assert fixed_memory.adapter_count(how, shape_of(how.model)) == trained.get_nb_trainable_parameters()[0]


@pytest.mark.parametrize(
    ("optim", "expected"),
    [
        ("adamw_torch", 8 * 9096 + 2 * 4),  # and a step count for each matrix
        ("adamw_torch_fused", 8 * 9096 + 2 * 4),
        ("paged_adamw_32bit", 8 * 9096),
        ("paged_adamw_8bit", 2 * (8192 + 4 * 32 + 1024) + 8 * 904),  # matrices below 4,096 values stay in fp32
        ("adamw_bnb_8bit", 2 * (8192 + 4 * 32 + 1024) + 8 * 904),  # and a table of the 256 values for each moment
        ("lion_8bit", 8192 + 4 * 32 + 1024 + 4 * 904),
        ("adafactor", 4 * (64 + 128 + 8 + 113) + 2 * 4),  # a row and a column of each
        ("sgd", 0),
        ("someone_elses", 8 * 9096),
    ],
)
def test_optimizer_state(optim: str, expected: int) -> None:
    tensors = _optimizer_state.Tensor((64, 128)), _optimizer_state.Tensor((8, 113))
    assert _optimizer_state.state_bytes(Train(optim=optim), tensors) == expected


# --- measured -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("checkpointing", "double", "tensors_bytes", "resident_bytes"),
    [
        (False, True, 1_315_875_900, 1_980_420_096),
        (True, True, 509_928_508, 1_187_622_912),
        (False, False, 1_320_824_516, 1_985_548_288),
    ],
)
def test_plan_is_what_a_step_was_measured_to_take(
    checkpointing: bool, double: bool, tensors_bytes: int, resident_bytes: int
) -> None:
    """SmolLM2-135M on a CPU, 4 rows of 256 tokens, half of them with loss: tensors alive at the peak, and resident set."""
    how = recipe(
        quantization={"bnb_4bit_use_double_quant": double},
        data={"batch_tokens": 1024, "max_length": 256},
        train={"gradient_checkpointing": checkpointing},
    )
    items = plan_plan.predicted_items(how, CPU, Known(512))
    del items["kernels"]  # these steps had batches of one shape
    assert sum(items.values()) - items["process"] - items["allocator"] == pytest.approx(tensors_bytes, rel=0.001)
    assert sum(items.values()) == pytest.approx(resident_bytes, rel=0.03)


# --- common sense ---------------------------------------------------------------------------------------------------

DEVICES = st.sampled_from([CPU, RTX_4090])
SETTINGS = st.fixed_dictionaries(
    {
        "batch_tokens": st.integers(1024, 16384),
        "max_length": st.integers(64, 1024),
        "micro_batches": st.integers(1, 8),
        "accumulation": st.integers(1, 2),
        "offloading": st.booleans(),
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
            "micro_batches": values["micro_batches"],
            "merge": {"base": "16bit"},
            "model": {"source": SMALL, "attn_implementation": values["attention"]},
            "data": {
                "batch_tokens": max(values["batch_tokens"], values["max_length"]),
                "max_length": values["max_length"],
            },
            "lora": {"r": values["r"]},
            "quantization": {"load_in_4bit": four_bit, "bnb_4bit_use_double_quant": values["double"] or not four_bit},
            "train": {
                "gradient_checkpointing": values["checkpointing"],
                "gradient_accumulation_steps": values["accumulation"],
                "activation_offloading": values["offloading"],
                "optim": values["optim"],
            },
        }
    )


@settings(max_examples=40, deadline=None)
@given(SETTINGS, DEVICES)
def test_items_sum_to_the_peak_and_none_is_negative(values: dict[str, Any], device: Device) -> None:
    made = plan_plan.plan(from_settings(values), device=device)
    assert made.peak_bytes == sum(item.bytes for item in made.items)
    assert all(item.bytes >= 0 for item in made.items)
    assert made.fits == (made.peak_bytes <= made.device_bytes)


@settings(max_examples=100, deadline=None)
@given(SETTINGS, DEVICES, st.sampled_from(["batch_tokens", "max_length", "r"]), st.integers(1, 500))
def test_more_never_needs_less(values: dict[str, Any], device: Device, key: str, more: int) -> None:
    less = plan_plan.plan(from_settings(values), device=device)
    assert (
        plan_plan.plan(from_settings({**values, key: values[key] + more}), device=device).peak_bytes >= less.peak_bytes
    )


@settings(max_examples=60, deadline=None)
@given(SETTINGS, DEVICES, st.integers(400 * MIB, 3 * GIB))
def test_remedies_save_what_they_say(values: dict[str, Any], device: Device, limit: int) -> None:
    how = from_settings(values)
    made = plan_plan.plan(how, limit, device)
    saved = sum(remedy.saves_bytes for remedy in made.remedies)
    after = plan_plan.plan(set_one_by_one(how, made.remedies), limit, device)
    assert after.peak_bytes == made.peak_bytes - saved
    assert remedies.apply(how, made.remedies) == set_one_by_one(how, made.remedies)
    assert all(remedy.saves_bytes >= 0 for remedy in made.remedies)


@settings(max_examples=60, deadline=None)
@given(SETTINGS, DEVICES, st.integers(800 * MIB, 3 * GIB))
def test_no_remedy_of_a_list_that_fits_can_be_left_out(values: dict[str, Any], device: Device, limit: int) -> None:
    how = from_settings(values)
    chosen = plan_plan.plan(how, limit, device).remedies
    if not plan_plan.plan(remedies.apply(how, chosen), limit, device).fits:
        return
    for left_out in chosen:
        rest = [remedy for remedy in chosen if remedy is not left_out]
        assert not plan_plan.plan(remedies.apply(how, rest), limit, device).fits


def set_one_by_one(how: Recipe, chosen: tuple[remedies.Remedy, ...]) -> Recipe:
    """A recipe with remedies applied the way a user would, through validation."""
    raw = how.model_dump(mode="json")
    return from_dict(raw, [text for remedy in chosen for text in remedy.set], "the test")


def test_the_same_result_comes_before_another_and_the_cheaper_before_the_dearer() -> None:
    how = recipe(
        MISTRAL,
        data={"batch_tokens": 16384},
        quantization={"load_in_4bit": False},
        merge={"base": "16bit"},
        train={"gradient_checkpointing": False},
    )
    found = plan_plan.plan(how, device=gpus.device("rtx-4060")).remedies
    kept = [remedy.same_result for remedy in found]
    assert kept == sorted(kept, reverse=True)
    times = [remedy.time_factor for remedy in found if remedy.same_result]
    assert times == sorted(times)
    assert 1.3 < next(r for r in found if "gradient_checkpointing" in r.set[0]).time_factor < 1.5


def test_packs_are_made_smaller_and_more_of_them_accumulated() -> None:
    how = recipe(MISTRAL, data={"batch_tokens": 8192, "packing": True}, train={"gradient_checkpointing": True})
    found = plan_plan.plan(how, device=gpus.device("rtx-4060")).remedies
    assert ("data.batch_tokens=4096", "train.gradient_accumulation_steps=2") in [remedy.set for remedy in found]


def test_a_batch_of_one_row_cannot_be_divided() -> None:
    how = recipe(MISTRAL, data={"batch_tokens": 2048, "max_length": 2048})
    found = plan_plan.alternatives(how, plan_plan.plan(how, device=RTX_4090), RTX_4090)
    assert not [remedy for remedy in found if "micro_batches" in remedy.set[0]]


def test_a_cpu_has_no_host_to_send_activations_to() -> None:
    how = recipe(MISTRAL, train={"gradient_checkpointing": True})
    for device, expected in ((CPU, False), (RTX_4090, True)):
        found = plan_plan.alternatives(how, plan_plan.plan(how, device=device), device)
        assert expected == any("activation_offloading" in remedy.set[0] for remedy in found)


# --- gradient checkpointing where the recipe leaves it open ---------------------------------------------------------

SEVEN_BILLION = [
    name
    for name in known_models()
    if 6e9 < parameters(shape_of(recipe(name).model)) < 8.6e9 and not shape_of(recipe(name).model).sparse
]


@pytest.mark.parametrize("card", ["rtx-3090", "rtx-4090", "l4", "a10g"])
def test_a_7b_at_defaults_fits_24_gb_without_a_hand_on_it(card: str) -> None:
    assert len(SEVEN_BILLION) > 4
    for name in SEVEN_BILLION:
        made = plan_plan.plan(recipe(name), device=gpus.device(card))
        assert made.fits, (name, plan_plan.refusal(made))


@pytest.mark.parametrize("tokens", [1024, 4096, 16384])
@pytest.mark.parametrize(
    "device", [RTX_4090, gpus.device("rtx-3060-12gb"), gpus.device("h200"), CPU], ids=lambda d: d.name
)
def test_layers_are_computed_twice_only_where_the_plan_has_no_room_otherwise(device: Device, tokens: int) -> None:
    asked = recipe(MISTRAL, data={"batch_tokens": tokens, "max_length": 1024})
    on, off = (
        plan_plan.plan(
            remedies.apply(asked, [remedies.Remedy((f"train.gradient_checkpointing={word}",), 0, "")]), device=device
        )
        for word in ("true", "false")
    )
    found, made = plan_plan.checkpointing(asked, device), plan_plan.plan(asked, device=device)
    assert found.on == (not off.fits) and made == (on if found.on else off)
    assert f"{off.peak_bytes / GIB:.1f} GiB" in found.why
    assert plan_plan.decided(asked, device).train.gradient_checkpointing is found.on
    assert sum(plan_plan.predicted_items(asked, device).values()) == sum(
        plan_plan.predicted_items(plan_plan.decided(asked, device), device).values()
    )


def test_what_the_recipe_says_of_checkpointing_stands() -> None:
    for word in (True, False):
        asked = recipe(MISTRAL, train={"gradient_checkpointing": word})
        assert plan_plan.decided(asked, gpus.device("t4")) == asked == plan_plan.decided(asked, gpus.device("h200"))


def test_a_model_without_a_plan_takes_what_needs_least(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}', encoding="utf-8")
    assert plan_plan.checkpointing(recipe(str(tmp_path)), RTX_4090).on


# --- the further stages ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stage", "limit"), [("evaluate", 15 * GIB), ("merge", 16 * GIB), ("serve", 17 * GIB), ("load", 9 * GIB)]
)
def test_every_stage_that_does_not_fit_has_remedies_that_make_it_fit(stage: str, limit: int) -> None:
    sections: dict[str, Any] = {"serve": {"concurrency": 8}, "evaluate": {"batch_size": 64}}
    how = recipe(MISTRAL, quantization={"load_in_4bit": stage != "load"}, merge={"base": "16bit"}, **sections)
    made = plan_plan.plan(how, limit, RTX_4090, stage)
    assert not made.fits and made.remedies
    assert plan_plan.plan(set_one_by_one(how, made.remedies), limit, RTX_4090, stage).fits


def test_evaluate_and_merge_may_be_done_on_the_host() -> None:
    for stage, device, expected in (("evaluate", RTX_4090, True), ("merge", RTX_4090, True), ("evaluate", CPU, False)):
        made = plan_plan.plan(recipe("Qwen/Qwen2.5-14B"), GIB, device, stage)
        assert (f"`QKIT_DEVICE=cpu qkit {stage} RUN`" in plan_plan.refusal(made)) == expected


# --- asked the other way round --------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(SETTINGS, DEVICES, st.sampled_from(["max_length", "batch", "rank"]), st.integers(1200 * MIB, 6 * GIB))
def test_solving_and_planning_agree(
    values: dict[str, Any], device: Device, question: solve.Question, limit: int
) -> None:
    how = from_settings(values)
    solved = solve.solve(how, question, limit, device)
    step = solve.LENGTH_STEP if question == "max_length" else 1
    value = solved.value or 0
    assert isinstance(value, int)
    key = {"max_length": ("data.max_length", "data.batch_tokens"), "rank": ("lora.r",), "batch": ("data.batch_tokens",)}
    scale = how.data.max_length if question == "batch" else 1
    beyond = tuple(f"{name}={(value + step) * scale}" for name in key[question])
    if solved.plan:
        assert solved.plan.fits
        assert (
            plan_plan.plan(remedies.apply(how, [remedies.Remedy(solved.set, 0, "")]), limit, device).peak_bytes <= limit
        )
    if value + step <= solve.LONGEST:
        assert not plan_plan.plan(remedies.apply(how, [remedies.Remedy(beyond, 0, "")]), limit, device).fits


def test_smallest_card_fits_and_no_smaller_one_does() -> None:
    how = recipe("Qwen/Qwen2.5-14B", train={"gradient_checkpointing": True})
    solved = solve.solve(how, "card")
    assert isinstance(solved.value, str)
    chosen = gpus.CARDS[solved.value]
    smaller = [card for card in gpus.CARDS.values() if card.memory_bytes < chosen.memory_bytes]
    assert smaller
    assert not any(plan_plan.plan(how, device=gpus.device(card.name)).fits for card in smaller)
    assert solve.solve(recipe("Qwen/Qwen2.5-72B", data={"batch_tokens": 10**6}), "card").value is None


def test_a_row_is_no_longer_than_the_model_was_made_for(tiny_model: Path) -> None:
    positions = json.loads((tiny_model / "config.json").read_text(encoding="utf-8"))["max_position_embeddings"]
    assert solve.solve(recipe(str(tiny_model)), "max_length", device=RTX_4090).value == positions


# --- what the rows say ----------------------------------------------------------------------------------------------

LENGTHS = [[100, 50, 500], [300, 40, 800], [1500, 9, 450], [5000, 1, 250]]


def test_choices_of_length_keep_rows_and_tokens() -> None:
    table = solve.length_table(LENGTHS, recipe(MISTRAL, train={"gradient_checkpointing": True}), RTX_4090)
    assert table.percentiles == {"p50": 100, "p90": 300, "p99": 1500, "max": 5000}
    assert [choice.max_length for choice in table.choices] == [256, 512, 1024, 2048, 4096, 8192]
    assert [choice.rows for choice in table.choices] == [50, 90, 90, 99, 99, 100]
    assert [choice.labelled for choice in table.choices] == [500, 1300, 1300, 1750, 1750, 2000]
    peaks = [choice.peak_bytes for choice in table.choices]
    assert peaks == sorted(peaks)
    assert peaks[-1] > peaks[0]
    assert table.choices[0].seconds < table.choices[-1].seconds


def test_rows_say_how_much_of_a_batch_carries_loss() -> None:
    how = recipe(MISTRAL, data={"max_length": 1024, "batch_tokens": 3000})
    assert solve.labelled_of(LENGTHS, how) == 300  # of 5,000 tokens in rows of 100, 500 carry loss
    assert solve.labelled_of([], how) is None


# --- published figures -----------------------------------------------------------------------------------


def test_published_figures_differ_by_a_tenth_or_have_a_reason() -> None:
    how = recipe("meta-llama/Llama-3.1-8B", data={"max_length": 5789, "batch_tokens": 5789})
    stock, unsloth = published.anchors(how, RTX_4090)
    assert stock.peak_bytes == pytest.approx(24e9, rel=0.001)  # the longest row that was published for 24 GB
    for anchor in (stock, unsloth):
        assert bool(anchor.why) == (abs(anchor.ours_bytes / anchor.peak_bytes - 1) > 0.1)
    assert "16 x vocabulary" in stock.why
    assert published.anchors(recipe(SMALL), RTX_4090) == ()


# --- saying it ------------------------------------------------------------------------------------------------------


def test_refusal_names_numbers_the_largest_item_and_what_to_set() -> None:
    sections = {"data": {"batch_tokens": 4096, "max_length": 4096}, "train": {"gradient_checkpointing": False}}
    made = plan_plan.plan(recipe(MISTRAL, **sections), device=RTX_4090)
    assert not made.fits
    text = plan_plan.refusal(made)
    assert text.startswith(f"needs {made.peak_bytes / GIB:.1f} GiB; the RTX 4090 has 23.5 GiB. Largest: activations ")
    assert "Try train.gradient_checkpointing=true (-" in text
    assert "This still needs" not in text


def test_refusal_says_when_nothing_helps() -> None:
    made = plan_plan.plan(recipe("Qwen/Qwen2.5-14B"), device=gpus.device("rtx-4060"))
    assert "This still needs" in plan_plan.refusal(made)
    assert plan_plan.refusal(made).endswith("use a smaller model or a larger device.")


def test_prediction_leaves_out_what_the_meter_does_not_see() -> None:
    how = recipe(MISTRAL)
    names = [item.name for item in plan_plan.plan(how, device=RTX_4090).items]
    assert [name for name in names if name not in plan_plan.predicted_items(how, RTX_4090)] == ["context", "allocator"]
    assert [item.name for item in plan_plan.plan(how, device=CPU).items] == list(plan_plan.predicted_items(how, CPU))


def test_prediction_of_an_unknown_shape_is_none(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}', encoding="utf-8")
    assert plan_plan.predicted_items(recipe(str(tmp_path)), CPU) == {}


def test_serving_needs_16_bit_weights_and_a_cache() -> None:
    how = recipe(MISTRAL, serve={"max_model_len": 4096})
    made = plan_plan.plan(how, device=RTX_4090, stage="serve")
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
        ("NVIDIA RTX A6000", 49140, "rtx-a6000"),
        ("NVIDIA A10G", 23028, "a10g"),
        ("Tesla T4", 15360, "t4"),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", 4864, None),
    ],
)
def test_detected_cards_are_recognized(seen: str, mebibytes: int, card: str | None) -> None:
    device = Device("cuda", seen, mebibytes * MIB, 8)
    found = gpus.find(device)
    assert (found.name if found else None) == card
    assert 0.95 < gpus.usable_bytes(device) / device.memory_bytes < 1


@pytest.mark.parametrize("gigabytes", [8, 12, 16, 24, 48, 80])
def test_there_is_a_card_of_every_usual_size(gigabytes: int) -> None:
    assert any(0.9 < card.memory_bytes / (gigabytes * GIB) <= 1 for card in gpus.CARDS.values())


def test_device_for_the_command_line() -> None:
    assert plan_plan.device_for(None, None) is None
    assert plan_plan.device_for("rtx-4090", None) == RTX_4090
    given_size = plan_plan.device_for(None, "24GiB")
    assert given_size is not None
    assert given_size.memory_bytes == 24 * GIB
    smaller = plan_plan.device_for("h100", "8 gb")
    assert smaller is not None
    assert (smaller.name, smaller.memory_bytes) == ("H100", 8 * 10**9)


@pytest.mark.parametrize(("card", "memory"), [("rtx-4900", None), (None, "much"), (None, "0GiB"), (None, "-3GiB")])
def test_device_that_cannot_be_read_is_the_users_error(card: str | None, memory: str | None) -> None:
    with pytest.raises(UserError):
        plan_plan.device_for(card, memory)


def test_unknown_card_gets_a_suggestion() -> None:
    with pytest.raises(UserError, match="did you mean rtx-4090"):
        gpus.device("rtx4090")


def test_linear_counts_its_weights() -> None:
    assert Linear("x", 3, 5).weights == 15


def test_planning_loads_nothing_heavy() -> None:
    code = (
        "import sys; from pathlib import Path; from qkit.plan import plan; from qkit.recipe.load import load\n"
        "for file in sorted(Path('recipes').glob('*-24gb.yaml')):\n"
        "    plan.refusal(plan.plan(load(file), device=plan.device_for(None, '8GiB')))\n"
        "heavy = {'torch', 'transformers', 'numpy', 'datasets', 'trl', 'huggingface_hub', 'rich'} & {*sys.modules}\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
