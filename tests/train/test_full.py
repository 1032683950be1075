"""method=full for language models: what is trained, the same gradients whatever the batches, and the way to every artifact."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from helpers.command import qkit_here
from helpers.tiny import tiny_settings
from helpers.tiny_models import build, weightless
from helpers.training import Heard, _json, _losses, _run
from qkit import pipeline
from qkit.core.device import detect
from qkit.core.errors import NotDeployable, RecipeError
from qkit.measure import gates, parity
from qkit.measure import reference as measure_reference
from qkit.measure.held_out import held_out_of
from qkit.model.adapters import methods
from qkit.plugins.runtime import open_runtime
from qkit.recipe.load import from_dict, load
from qkit.recipe.schema import Recipe
from qkit.run.directory import Run
from qkit.train.checkpoints import SEAL
from qkit.train.trainers import open_trainer

FULL: dict[str, Any] = {"method": "full", "quantization": {"load_in_4bit": False}}


def recipe_of(**sections: Any) -> Recipe:
    raw = {"task": "chat", "model": {"source": "x"}, "data": {}, **FULL}
    return from_dict({**raw, **sections}, (), "the test")


def trained_names(model: Any) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


# --- what is trained ----------------------------------------------------------------------------------------------------


def test_all_weights_are_trained() -> None:
    model = weightless("llama")
    methods.with_method(model, (), recipe_of())
    assert trained_names(model) == {name for name, _ in model.named_parameters()}


def test_patterns_name_what_is_trained() -> None:
    model = weightless("llama")
    methods.with_method(model, (), recipe_of(train={"trainable": [r"layers\.1\.mlp", r"norm\.weight$"]}))
    assert {name for name in trained_names(model) if "norm" not in name} == {
        f"model.layers.1.mlp.{name}_proj.weight" for name in ("gate", "up", "down")
    }
    assert sum("norm" in name for name in trained_names(model)) == 5


@pytest.mark.parametrize("name", ["embed_tokens", "lm_head"])
def test_a_tied_weight_is_trained_by_either_name(name: str) -> None:
    model = weightless("llama", tie_word_embeddings=True)
    methods.with_method(model, (), recipe_of(train={"trainable": [name]}))
    assert trained_names(model) == {"model.embed_tokens.weight"}
    assert model.lm_head.weight.requires_grad


def test_the_lowest_layers_stay_as_they_are() -> None:
    model = weightless("llama")
    methods.with_method(model, (), recipe_of(layers={"frozen": 1}))
    names = trained_names(model)
    assert "lm_head.weight" in names and "model.layers.1.mlp.up_proj.weight" in names
    assert not [name for name in names if "layers.0" in name or "embed" in name]


@pytest.mark.parametrize(
    ("train", "said"),
    [
        (
            {"trainable": ["mlp.upproj"]},
            r"'mlp.upproj' is found in the name of no parameter of LlamaForCausalLM; near names: .*mlp.up_proj",
        ),
        ({"trainable": ["ZZZZ"]}, r"its names begin with: model.embed_tokens.weight"),
    ],
)
def test_a_pattern_that_matches_nothing(train: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        methods.with_method(weightless("llama"), (), recipe_of(train=train))


def test_nothing_is_left_to_train() -> None:
    how = recipe_of(train={"trainable": ["embed_tokens"]}, layers={"frozen": 1})
    with pytest.raises(RecipeError, match=r"layers.frozen=1 freezes everything that train.trainable names"):
        methods.with_method(weightless("llama"), (), how)


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"quantization": {}}, r"method=full saves a whole model, .* set quantization.load_in_4bit=false"),
        ({"method": "head"}, "method=head is for tasks with labels"),
        ({"method": "lora", "train": {"trainable": ["norm"]}}, "train.trainable names weights that method=full trains"),
        ({"method": "lora", "layers": {"frozen": 1}}, "layers divides the weights that method=full trains"),
        ({"method": "lora", "train": {"bf16": False}}, "or set method=full"),
        ({"train": {"trainable": ["("]}}, "not a regular expression"),
    ],
)
def test_what_does_not_go_together(sections: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        recipe_of(**sections)


# --- training -----------------------------------------------------------------------------------------------------------


def _trainer(run: Run, out: Path) -> Any:
    folder = Path(run.recipe.model.source)
    return open_trainer("chat").build_trainer(run, folder, detect(), out)


def _weights(root: Path, tiny_model: Path, **sections: Any) -> dict[str, torch.Tensor]:
    """The weights after one epoch of SGD in fp32, in which steps add up without the rounding of moments."""
    train = {
        "optim": "sgd",
        "bf16": False,
        "num_train_epochs": 1,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 1e9,
    }
    raw = {**FULL, **sections, "train": {**train, "learning_rate": 0.05, **sections.get("train", {})}}
    run, out = _run(root, tiny_model, **raw)
    trainer = _trainer(run, out)
    trainer.train()
    return {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}


@pytest.mark.slow
def test_micro_batches_and_checkpointing_change_nothing(tiny_model: Path, tmp_path: Path) -> None:
    plain = _weights(tmp_path / "plain", tiny_model)
    for name, sections in {
        "parts": {"micro_batches": 2},
        "checkpointing": {"train": {"gradient_checkpointing": True}},
    }.items():
        other = _weights(tmp_path / name, tiny_model, **sections)
        for key, value in plain.items():
            assert torch.allclose(other[key], value, atol=2e-6, rtol=1e-5), (name, key)
    start = load_file(tiny_model / "model.safetensors")
    assert all(bool((value != start[key].float()).any()) for key, value in plain.items())


@pytest.mark.slow
@pytest.mark.parametrize("packing", [False, True])
def test_a_step_is_that_of_transformers_own_loss(tiny_model: Path, tmp_path: Path, packing: bool) -> None:
    """All rows in one accumulated batch: one step of SGD on the mean over labels, by the model's own forward pass."""
    data = {"packing": packing}
    steps = {"max_steps": 1, "gradient_accumulation_steps": 64}
    found = _weights(tmp_path, tiny_model, data=data, train=steps)
    from helpers.training import _rows
    from qkit.core.batching import IGNORED

    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    rows = _rows()
    total = sum(label != IGNORED for row in rows for label in row["labels"])
    loss: Any = 0.0
    for row in rows:
        logits = model(torch.tensor([row["input_ids"]])).logits[0, :-1]
        loss = loss + torch.nn.functional.cross_entropy(
            logits, torch.tensor(row["labels"][1:]), ignore_index=IGNORED, reduction="sum"
        )
    (loss / total).backward()
    for name, parameter in model.named_parameters():
        assert torch.allclose(found[name], parameter.detach() - 0.05 * parameter.grad, atol=2e-6, rtol=1e-5), name


