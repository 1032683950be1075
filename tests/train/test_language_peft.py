"""method=peft on a language model: every kind of adapter is trained, merged and near the live model; or refused before loading."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftType

from helpers.training import Heard, _run
from qkit import pipeline
from qkit.core.device import detect
from qkit.core.errors import NotDeployable, RecipeError
from qkit.merging.folder import write_folder
from qkit.model import source
from qkit.model.adapters.methods import UNTRAINABLE
from qkit.plan import deployable
from qkit.recipe.load import from_dict, load
from qkit.run.directory import Run
from qkit.run.stages import stages_of
from qkit.tasks._conversation._methods import UNMERGEABLE
from qkit.tasks.chat import TASK
from qkit.train import stage
from qkit.train.trainers import open_trainer

PLAIN = {"load_in_4bit": False}
EXACT = TASK.GATES["exact"].max_difference or 0.0
IDS = torch.randint(3, 250, (2, 40), generator=torch.Generator().manual_seed(0))
MATRICES = ["q_proj", "v_proj", "up_proj", "down_proj"]

# What a kind needs in a model as narrow as the tiny one.
SETTINGS: dict[str, dict[str, Any]] = {
    "LORA": {"r": 4, "use_dora": True},
    "IA3": {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    "BOFT": {"boft_block_size": 4},
    "OFT": {"oft_block_size": 4},
    "LN_TUNING": {"target_modules": ["input_layernorm", "norm"]},
    "VERA": {"r": 8},
    "PVERA": {"r": 8},
    "FROD": {},
    "FOURIERFT": {"n_frequency": 100, "init_weights": True},
    "WAVEFT": {"n_frequency": 100},
    "VBLORA": {"num_vectors": 16, "vector_length": 32, "r": 4},
    "HRA": {"r": 4},
    "MISS": {"r": 4},
    "RANDLORA": {"r": 4},
    "ROAD": {"group_size": 32},
    "SHIRA": {"r": 4},
    "C3A": {"block_size": 32},
    "PSOFT": {"r": 8},
    "GRALORA": {"r": 8},
    "TRAINABLE_TOKENS": {"token_indices": [*range(3, 200)], "target_modules": ["embed_tokens"]},
}
KINDS = sorted(kind.name for kind in PeftType if kind.name not in {*UNTRAINABLE, *UNMERGEABLE})
NOT_HERE = {"ADAMSS": "needs scikit-learn", "BEFT": "the tiny model has no biases"}


def scores(model: Any) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=IDS).logits.float().log_softmax(-1)
    return logits


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Failed to load the CUDA extension", "ignore:Unsupported layer type")
@pytest.mark.filterwarnings("ignore:Setting boft_n_butterfly_factor", "ignore:Sparse invariant checks")
@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_is_merged_as_it_was_trained(kind: str, tiny_model: Path, tmp_path: Path) -> None:
    if kind in NOT_HERE:
        pytest.skip(NOT_HERE[kind])
    section = {"peft_type": kind, "target_modules": MATRICES, **SETTINGS.get(kind, {})}
    train = {"max_steps": 2, "num_train_epochs": 1, "learning_rate": 5e-3}
    run, out = _run(tmp_path / "run", tiny_model, Heard(), method="peft", peft=section, quantization=PLAIN, train=train)
    trainer = open_trainer("chat").build_trainer(run, tiny_model, detect(), out)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()
    assert any(not torch.equal(p, before[name]) for name, p in trainer.model.named_parameters() if name in before)
    stage._save(trainer, tiny_model, run, out)
    write_folder(run, tmp_path / "merged", "16bit", dtype="float32")
    from transformers import AutoModelForCausalLM

    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    live = torch.nn.Module.float(trainer.base_model.eval())
    assert float((scores(whole) - scores(live)).abs().max()) < EXACT


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["IA3", "OFT", "VERA", "LORA"])
def test_a_kind_on_4_bits_is_merged_into_dequantized_weights(kind: str, tiny_model: Path, tmp_path: Path) -> None:
    section = {"peft_type": kind, "target_modules": MATRICES, **SETTINGS.get(kind, {})}
    train = {"max_steps": 2, "num_train_epochs": 1, "learning_rate": 5e-3}
    run, out = _run(tmp_path / "run", tiny_model, Heard(), method="peft", peft=section, train=train)
    trainer = open_trainer("chat").build_trainer(run, tiny_model, detect(), out)
    trainer.train()
    stage._save(trainer, tiny_model, run, out)
    write_folder(run, tmp_path / "merged", "dequantized", dtype="float32")
    from transformers import AutoModelForCausalLM

    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    live = trainer.base_model.eval()
    source.dequantize(live)
    assert float((scores(whole) - scores(torch.nn.Module.float(live))).abs().max()) < EXACT


@pytest.mark.slow
def test_an_adapter_of_another_kind_reaches_its_artifacts(tiny_recipe: Path, tmp_path: Path) -> None:
    raw = yaml.safe_load(tiny_recipe.read_text(encoding="utf-8"))
    del raw["lora"]
    section = {"peft_type": "OFT", "oft_block_size": 4, "target_modules": MATRICES}
    raw |= {"method": "peft", "peft": section, "export": {"formats": ["safetensors", "onnx-fp32"]}, "verify": {}}
    raw["bench"] = {"runtimes": ["transformers"]}
    raw["train"] = {"max_steps": 12, "learning_rate": 2e-3}
    (tmp_path / "how.yaml").write_text(yaml.safe_dump(raw), encoding="utf-8")
    run = Run.create(tmp_path / "run", load(tmp_path / "how.yaml"))
    assert "merge" in {one.name for one in stages_of(run.recipe)}
    for name in ("data", "train", "evaluate", "merge", "export", "verify"):
        pipeline.execute(run, name)
    from helpers.training import _json

    entries = _json(run.folder("verify") / "parity.json")["parity"]
    assert {entries[name]["status"] for name in ("merged", "safetensors", "onnx-fp32")} == {"passed"}, entries
    card = (run.folder("merge") / "README.md").read_text(encoding="utf-8")
    assert "peft_type OFT" in card


# --- what is refused ----------------------------------------------------------------------------------------------------


def recipe_of(section: dict[str, Any], **sections: Any) -> Any:
    raw = {"task": "chat", "model": {"source": "x"}, "data": {}, "method": "peft", "peft": section}
    return from_dict({**raw, **sections}, (), "the test")


@pytest.mark.parametrize("kind", UNMERGEABLE)
def test_what_no_weight_can_take_up_is_refused(kind: str) -> None:
    with pytest.raises(RecipeError, match=f"peft.peft_type={kind}: .*use IA3"):
        recipe_of({"peft_type": kind})


@pytest.mark.parametrize(
    ("section", "more", "said"),
    [
        ({}, {}, "method=peft needs peft.peft_type"),
        ({"peft_type": "LORA", "init_lora_weights": "pissa"}, {}, "method=lora with lora.init_lora_weights=pissa"),
        (
            {"peft_type": "IA3"},
            {"model": {"source": "x", "add_tokens": ["<a>"]}},
            "method=peft does not train their embeddings",
        ),
        ({"peft_type": "IA3"}, {"lora": {"init_from": "x"}}, "lora.init_from goes on with LoRA"),
    ],
)
def test_what_does_not_go_together(section: dict[str, Any], more: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        recipe_of(section, **more)


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"method": "peft", "peft": {"peft_type": "OFT"}}, "vLLM serves LoRA only, and method=peft trains OFT"),
        ({"lora": {"use_dora": True}}, "vLLM does not serve DoRA"),
        ({"lora": {"r": 512, "init_lora_weights": "pissa"}, "quantization": PLAIN}, "is saved with rank 1024"),
        ({"lora": {"init_lora_weights": "loftq"}}, "makes up for what 4 bits lose"),
    ],
)
def test_what_vllm_cannot_serve_unmerged_is_said(tiny_recipe: Path, sections: dict[str, Any], said: str) -> None:
    raw = yaml.safe_load(tiny_recipe.read_text(encoding="utf-8"))
    raw |= {**sections, "export": {"formats": ["vllm-adapter"]}, "bench": {"runtimes": ["transformers"]}, "verify": {}}
    with pytest.raises(NotDeployable, match=said):
        deployable.check(from_dict(raw, (), "the test"))
