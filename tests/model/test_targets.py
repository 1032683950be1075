"""What `lora.target_modules` and `lora.target_parameters` name: the plan and the model agree, and a name that matches nothing is an error."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
from peft import get_peft_model

from helpers.tiny_models import ARCHITECTURES, MORE, build, config_of, weightless
from qkit.core.device import Device, detect
from qkit.core.errors import ModelError, NotDeployable, RecipeError
from qkit.model import load
from qkit.model.adapters import targets
from qkit.model.config import from_config
from qkit.model.shape import Shape, parameters
from qkit.plan import deployable, fixed_memory, sheet, train_step
from qkit.plan import plan as plan_plan
from qkit.recipe.load import from_dict
from qkit.recipe.schema import Recipe
from qkit.run.directory import Run
from qkit.server.lora import rank_for
from qkit.train import stage as train_stage
from qkit.train.trainers import sft

CPU = Device("cpu", "test", 64 * 2**30, cores=2)
LLAMAS_SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SEVEN = {"target_modules": LLAMAS_SEVEN}
MIXED: dict[str, Any] = {"mlp_only_layers": [0]}


def _recipe(lora: dict[str, Any], source: str = "x", **sections: Any) -> Recipe:
    raw = {
        "task": "chat",
        "model": {"source": source},
        "data": {},
        "lora": {"r": 4, "lora_alpha": 8, **lora},
        **sections,
    }
    return from_dict(raw, [], "a test")


@functools.lru_cache
def _shape(name: str, mixed: bool = False) -> Shape:
    return from_config(config_of(name, **(MIXED if mixed else {})).to_dict(), name)


def _folder(root: Path, name: str) -> str:
    (root / "config.json").write_text(json.dumps(config_of(name).to_dict()))
    return str(root)


# architecture, whether one of its layers has no experts, the recipe's section, adapter parameters where they are worth knowing by heart
COUNTS: list[tuple[str, bool, dict[str, Any], int | None]] = [
    *((name, False, {}, None) for name in (*ARCHITECTURES, *MORE)),
    ("mixtral", False, {}, 30_208),  # peft's own all-linear trains 30,752, the router's 544 among them
    ("mixtral", False, {"target_parameters": ["gate.weight"]}, 30_752),
    ("mixtral", False, {"target_modules": ["q_proj", "gate"]}, 1_568),
    ("mixtral", False, {"target_modules": ["gate"]}, 544),
    ("mixtral", False, {"target_modules": ["q_proj", "w1", "w2", "w3"]}, None),
    ("mixtral", False, {"target_modules": r"model\.layers\.0\..*q_proj"}, 512),
    ("mixtral", False, {"target_modules": r"model\.layers\.0\..*(q_proj|gate_up_proj)"}, None),
    ("mixtral", False, {"target_modules": r".*\.(w1|w2|w3|v_proj)"}, None),
    ("qwen3_moe", False, SEVEN, None),
    ("qwen3_moe", True, {}, None),
    ("qwen3_moe", True, SEVEN, None),
    ("qwen2_moe", False, SEVEN, None),
    ("gpt_oss", False, {}, 3_584),
    ("gpt_oss", False, {"target_parameters": ["gate_up_proj", "experts.down_proj", "router.weight"]}, None),
    ("gpt_oss", False, {"target_modules": ["q_proj", "router", "down_proj"]}, None),
    ("phi3", False, {"target_modules": ["qkv_proj", "down_proj"]}, None),
    ("gpt2", False, {"target_modules": ["c_proj", "wpe"]}, None),
    ("llama", False, SEVEN, 8_192),
    ("llama", False, {"target_modules": r".*(q_proj|v_proj)", "lora_dropout": 0.1}, None),
]


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False but the target module is `Conv1D`:UserWarning")
@pytest.mark.parametrize(("name", "mixed", "lora", "count"), COUNTS, ids=str)
def test_plan_counts_what_peft_trains(name: str, mixed: bool, lora: dict[str, Any], count: int | None) -> None:
    how, base = _recipe(lora), weightless(name, **(MIXED if mixed else {}))
    planned = fixed_memory.adapter_count(how, _shape(name, mixed))
    with targets.patterns_of_parameters():
        made = get_peft_model(base, sft.lora_config(how, base))
    assert planned == sum(p.numel() for p in made.parameters() if p.requires_grad)
    assert count in (None, planned)


WRONG: list[tuple[str, dict[str, Any], str]] = [
    (
        "llama",
        {"target_modules": ["q_proj", "k_porj"]},
        r"names k_porj, which this model does not have\. It has q_proj, k_proj",
    ),
    ("phi3", SEVEN, r"names q_proj, k_proj, v_proj, gate_proj, up_proj, which .*It has .*qkv_proj"),
    ("mixtral", SEVEN, r"names gate_proj, up_proj, which .*gate_up_proj"),
    ("gpt_oss", SEVEN, r"names gate_proj, up_proj, which .*gate_up_proj"),
    ("gpt2", {"target_modules": ["c_attn", "q_proj"]}, r"names q_proj, which .*c_attn, c_proj, c_fc"),
    ("mixtral", {"target_modules": ["q_proj", "w1"]}, r"w1 without w3: .*one parameter, gate_up_proj"),
    ("mixtral", {"target_modules": r".*\.(w1|q_proj)"}, r"w1 without w3"),
    (
        "llama",
        {"target_modules": "q_proj"},
        r"regular expression for the full name, such as model\.layers\.0.*\[q_proj\]",
    ),
    ("llama", {"target_modules": ".*(q_proj|lm_head)"}, r"matches lm_head, whose adapter would never be trained"),
    ("llama", {"target_modules": ".*"}, r"matches lm_head"),
    ("mixtral", {"target_modules": ".*"}, r"matches lm_head"),
    ("llama", {"target_modules": r"model.*"}, r"matches \d+ modules that are not linear.*the first is model\."),
    (
        "llama",
        {"target_modules": r".*layers\.0.*"},
        r"that are not linear.*the first is model\.layers\.0\. End the pattern with",
    ),
    ("gpt2", {"target_modules": r".*h\.1.*"}, r"that are not linear.*the first is transformer\.h\.1\."),
    ("phi3", {"target_modules": r".*mlp.*"}, r"that are not linear.*the first is model\.layers\.0\.mlp"),
    ("llama", {"target_modules": "(q_proj"}, r"not a valid regular expression"),
    ("llama", {"target_parameters": ["gate_up_proj"]}, r"lora\.target_parameters names gate_up_proj.*no experts"),
    (
        "gpt_oss",
        {"target_parameters": ["gate_up_porj"]},
        r"names gate_up_porj, which .*It has gate_up_proj, down_proj, router\.weight",
    ),
    (
        "mixtral",
        {"lora_dropout": 0.1},
        r"lora_dropout is set together with an adapter on model\.layers\.0\.mlp\.experts\.gate_up_proj",
    ),
]


@pytest.mark.parametrize(("name", "lora", "words"), WRONG, ids=str)
def test_name_that_matches_nothing_is_an_error_in_plan_and_before_training(
    name: str, lora: dict[str, Any], words: str, tmp_path: Path
) -> None:
    kept = {"export": {"formats": ["safetensors"]}, "bench": {"runtimes": ["transformers"]}}
    how = _recipe(lora, _folder(tmp_path, name), **kept)
    with pytest.raises(ModelError, match=words):
        plan_plan.plan(how, device=CPU)
    with pytest.raises(ModelError, match=words):
        sft.lora_config(how, weightless(name))
    (tmp_path / "run").mkdir()
    with pytest.raises(ModelError, match=words):
        train_stage.run(Run(tmp_path / "run", how), tmp_path / "out")  # before it looks for rows or weights


def test_plan_says_what_experts_cost_and_who_is_not_trained(tmp_path: Path) -> None:
    said = sheet.sheet(_recipe({}, _folder(tmp_path, "mixtral")), CPU).remarks
    assert "They take 393,216 bytes" in said[0] and "in 4 bits they would take" in said[0]
    assert any("router gets no adapter; lora.target_parameters=[gate.weight]" in line for line in said)
    said = sheet.sheet(
        _recipe({}, _folder(tmp_path, "gpt_oss"), quantization={"load_in_4bit": False}, merge={"base": "16bit"}), CPU
    ).remarks
    assert any("experts get no adapter; lora.target_parameters=[gate_up_proj, down_proj]" in line for line in said)
    assert not any("16 bits" in line for line in said)
    assert sheet.sheet(_recipe({}, _folder(tmp_path, "llama")), CPU).remarks == ()


def test_model_that_sees_images_is_refused_in_plan_and_before_training(tmp_path: Path) -> None:
    how = _recipe({}, _folder(tmp_path, "gemma3"))
    (tmp_path / "run").mkdir()
    for refuse in (
        lambda: sheet.sheet(how, CPU),
        lambda: train_stage.run(Run(tmp_path / "run", how), tmp_path / "out"),
    ):
        with pytest.raises(ModelError, match=r"multimodal model \(gemma3, with vision\)"):
            refuse()


def test_the_text_part_can_be_saved_as_the_refusal_says(tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    whole = AutoModelForImageTextToText.from_config(config_of("gemma3")).eval()
    text = AutoModelForCausalLM.from_config(whole.config.text_config).eval()
    text.model.load_state_dict(whole.model.language_model.state_dict())
    text.lm_head.load_state_dict(whole.lm_head.state_dict())
    text.to(whole.dtype).save_pretrained(tmp_path)
    ids = torch.tensor([[3, 4, 5, 6]])
    saved = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=whole.dtype).eval()
    torch.testing.assert_close(saved(ids).logits, whole(input_ids=ids).logits)
    how = _recipe({}, str(tmp_path))
    assert (
        deployable.refusals(
            how.model_copy(update={"export": how.export.model_copy(update={"formats": ("safetensors",)})})
        )
        == ()
    )


def test_plan_names_the_modules_that_peft_leaves_out() -> None:
    said = fixed_memory.remarks(_recipe({}), _shape("qwen3_moe", True))
    assert any("3 modules outside the experts (gate_proj, up_proj, down_proj;" in line for line in said)


@pytest.mark.parametrize("name", ["gpt_neox", "starcoder2", "granitemoe", "olmoe"])
def test_family_that_is_not_known_is_read_off_the_model_that_transformers_makes(name: str) -> None:
    sizes = _shape(name)
    assert sizes.outline and not sizes.exact
    assert parameters(sizes) == weightless(name).num_parameters()
    rotary = next(part.bytes for part in fixed_memory.base_weights(sizes, False, False).parts if part.name == "tables")
    assert fixed_memory.base_weights(sizes, False, False).bytes == 2 * parameters(sizes) + rotary


def test_model_for_which_transformers_has_no_sdpa_is_loaded_and_planned_eager(tmp_path: Path) -> None:
    how = _recipe({}, str(build(tmp_path / "model", "gpt_oss")))
    assert load.load_base(tmp_path / "model", how, detect()).config._attn_implementation == "eager"
    assert any("Attention is computed eagerly" in line for line in sheet.sheet(how, CPU).remarks)
    assert (
        train_step.step_of(how, _shape("gpt_oss"), CPU, None).eager
        and not train_step.step_of(how, _shape("llama"), CPU, None).eager
    )


def test_experts_with_an_adapter_are_in_the_plan_once_more() -> None:
    """Their sum with the delta is made in each forward, and kept until the backward pass."""
    both, none = _recipe({}), _recipe({"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]})
    sizes = _shape("mixtral")
    assert fixed_memory.folds(none, sizes) == (0, 0, 0)
    assert fixed_memory.folds(both, sizes) == (393_216 // 2, 2, 4 * 256 * 64 * 2)


def test_adapter_on_experts_is_not_promised_to_vllm(tmp_path: Path) -> None:
    formats = {"formats": ["vllm", "vllm-adapter"]}
    how = _recipe({}, _folder(tmp_path, "mixtral"), export=formats, bench={"runtimes": ["vllm"]})
    (refusal,) = deployable.refusals(how)
    assert refusal.format == "vllm-adapter" and "model.layers.0.mlp.experts.gate_up_proj and 3 more" in refusal.reason
    of_modules = _recipe({"target_modules": ["q_proj"]}, how.model.source, export=formats, bench={"runtimes": ["vllm"]})
    assert deployable.refusals(of_modules) == ()
    with pytest.raises(NotDeployable, match="adapts the parameters down_proj, gate_up_proj"):
        rank_for({"r": 4, "target_modules": ["q_proj"], "target_parameters": ["gate_up_proj", "down_proj"]})


def test_a_norm_that_a_pattern_matches_is_refused_before_training() -> None:
    with pytest.raises(ModelError, match=r"matches 4 modules that are not linear.*model\.layers\.0\.input_layernorm"):
        sft.lora_config(_recipe({"target_modules": r".*(q_proj|layernorm)"}), weightless("llama"))


def test_the_remedy_for_a_pattern_that_matches_too_much_is_taken() -> None:
    with pytest.raises(ModelError) as caught:
        targets.planned(_recipe({"target_modules": r".*layers\.0.*"}).lora, _shape("llama"))
    remedy = str(caught.value).partition("such as ")[2].partition(", or write")[0]
    how = _recipe({"target_modules": remedy})
    assert [target.matrix.name for target in targets.planned(how.lora, _shape("llama"))] == [
        f"model.layers.0.self_attn.{name}" for name in ("q_proj", "k_proj")
    ]
    get_peft_model(weightless("llama"), sft.lora_config(how, weightless("llama")))


@pytest.mark.parametrize(
    ("modules", "words"),
    [
        ([], "both empty: nothing would be trained"),
        ("", "both empty"),
        *((name, "as the string all-linear") for name in ("all_linear", "all linear", ["all-linear"], ["all_linear"])),
    ],
)
def test_no_modules_and_all_of_them_by_another_spelling(modules: Any, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        _recipe({"target_modules": modules})
    assert _recipe({"target_modules": [], "target_parameters": ["gate.weight"]})
    assert _recipe({"target_modules": "ALL-LINEAR"})


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"train": {"optim": "adamw_toch"}}, r"train\.optim=adamw_toch: unknown to transformers.*adamw_torch"),
        (
            {"model": {"source": "x", "attn_implementation": "spda"}},
            r"attn_implementation=spda: .*similar names: .*sdpa",
        ),
    ],
)
def test_names_that_transformers_does_not_know_are_refused_before_training(
    section: dict[str, Any], words: str, tmp_path: Path
) -> None:
    kept = {"export": {"formats": ["safetensors"]}, "bench": {"runtimes": ["transformers"]}}
    source = _folder(tmp_path, "llama")
    given = {name: {**part, "source": source} if name == "model" else part for name, part in section.items()}
    (tmp_path / "run").mkdir()
    with pytest.raises(RecipeError, match=words):
        train_stage.run(Run(tmp_path / "run", _recipe({}, source, **{**kept, **given})), tmp_path / "out")