@pytest.mark.slow
def test_frozen_weights_keep_every_bit(tiny_model: Path, tmp_path: Path) -> None:
    run, out = _run(tmp_path, tiny_model, **FULL, train={"trainable": [r"layers\.1\."], "max_steps": 2})
    from qkit.train import stage

    stage.run(run, out)
    before, after = load_file(tiny_model / "model.safetensors"), load_file(out / "model" / "model.safetensors")
    for name, value in after.items():
        if "layers.1." in name:
            assert value.dtype == torch.float32 and not torch.equal(value, before[name].float()), name
        else:
            assert torch.equal(value, before[name]), name


@pytest.mark.slow
def test_rows_have_losses_before_and_after(tiny_model: Path, tmp_path: Path) -> None:
    from qkit.train import stage

    run, out = _run(
        tmp_path, tiny_model, **FULL, ledger={"losses": True}, train={"max_steps": 6, "learning_rate": 1e-3}
    )
    stage.run(run, out)
    rows = _losses(out)
    assert sum(row["loss_after"] < row["loss_before"] for row in rows) > len(rows) / 2


@pytest.mark.slow
def test_layers_join_one_after_another_and_learn_at_their_rates(tiny_model: Path, tmp_path: Path) -> None:
    run, out = _run(
        tmp_path, tiny_model, **FULL, layers={"unfreeze_steps": 1, "rate_decay": 0.5}, train={"max_steps": 2}
    )
    trainer = _trainer(run, out)
    seen: list[set[str]] = []
    step = trainer.training_step

    def noted(model: Any, *given: Any) -> Any:
        seen.append(trained_names(model))
        return step(model, *given)

    trainer.training_step = noted
    trainer.train()
    assert seen[0] == {"lm_head.weight", "model.norm.weight"}
    assert seen[1] - seen[0] and all("layers.1." in name for name in seen[1] - seen[0])
    rates = sorted({group["initial_lr"] for group in trainer.optimizer.param_groups}, reverse=True)
    assert rates == pytest.approx([1e-2, 5e-3, 2.5e-3, 1.25e-3])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
