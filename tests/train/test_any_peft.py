"""method=peft: kinds of adapters that PEFT has beside LoRA, through all stages, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from peft import PeftModel
from transformers import AutoModelForSequenceClassification

from helpers.tiny_labelled import build_model, labelled_run, settings, write_rows
from qkit import pipeline
from qkit.core.errors import NotDeployable, RecipeError, StageFailed
from qkit.model.adapters import methods
from qkit.recipe.load import from_dict
from qkit.recipe.schema import Recipe
from qkit.run.stages import stages_of


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model(tmp_path_factory.mktemp("bert"), "bert", initializer_range=0.1)


def recipe_of(tmp_path: Path, **sections: Any) -> Recipe:
    return from_dict(settings(tmp_path, write_rows(tmp_path / "rows.jsonl", []), **sections), (), "the test")


@pytest.mark.slow
@pytest.mark.parametrize(
    "section",
    [
        {"peft_type": "IA3"},
        {"peft_type": "LORA", "r": 4, "use_dora": True, "target_modules": ["query", "value"]},
        {"peft_type": "HRA", "r": 4},  # its own layers cannot be traced; merged they can
        {"peft_type": "VERA", "r": 8},
        {"peft_type": "LOHA", "r": 4},
    ],
    ids=lambda section: section["peft_type"],
)
def test_a_kind_of_adapter_reaches_onnx(model: Path, tmp_path: Path, section: Any) -> None:
    train = {"max_steps": 40, "learning_rate": 1e-2, "save_steps": 40}
    run = labelled_run(tmp_path, model, method="peft", peft=section, train=train, export={"formats": ["onnx-fp32"]})
    assert "merge" not in {stage.name for stage in stages_of(run.recipe)}
    for stage in ("data", "train", "evaluate", "export", "verify"):
        pipeline.execute(run, stage)
    parity = json.loads((run.folder("verify") / "parity.json").read_text(encoding="utf-8"))["parity"]
    assert parity["onnx-fp32"]["status"] == "passed"
    config = json.loads((run.trained() / "adapter_config.json").read_text(encoding="utf-8"))
    assert {name: config[name] for name in section if name != "target_modules"} == {
        name: value for name, value in section.items() if name != "target_modules"
    }
    plain = AutoModelForSequenceClassification.from_pretrained(model, num_labels=3)
    loaded = PeftModel.from_pretrained(plain, str(run.trained()))
    assert sum(p.numel() for name, p in loaded.named_parameters() if "modules_to_save" in name) == 32 * 3 + 3


@pytest.mark.slow
def test_a_prompt_is_not_exported(model: Path, tmp_path: Path) -> None:
    section = {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 4}
    run = labelled_run(tmp_path, model, method="peft", peft=section, export={"formats": ["onnx-fp32"]})
    for stage in ("data", "train", "evaluate"):
        pipeline.execute(run, stage)
    with pytest.raises(NotDeployable, match="a prompt that was learned is no part of the model's graph"):
        pipeline.execute(run, "export")


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"peft_type": "IAA3"}, "peft.peft_type=IAA3 is none of .*, did you mean 'IA3'"),
        ({"peft_type": "ADALORA"}, "peft.peft_type=ADALORA: it needs a call after each step"),
        ({"peft_type": "P_TUNING"}, "a killed training could not go on; use PROMPT_TUNING"),
        ({"peft_type": "IA3", "target_module": ["query"]}, "IA3Config has no such field"),
    ],
)
def test_kinds_and_fields_that_do_not_exist(tmp_path: Path, section: Any, said: str) -> None:
    recipe = recipe_of(tmp_path, method="peft", peft=section)
    with pytest.raises(RecipeError, match=said):
        methods._with_any(None, ["classifier"], recipe)  # type: ignore[arg-type]


@pytest.mark.slow
def test_settings_that_peft_refuses_are_named(model: Path, tmp_path: Path) -> None:
    run = labelled_run(tmp_path, model, method="peft", peft={"peft_type": "MISS", "r": 64})
    pipeline.execute(run, "data")
    with pytest.raises((RecipeError, StageFailed), match="MissConfig refuses its settings for this model"):
        pipeline.execute(run, "train")


def test_the_kind_must_be_said(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"method=peft needs peft\.peft_type"):
        recipe_of(tmp_path, method="peft")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["PROMPT_TUNING", "PREFIX_TUNING"])
def test_prompts_before_a_head_that_looks_for_tokens(tmp_path: Path, kind: str) -> None:
    llama = build_model(tmp_path / "llama", "llama")
    base = AutoModelForSequenceClassification.from_pretrained(llama, num_labels=3)
    recipe = recipe_of(tmp_path, method="peft", peft={"peft_type": kind, "num_virtual_tokens": 4})
    with pytest.raises(RecipeError, match="would read padding behind a prompt that was learned"):
        methods._with_any(base, ["score"], recipe)
