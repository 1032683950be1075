"""How an adapter starts: what is saved is right on the base as it was, whatever training began with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from helpers.tiny import tiny_settings
from helpers.training import Heard, _json, _run
from qkit import pipeline
from qkit.core.device import detect
from qkit.core.errors import MissingArtifact, ModelError, RecipeError
from qkit.merging.folder import write_folder
from qkit.model import source
from qkit.model.adapters import earlier, starts
from qkit.recipe.load import from_dict, load
from qkit.recipe.schema import Lora, Recipe
from qkit.run.directory import Run
from qkit.tasks.chat import TASK
from qkit.train import _earlier_adapter, stage
from qkit.train.trainers import open_trainer

PLAIN = {"load_in_4bit": False}
EXACT = TASK.GATES["exact"].max_difference or 0.0
IDS = torch.randint(3, 250, (2, 40), generator=torch.Generator().manual_seed(0))


def recipe_of(**sections: Any) -> Recipe:
    return from_dict({"task": "chat", "model": {"source": "x"}, "data": {}, **sections}, (), "the test")


def scores(model: Any) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=IDS).logits.float().log_softmax(-1)
    return logits


def in_fp32(trainer: Any) -> Any:
    """The model that the trainer holds, computed without rounding: inside the wrapper that computes in bf16."""
    model = trainer.base_model.eval()
    source.dequantize(model)
    torch.nn.Module.float(model)
    return model


def trained(root: Path, tiny_model: Path, **sections: Any) -> tuple[Run, Any, Path]:
    """A run whose adapter is saved, and its trainer, which holds the live model. `sections`: of the recipe."""
    train = {"max_steps": 4, "learning_rate": 2e-3, "num_train_epochs": 1}
    run, out = _run(root, tiny_model, Heard(), **{**sections, "train": {**train, **sections.get("train", {})}})
    trainer = open_trainer("chat").build_trainer(run, tiny_model, detect(), out)
    trainer.train()
    stage._save(trainer, tiny_model, run, out)
    return run, trainer, out / "adapter"


def merged(run: Run, out: Path, base: Any) -> Any:
    from transformers import AutoModelForCausalLM

    write_folder(run, out, base, dtype="float32")
    return AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()


CASES: dict[str, dict[str, Any]] = {
    "pissa": {"lora": {"init_lora_weights": "pissa"}, "quantization": PLAIN},
    "pissa in a few steps": {"lora": {"init_lora_weights": "pissa_niter_4"}, "quantization": PLAIN},
    "pissa with rslora": {"lora": {"init_lora_weights": "pissa", "use_rslora": True}, "quantization": PLAIN},
    "olora": {"lora": {"init_lora_weights": "olora"}, "quantization": PLAIN},
    "eva": {"lora": {"init_lora_weights": "eva"}, "quantization": PLAIN},
    "eva on 4 bits": {"lora": {"init_lora_weights": "eva"}},
    "loftq": {"lora": {"init_lora_weights": "loftq"}},
    "orthogonal": {"lora": {"init_lora_weights": "orthogonal"}, "quantization": PLAIN},
    "gaussian": {"lora": {"init_lora_weights": "gaussian"}, "quantization": PLAIN},
    "dora": {"lora": {"use_dora": True}, "quantization": PLAIN},
    "dora on 4 bits": {"lora": {"use_dora": True}},
    "plain on 16 bits": {"quantization": PLAIN},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_what_is_saved_is_the_live_model_on_the_base_as_it_was(name: str, tiny_model: Path, tmp_path: Path) -> None:
    run, trainer, adapter = trained(tmp_path / "run", tiny_model, **CASES[name])
    whole = merged(run, tmp_path / "merged", "dequantized" if run.recipe.quantization.load_in_4bit else "16bit")
    live, base = scores(in_fp32(trainer)), scores(_base(run, tiny_model))
    assert float((scores(whole) - live).abs().max()) < EXACT
    assert float((live - base).abs().max()) > 20 * EXACT  # training has changed something
    config = _json(adapter / "adapter_config.json")
    times = 2 if run.recipe.lora.takes_part_of_base else 1
    assert (config["r"], config["init_lora_weights"] in (True, "gaussian", "orthogonal")) == (4 * times, True)


def _base(run: Run, tiny_model: Path) -> Any:
    from qkit.model.load import load_reference

    model: Any = load_reference(tiny_model, run.recipe, detect(), None)
    torch.nn.Module.float(model)
    return model


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pissa", "olora"])
def test_a_start_in_the_base_changes_nothing_before_the_first_step(name: str, tiny_model: Path, tmp_path: Path) -> None:
    sections = {"lora": {"init_lora_weights": name}, "quantization": PLAIN}
    run, out = _run(tmp_path, tiny_model, **sections)
    trainer = open_trainer("chat").build_trainer(run, tiny_model, detect(), out)
    assert float((scores(in_fp32(trainer)) - scores(_base(run, tiny_model))).abs().max()) < EXACT / 10


@pytest.mark.slow
def test_loftq_starts_nearer_to_the_16_bit_model(tiny_model: Path, tmp_path: Path) -> None:
    from qkit.model.load import load_reference

    distances = {}
    for name in (True, "loftq"):
        run, out = _run(tmp_path / str(name), tiny_model, lora={"init_lora_weights": name, "r": 16})
        trainer = open_trainer("chat").build_trainer(run, tiny_model, detect(), out)
        plain = run.recipe.model_copy(update={"quantization": run.recipe.quantization.model_copy(update=PLAIN)})
        exact: Any = load_reference(tiny_model, plain, detect(), None)
        torch.nn.Module.float(exact)
        weights = dict(exact.named_parameters())
        in_fp32(trainer)
        distances[name] = sum(
            float(
                (layer.get_base_layer().weight + layer.get_delta_weight("default") - weights[f"{key}.weight"])
                .norm()
                .detach()
            )
            for key, layer in starts._layers(trainer.model)
        )
    assert distances["loftq"] < 0.8 * distances[True]


@pytest.mark.slow
def test_a_training_that_resumes_takes_the_same_part(tiny_model: Path, tmp_path: Path) -> None:
    """Of a start that is drawn: the one that was taken first is read, not drawn again."""
    sections = {"lora": {"init_lora_weights": "pissa_niter_2"}, "quantization": PLAIN}
    run, out = _run(tmp_path, tiny_model, **sections)
    first = open_trainer("chat").build_trainer(run, tiny_model, detect(), out)
    weights = {name: value.clone() for name, value in first.model.state_dict().items()}
    run = Run(run.root, run.recipe.model_copy(update={"seed": 7}))
    again = open_trainer("chat").build_trainer(run, tiny_model, detect(), out)
    for name, value in again.model.state_dict().items():
        assert torch.allclose(value, weights[name], atol=1e-6), name


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        (
            {"lora": {"init_lora_weights": "pissa"}},
            "takes a part out of the base weights, which 4 bits would round anew",
        ),
        (
            {"lora": {"init_lora_weights": "loftq"}, "quantization": PLAIN},
            "quantization.load_in_4bit=false loses nothing",
        ),
        (
            {"lora": {"init_lora_weights": "loftq", "use_dora": True}},
            "changes what lora.use_dora measures the lengths of",
        ),
        ({"lora": {"init_lora_weights": "pisa"}}, "must be true, pissa_niter_N or one of gaussian"),
        ({"lora": {"init_lora_weights": False}}, "must be true, pissa_niter_N or one of gaussian"),
        ({"lora": {"use_dora": True, "target_parameters": ["experts"]}}, "PEFT has no DoRA for lora.target_parameters"),
        (
            {"lora": {"init_lora_weights": "eva", "init_from": "x"}},
            "has no effect, because lora.init_from=x gives the weights",
        ),
    ],
)
def test_starts_that_do_not_go_together(sections: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        recipe_of(**sections)


# --- from an earlier adapter --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Run:
    """A trained run with an adapter on 16 bits. Not to be changed."""
    root = tmp_path_factory.mktemp("first")
    run, trainer, _ = trained(root, tiny_model, quantization=PLAIN)
    del trainer
    return run


@pytest.mark.slow
def test_an_adapter_that_goes_on_on_4_bits_is_not_rounded(first: Run, tiny_model: Path, tmp_path: Path) -> None:
    """TRL casts it to bf16 there."""
    from peft import get_peft_model_state_dict

    run, out = _run(tmp_path, tiny_model, lora={"init_from": str(first.root)})
    assert run.recipe.quantization.load_in_4bit
    held = get_peft_model_state_dict(open_trainer("chat").build_trainer(run, tiny_model, detect(), out).model)
    before = load_file(first.trained() / "adapter_model.safetensors")
    assert all(torch.equal(value, before[name]) for name, value in held.items())


def test_another_adapter_of_the_same_name_is_another_training(tmp_path: Path) -> None:
    folder = tmp_path / "first"
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")
    keys = []
    for number in range(2):
        save_file({"a": torch.full((2,), float(number))}, folder / "adapter_model.safetensors")
        settings = tiny_settings(Path("owner/x"), tmp_path / "rows.jsonl")
        settings["lora"]["init_from"] = str(folder)
        run = Run(tmp_path / "run", from_dict(settings, (), "the test"))
        keys.append(pipeline._earlier_adapter(run))
    assert keys[0] != keys[1] and len(keys[0]["lora.init_from"]) == 64


@pytest.mark.slow
def test_an_embedding_starts_at_zero_only(tiny_model: Path, tmp_path: Path) -> None:
    section = {"init_lora_weights": "pissa", "target_modules": ["q_proj", "embed_tokens"]}
    run, out = _run(tmp_path, tiny_model, lora=section, quantization=PLAIN)
    with pytest.raises(RecipeError, match=r"embed_tokens is an embedding: take it out of lora\.target_modules"):
        open_trainer("chat").build_trainer(run, tiny_model, detect(), out)


@pytest.mark.slow
@pytest.mark.parametrize("as_run", [True, False])
def test_training_goes_on_from_an_adapter(first: Run, tiny_model: Path, tmp_path: Path, as_run: bool) -> None:
    """It starts with its weights, which the merged model then contains."""
    named = str(first.root if as_run else first.root / "train" / "adapter")
    run, out = _run(tmp_path / "more", tiny_model, lora={"init_from": named}, quantization=PLAIN)
    trainer = open_trainer("chat").build_trainer(run, tiny_model, detect(), out)
    before = load_file(first.trained() / "adapter_model.safetensors")
    from peft import get_peft_model_state_dict

    held = get_peft_model_state_dict(trainer.model)
    assert held.keys() == before.keys() and all(torch.equal(value, before[name]) for name, value in held.items())
    run, trainer, _ = trained(tmp_path / "trained", tiny_model, lora={"init_from": named}, quantization=PLAIN)
    live = scores(in_fp32(trainer))
    assert float((scores(merged(run, tmp_path / "merged", "16bit")) - live).abs().max()) < EXACT
    note = _json(run.trained() / "qkit.json")
    assert note["init_from"]["folder"].endswith("adapter") and len(note["init_from"]["sha256"]) == 64


@pytest.mark.slow
@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"r": 8}, "the recipe has r=8, and the adapter another: set lora.r=4"),
        ({"use_dora": True}, "the recipe has use_dora=true, and the adapter another: set lora.use_dora=false"),
    ],
)
def test_other_settings_are_one_message(first: Run, tiny_model: Path, section: Any, said: str) -> None:
    how = Lora(**{"r": 4, "lora_alpha": 8, "init_from": str(first.root), **section})
    with pytest.raises(RecipeError, match=said):
        _earlier_adapter.check(how, tiny_model, tiny_model, print)


@pytest.mark.slow
def test_other_modules_are_named(first: Run, tiny_model: Path, tmp_path: Path) -> None:
    section = {"init_from": str(first.root), "target_modules": ["q_proj", "v_proj"]}
    run, out = _run(tmp_path, tiny_model, lora=section, quantization=PLAIN)
    with pytest.raises(RecipeError, match=r"it changes down_proj, gate_proj, .*: set lora.target_modules=\[down_proj,"):
        open_trainer("chat").build_trainer(run, tiny_model, detect(), out)


@pytest.mark.slow
def test_another_base_is_refused(first: Run, other_model: Path, tmp_path: Path) -> None:
    how = Lora(r=4, lora_alpha=8, init_from=str(first.root))
    with pytest.raises(ModelError, match="this adapter was trained on"):
        _earlier_adapter.check(how, other_model, tmp_path, print)


@pytest.mark.slow
def test_an_adapter_of_peft_goes_on_unchecked(first: Run, tiny_model: Path, tmp_path: Path) -> None:
    import shutil

    folder = shutil.copytree(first.trained(), tmp_path / "theirs")
    (folder / "qkit.json").unlink()
    said: list[str] = []
    _earlier_adapter.check(Lora(r=4, lora_alpha=8, init_from=str(folder)), tiny_model, tmp_path, said.append)
    assert len(said) == 1 and "its base is not checked" in said[0]


def test_a_folder_without_an_adapter(tmp_path: Path) -> None:
    with pytest.raises(MissingArtifact, match=r"lora.init_from=.* is not an adapter"):
        earlier.folder_of(str(tmp_path))


# --- to the artifacts ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pissa", "dora on 4 bits", "plain on 16 bits"])
def test_the_merged_model_passes_its_gate(name: str, tiny_recipe: Path, tmp_path: Path) -> None:
    raw = yaml.safe_load(tiny_recipe.read_text(encoding="utf-8"))
    for section, values in CASES[name].items():
        raw[section] = {**raw.get(section, {}), **values}
    raw |= {"export": {"formats": ["safetensors"]}, "bench": {"runtimes": ["transformers"]}, "verify": {}}
    raw["train"] = {"max_steps": 12, "learning_rate": 2e-3}
    (tmp_path / "how.yaml").write_text(yaml.safe_dump(raw), encoding="utf-8")
    run = Run.create(tmp_path / "run", load(tmp_path / "how.yaml"))
    for name_of_stage in ("data", "train", "evaluate", "merge", "export", "verify"):
        pipeline.execute(run, name_of_stage)
    entries = json.loads((run.folder("verify") / "parity.json").read_text(encoding="utf-8"))["parity"]
    assert {entries[artifact]["status"] for artifact in ("merged", "safetensors")} == {"passed"}, entries


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pissa", "eva", "dora"])
def test_an_adapter_under_a_new_head_starts_so_too(name: str, tmp_path: Path) -> None:
    from helpers.tiny_labelled import build_model, labelled_run

    model = build_model(tmp_path / "bert", "bert", initializer_range=0.1)
    section = {"r": 4, **({"use_dora": True} if name == "dora" else {"init_lora_weights": name})}
    run = labelled_run(tmp_path, model, lora=section, train={"max_steps": 20, "learning_rate": 1e-2})
    for name_of_stage in ("data", "train", "evaluate", "merge", "export", "verify"):
        pipeline.execute(run, name_of_stage)
    entries = _json(run.folder("verify") / "parity.json")["parity"]
    assert entries["merged"]["status"] == "passed", entries
    assert _json(run.trained() / "adapter_config.json")["r"] == (8 if name == "pissa" else 4)