def test_a_killed_training_goes_on_to_the_same_bytes(name: str, tmp_path: Path, rows_file: Path) -> None:
    model = build(tmp_path / "model", name)
    raw = {
        **tiny_settings(model, rows_file),
        **FULL,
        "export": {"formats": ["safetensors"]},
        "bench": {"runtimes": ["transformers"]},
        "verify": {},
        "train": {"max_steps": 12, "save_steps": 2, "learning_rate": 1e-3},
    }
    (tmp_path / "full.yaml").write_text(yaml.safe_dump(raw), encoding="utf-8")
    whole, cut = (Run.create(tmp_path / root, load(tmp_path / "full.yaml")) for root in ("whole", "cut"))
    for run in (whole, cut):
        pipeline.execute(run, "data")
    pipeline.execute(whole, "train")
    process = subprocess.Popen([sys.executable, "-m", "qkit", "train", str(cut.root), "--quiet"])
    while not any((cut.root / ".work" / "train" / "checkpoints").glob(f"checkpoint-*/{SEAL}")):
        assert process.poll() is None
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert qkit_here("train", cut.root).returncode == 0
    files = [run.folder("train") / "model" / "model.safetensors" for run in (whole, cut)]
    assert files[0].read_bytes() == files[1].read_bytes()


# --- to the artifacts ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Run:
    """A run of method=full through `verify`. Not to be changed."""
    from helpers.tiny import chat_rows

    folder = tmp_path_factory.mktemp("full")
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in chat_rows(24)), encoding="utf-8")
    raw = {
        **tiny_settings(tiny_model, rows),
        **FULL,
        "train": {"max_steps": 12, "learning_rate": 1e-3},
        "export": {"formats": ["onnx-fp32", "safetensors", "gguf-f16"]},
    }
    raw["bench"]["runtimes"] = ["transformers", "onnx-fp32"]
    raw["verify"] = {}
    (folder / "full.yaml").write_text(yaml.safe_dump(raw), encoding="utf-8")
    heard = Heard()
    run = Run.create(folder / "run", load(folder / "full.yaml"), heard)
    for stage in ("data", "train", "evaluate", "merge", "export", "verify", "bench", "report"):
        pipeline.execute(run, stage)
    run.said = heard.lines  # type: ignore[attr-defined]
    return run


@pytest.mark.slow
def test_every_artifact_passes_its_gate(finished: Run) -> None:
    found = _json(finished.folder("verify") / "parity.json")
    judged = {name: entry["status"] for name, entry in found["parity"].items()}
    assert judged == {
        "trained": None,
        "merged": "passed",
        "onnx-fp32": "passed",
        "safetensors": "passed",
        "gguf-f16": "passed",
    }
    scores = _json(finished.folder("evaluate") / "scores.json")["scores"]
    assert scores.keys() == {"base", "trained"} and scores["trained"]["heldout_loss"] < scores["base"]["heldout_loss"]
    contract = {check["name"]: check["status"] for check in found["parity"]["merged"]["contract"]}
    assert set(contract.values()) <= {"ok", "noted", "not checked"} and contract["stop tokens"] == "ok"


@pytest.mark.slow
def test_the_merged_model_is_the_trained_one_rounded(finished: Run) -> None:
    trained = load_file(finished.trained() / "model.safetensors")
    merged = load_file(finished.folder("merge") / "model.safetensors")
    assert {value.dtype for value in trained.values()} == {torch.float32}
    assert merged.keys() == trained.keys()
    dtype = getattr(torch, _json(finished.folder("merge") / "config.json")["dtype"])
    assert all(torch.equal(merged[name], value.to(dtype)) for name, value in trained.items())
    assert any("nothing to merge" in line for line in finished.said)  # type: ignore[attr-defined]
    table = _json(finished.folder("merge") / "candidates.json")
    assert [row["what"] for row in table["candidates"]] == ["the trained weights, rounded: nothing was merged"]


@pytest.mark.slow
def test_the_reference_is_the_model_as_trained(finished: Run) -> None:
    """Its recorded scores are those of the trained weights in fp32, opened by transformers alone."""
    rows = held_out_of(finished).rows
    reference = measure_reference.recorded(finished, rows)
    with open_runtime("transformers", finished.trained(), detect(), dtype="float32") as runtime:
        assert parity.measure(reference, runtime.score(rows)).max_difference < 1e-4  # type: ignore[operator]


@pytest.mark.slow
def test_untrained_weights_fail_the_gate(finished: Run, tmp_path: Path) -> None:
    """The base in the place of what was made of it."""
    rows = held_out_of(finished).rows
    with open_runtime("transformers", Path(finished.recipe.model.source), detect()) as runtime:
        distance = parity.measure(measure_reference.recorded(finished, rows), runtime.score(rows))
    broken = gates.judge(gates.gate_of("merged", finished.recipe), distance)
    assert {"lost", "kl_mean"} <= {breach.gate for breach in broken}


@pytest.mark.slow
def test_the_report_and_the_card_say_what_was_trained(finished: Run) -> None:
    card = (finished.folder("merge") / "README.md").read_text(encoding="utf-8")
    page = (finished.folder("report") / "index.html").read_text(encoding="utf-8")
    assert "all weights" in card and "all weights" in page and "rank" not in card


def test_no_adapter_is_exported(tiny_recipe: Path) -> None:
    from qkit.plan import deployable

    raw = {**yaml.safe_load(tiny_recipe.read_text(encoding="utf-8")), **FULL, "export": {"formats": ["vllm-adapter"]}}
    raw["bench"] = {"runtimes": ["transformers"]}
    with pytest.raises(NotDeployable, match="method=full trains the weights themselves, so there is no adapter"):
        deployable.check(from_dict(raw, (), "the test"))


@pytest.mark.slow
def test_the_best_step_of_all_weights_is_restored(tiny_model: Path, tmp_path: Path, rows_file: Path) -> None:
    raw = {**tiny_settings(tiny_model, rows_file), **FULL}
    raw["data"]["validation"] = [{"source": str(rows_file), "rows": ":4"}]
    raw["data"]["test"] = [{"source": str(rows_file), "rows": "4:8"}]
    raw["data"]["train"] = [{"source": str(rows_file), "rows": "8:"}]
    raw["train"] = {
        "max_steps": 8,
        "learning_rate": 3e-2,
        "save_steps": 4,
        "eval_steps": 2,
        "load_best_model_at_end": True,
    }
    (tmp_path / "full.yaml").write_text(yaml.safe_dump(raw), encoding="utf-8")
    run = Run.create(tmp_path / "run", load(tmp_path / "full.yaml"))
    for stage in ("data", "train"):
        pipeline.execute(run, stage)
    found = _json(run.folder("train") / "validation.json")
    assert found["best"]["step"] in (2, 4, 6, 8), found
    assert (run.folder("train") / "model" / "model.safetensors").is_file()
