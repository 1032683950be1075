"""The plan of models with a new head: the tensors of a traced step against those of a real one, the batches that it takes."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from helpers import paths
from helpers.tiny_labelled import build_model, labelled_rows, labelled_run, settings, write_rows
from qkit import pipeline
from qkit.core import memory_watch
from qkit.core.device import Device, detect
from qkit.core.errors import ModelError, RecipeError
from qkit.plan import gpus, remedies, sheet, solve, speed
from qkit.plan import plan as plan_plan
from qkit.plan._known import Known
from qkit.plan._traced import items, shapes, step
from qkit.plan._traced import model as traced_model
from qkit.plan._traced.head import new_head
from qkit.recipe.load import from_dict
from qkit.recipe.schema import Recipe
from qkit.train import memory_report
from qkit.train.trainers import labelled

PATHS = {"PYTHONPATH": str(paths.ROOT)}
COUNTED = Known(labels=3)
CPU = Device("cpu", "Some CPU", 2**34, 2)
ROWS = 12
ENCODERS = ("roberta", "electra", "deberta", "deberta-v2", "mpnet", "distilbert", "modernbert", "llama")
UNTYPED = ("roberta", "electra")  # their tiny tokenizer gives no token types, although their tiny config has them
LONGEST = 11  # tokens
METHODS = ("full", "lora", "head", "houlsby", "pfeiffer", "parallel")


pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The folder of a tiny model of a kind, built once."""
    root, built = tmp_path_factory.mktemp("models"), set()

    def folder(kind: str, dtype: str = "float32") -> Path:
        name = f"{kind}-{dtype}"
        if name not in built:
            build_model(root / name, kind, dtype=dtype)
            built.add(name)
        return root / name

    return folder


def recipe(folder: Path, *overrides: str, **sections: Any) -> Recipe:
    return from_dict(settings(folder, folder / "rows.jsonl", **sections), overrides, "the test")


def items_of(how: Recipe, device: Device = CPU, stage: str = "train", known: Known = COUNTED) -> dict[str, int]:
    return {item.name: item.bytes for item in plan_plan.plan(how, device=device, stage=stage, known=known).items}


# --- planned against measured -------------------------------------------------------------------------------------------


def both(root: Path, folder: Path, **sections: Any) -> tuple[Mapping[str, int], Mapping[str, int]]:
    """Bytes by line at the peak of the second step of training, planned and measured; each step has the same batch of rows, padded."""
    train = {"max_steps": 2, "save_steps": 50, **sections.pop("train", {})}
    data = {"batch_tokens": 1024, "batch_rows": ROWS, **sections.pop("data", {})}
    run = labelled_run(root, folder, rows=labelled_rows(24 + ROWS), data=data, train=train, **sections)
    pipeline.execute(run, "data")
    trainer = labelled.build_trainer(run, folder, detect(), root)
    known = memory_report.known_of(trainer, 3)
    watcher = memory_watch.step_watcher()
    trainer.add_callback(watcher)
    trainer.train()
    assert len({tokens for tokens, _ in known.lengths}) > 3  # so there is a mask
    planned = plan_plan.predicted_items(run.recipe, CPU, known)
    return planned, memory_report._named(watcher.alive.items(), run.recipe)


def tensors(lines: Mapping[str, int]) -> int:
    return sum(size for name, size in lines.items() if name not in ("process", "allocator", "kernels"))


@pytest.mark.slow
@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("method", METHODS)
def test_tensors_of_a_step_by_method(models: Any, tmp_path: Path, method: str, bf16: bool) -> None:
    planned, measured = both(tmp_path, models("bert"), method=method, train={"bf16": bf16})
    assert planned["weights"] == measured["weights"]
    assert planned["optimizer"] == measured["optimizer"]
    assert tensors(planned) == tensors(measured)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ENCODERS)
def test_tensors_of_a_step_by_architecture(models: Any, tmp_path: Path, kind: str) -> None:
    planned, measured = both(tmp_path, models(kind))
    types = 8 * ROWS * LONGEST if kind in UNTYPED else 0  # planned, since the config knows two types
    assert tensors(planned) - types == tensors(measured)


@pytest.mark.slow
@pytest.mark.parametrize(
    "sections",
    [
        {"micro_batches": 3},
        {"method": "full", "micro_batches": 3},
        {"train": {"gradient_checkpointing": True}},
        {"method": "full", "train": {"gradient_checkpointing": True, "bf16": True}},
        {"model": {"attn_implementation": "eager"}},
        {"loss": {"label_smoothing": 0.1}},
        {"method": "full", "layers": {"frozen": 1}},
        {"head": {"pooling": "mean", "layers": 1}},
        {"method": "peft", "peft": {"peft_type": "IA3", "target_modules": ["query"], "feedforward_modules": []}},
    ],
    ids=lambda sections: json.dumps(sections)[1:-1].replace('"', ""),
)
def test_tensors_of_a_step_by_setting(models: Any, tmp_path: Path, sections: dict[str, Any]) -> None:
    planned, measured = both(tmp_path, models("bert"), **sections)
    assert tensors(planned) == pytest.approx(tensors(measured), rel=0.002)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "houlsby"])
def test_tensors_of_a_step_on_a_16_bit_base(models: Any, tmp_path: Path, method: str) -> None:
    planned, measured = both(tmp_path, models("bert", "bfloat16"), method=method, train={"bf16": True})
    assert planned["weights"] == measured["weights"]
    assert tensors(planned) == tensors(measured)


@pytest.mark.slow
@pytest.mark.parametrize("double", [False, True])
def test_tensors_of_a_step_on_a_4_bit_base(models: Any, tmp_path: Path, double: bool) -> None:
    quantization = {"load_in_4bit": True, "bnb_4bit_use_double_quant": double}
    planned, measured = both(tmp_path, models("bert"), quantization=quantization, train={"bf16": True})
    tables = 13 * (64 + 1024)  # of 13 matrices, each of which may have its own or share them
    assert planned["weights"] == pytest.approx(measured["weights"], abs=tables)
    rest = [tensors(lines) - lines["weights"] for lines in (planned, measured)]
    assert rest[0] == pytest.approx(rest[1], rel=0.02)


# --- traces ---------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_sizes_are_linear_in_rows(models: Any, kind: str) -> None:
    how = recipe(models(kind))
    setting = step.setting_of(how, new_head(how, COUNTED), gpu=False)
    direct, extended = step._traced(setting, 7, 20), step.traced(setting, 7, 20)
    assert extended == dataclasses.replace(direct, log=extended.log)
    assert extended.log.steps == direct.log.steps


def test_a_head_for_two_positions_and_one_for_tokens(models: Any) -> None:
    """Heads that other tasks have: the trace reads whatever logits there are."""
    logits = {"start_logits": 0, "logits": 1, "hidden_states": 2}
    assert list(step._heads(logits)) == [0, 1]


def test_a_gpu_keeps_no_scores_and_smaller_masks(models: Any) -> None:
    how, gpu = recipe(models("bert")), gpus.device("rtx-4090")
    eager = recipe(models("bert"), model={"attn_implementation": "eager"})
    on_cpu, on_gpu = (items_of(how, device)["activations"] for device in (CPU, gpu))
    assert on_gpu < 0.9 * on_cpu
    assert items_of(eager, gpu)["activations"] > on_gpu


def test_a_gpu_computes_layers_again(models: Any) -> None:
    how = recipe(
        models("bert"), train={"gradient_checkpointing": True, "bf16": True}, quantization={"load_in_4bit": True}
    )
    kept = recipe(models("bert"), train={"bf16": True}, quantization={"load_in_4bit": True})
    again, once = (items_of(each, gpus.device("rtx-4090"))["activations"] for each in (how, kept))
    assert again < 0.8 * once


def test_what_depends_on_values_is_refused(models: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    from transformers import BertForSequenceClassification

    def forward(self: Any, input_ids: Any, **_: Any) -> Any:
        return {"logits": torch.nonzero(input_ids).float()}

    monkeypatch.setattr(BertForSequenceClassification, "forward", forward)
    with pytest.raises(ModelError, match="a step on tensors without data is not possible"):
        items_of(recipe(models("bert"), data={"max_length": 21}))


# --- batches --------------------------------------------------------------------------------------------------------------


def test_the_largest_batch_of_unknown_rows(models: Any) -> None:
    how = recipe(models("bert"), data={"max_length": 32, "batch_tokens": 128, "batch_rows": 32})
    assert shapes.largest(how, Known()) == ((4, 32),)
    uneven = recipe(models("bert"), data={"max_length": 30, "batch_tokens": 100, "batch_rows": 32})
    assert shapes.largest(uneven, Known()) == ((4, 25), (3, 30))
    few = recipe(models("bert"), data={"max_length": 32, "batch_tokens": 128, "batch_rows": 2})
    assert shapes.largest(few, Known()) == ((2, 32),)


def test_the_largest_batch_of_known_rows(models: Any) -> None:
    known = Known(lengths=((4, 40), (10, 3), (50, 1)))
    how = recipe(models("bert"), data={"max_length": 32, "batch_tokens": 128, "batch_rows": 32})
    assert shapes.largest(how, known) == ((32, 4), (11, 10))  # 8 more of 4 tokens share a batch with those of 10
    dropped = recipe(models("bert"), data={"max_length": 32, "batch_tokens": 128, "batch_rows": 32, "too_long": "drop"})
    long = Known(lengths=((4, 2), (50, 3)))  # cut to 32 tokens, two of them beside the short rows; or dropped
    assert [shapes.largest(made, long) for made in (how, dropped)] == [((4, 32),), ((2, 4),)]
    parts = recipe(models("bert"), micro_batches=3, data={"max_length": 32, "batch_tokens": 128, "batch_rows": 32})
    assert shapes.largest(parts, known) == ((11, 4), (4, 10))


def test_counted_labels_replace_the_assumption(models: Any) -> None:
    how = recipe(models("bert"), method="head")
    few, many, assumed = (items_of(how, known=Known(labels=labels))["trained"] for labels in (3, 100, None))
    assert (few, many, assumed) == (4 * 3 * 33, 4 * 100 * 33, 4 * 10 * 33)
    assert "10 labels assumed" in str(plan_plan.plan(how, device=CPU).items)


def test_a_head_whose_outputs_are_known_needs_no_labels(models: Any) -> None:
    """Before the data stage: the begin and the end of an answer, whatever the data are."""
    how = recipe(models("bert"), task="answer", method="head")
    assert items_of(how, known=Known())["trained"] == 4 * 2 * 33


def test_a_checkpoint_that_is_not_here_has_no_pooler(models: Any) -> None:
    how = recipe(models("bert"))
    here = new_head(how, COUNTED)
    absent = dataclasses.replace(here, folder=None)
    assert here.exact and not absent.exact
    difference = items.step_of(how, absent, CPU).trained_bytes - items.step_of(how, here, CPU).trained_bytes
    assert difference == 4 * (32 * 32 + 32 - 4 * (32 + 32))  # the pooler is trained whole, not through LoRA


# --- what is shown, and what to change --------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_sheet_of_labels(models: Any) -> None:
    shown = sheet.sheet(recipe(models("bert")), CPU, [[8, 40, 40], [12, 20, 20]], labels=3)
    assert [stage.stage for stage in shown.stages] == ["load", "train", "evaluate", "merge", "export"]
    assert shown.exact and shown.conversations == () and shown.anchors == ()
    assert shown.parameters == 23_587  # by hand: embeddings 5,280, two layers of 8,544 ... and a head of 99
    assert shown.lengths is not None and shown.lengths.choices[0].peak_bytes > 0
    json.dumps(sheet.to_dict(shown))


def test_no_weight_takes_up_a_bottleneck_so_there_is_no_merge(models: Any) -> None:
    assert "merge" not in plan_plan.stages_with_a_plan(recipe(models("bert"), method="houlsby"))


@pytest.mark.slow
def test_remedies_of_all_weights_end_in_an_adapter(models: Any) -> None:
    how = recipe(models("bert"), method="full", data={"max_length": 64, "batch_tokens": 4096, "batch_rows": 64})
    peak = sum(items_of(how).values())
    changes = remedies._changes(how, "train", CPU)
    sets = [level for change in changes for level in change.levels]
    assert ("micro_batches=2",) in sets and ("train.bf16=true",) in sets and ("method=lora",) in sets
    assert ("quantization.load_in_4bit=true",) not in sets  # all weights cannot be trained in 4 bit
    made = plan_plan.plan(how, device=CPU, device_bytes=peak - 8 * 2**20, known=COUNTED)
    assert not made.fits and made.remedies[0].set == ("micro_batches=2",)
    smaller = remedies.apply(how, made.remedies)
    assert sum(items_of(smaller).values()) == peak - sum(r.saves_bytes for r in made.remedies)


@pytest.mark.slow
def test_a_16_bit_base_in_fp32_is_named(models: Any) -> None:
    folder = models("bert", "bfloat16")
    for sections, said in (
        ({"train": {"bf16": False}}, "stored in bfloat16, and train.bf16=false computes them in fp32, which doubles"),
        ({"method": "full"}, "stored in bfloat16, and method=full trains them in fp32"),
        ({"train": {"bf16": True}}, ""),
    ):
        how = recipe(folder, **sections)
        assert said in "".join(items.remarks(how, new_head(how, COUNTED)))
    wide, narrow = (items_of(recipe(folder, train={"bf16": on}))["weights"] for on in (False, True))
    assert wide == pytest.approx(2 * narrow, rel=0.05)


def test_solved_batches_and_lengths(models: Any) -> None:
    how = recipe(models("bert"), data={"max_length": 32, "batch_tokens": 128, "batch_rows": 32})
    room = sum(items_of(how, known=Known()).values()) + 2**20
    solved = solve.solve(how, "batch", room, CPU)
    assert solved.plan is not None and solved.plan.peak_bytes <= room and int(solved.value or 0) > 4
    assert solved.set == (f"data.batch_tokens={32 * int(solved.value or 0)}", f"data.batch_rows={solved.value}")
    with pytest.raises(RecipeError, match="method=full has no rank"):
        solve.solve(recipe(models("bert"), method="full"), "rank", room, CPU)


def test_time_counts_the_products_of_a_step(models: Any) -> None:
    """Two FLOPs for each weight of a linear module and token forward, and twice as many backward when all are trained."""
    how = recipe(models("bert"), method="full", data={"max_length": 32, "batch_tokens": 128})
    flops = speed.flops_per_token(how, new_head(how, COUNTED))
    linear = 2 * (4 * 32 * 32 + 2 * 32 * 64)
    assert 6 * linear < flops < 1.5 * 6 * linear


def test_labels_and_lengths_come_from_the_data_folder(tmp_path: Path) -> None:
    assert sheet.labels_of(tmp_path) is None and sheet.labels_of(None) is None
    write_rows(tmp_path / "data" / "labels.json", [{"names": ["a", "b"]}])
    assert sheet.labels_of(tmp_path) == 2


@pytest.mark.slow
def test_plan_and_inspect_as_programs(models: Any, tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", labelled_rows(48))
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(settings(models("bert"), tmp_path / "rows.jsonl")))

    def printed(*arguments: str) -> str:
        command = [sys.executable, "-m", "qkit", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=os.environ | PATHS)
        assert done.returncode == 0, done.stderr
        return done.stdout

    before = json.loads(printed("plan", "recipe.yaml", "--json"))
    assert "max_length" in printed("inspect", "recipe.yaml")  # the table of its choices
    printed("data", "recipe.yaml")
    after = json.loads(printed("plan", "recipe.yaml", "--json"))
    assert (before["exact"], after["exact"]) == (False, True)
    assert after["peak_bytes"] < before["peak_bytes"]  # no row has 32 tokens
    assert "train fits" in printed("plan", "recipe.yaml")


# --- many layers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "sections"),
    [
        ("bert", {"method": "full"}),
        ("bert", {"method": "full", "layers": {"frozen": 2}}),
        ("bert", {"method": "lora", "train": {"gradient_checkpointing": True}}),
        ("bert", {"method": "pfeiffer"}),
        ("distilbert", {"method": "head"}),
        ("roberta", {"method": "lora"}),
        ("llama", {"method": "lora", "quantization": {"load_in_4bit": True}}),
        ("llama", {"method": "full", "train": {"gradient_accumulation_steps": 2}}),
    ],
)
def test_a_deep_model_is_what_three_short_ones_say(tmp_path: Path, kind: str, sections: dict[str, Any]) -> None:
    name = {"distilbert": "n_layers"}.get(kind, "num_hidden_layers")
    folder = build_model(tmp_path / kind, kind, **{name: 9})
    recipe = from_dict(settings(folder, tmp_path / "rows.jsonl", **sections), (), "the test")
    setting = step.setting_of(recipe, new_head(recipe, COUNTED), False)
    deep = step._deepened(setting, 3, 11, step.SHALLOW + recipe.layers.frozen, 9)
    whole = step._run(setting, None, 3, 11)
    assert deep is not None
    assert dataclasses.replace(deep, log=whole.log) == whole
    assert sorted(deep.log.steps) == sorted(whole.log.steps) and deep.log.items() == whole.log.items()


def test_layers_of_several_kinds_are_all_traced(tmp_path: Path) -> None:
    folder = build_model(tmp_path / "modernbert", "modernbert", num_hidden_layers=7)
    recipe = from_dict(settings(folder, tmp_path / "rows.jsonl", method="full"), (), "the test")
    head = new_head(recipe, COUNTED)
    assert traced_model.layers_of(recipe, head) is None


def test_an_adapter_on_upper_layers_can_be_planned(tmp_path: Path) -> None:
    """The short models have none of them."""
    folder = build_model(tmp_path / "bert", "bert", num_hidden_layers=9)
    upper = r".*layer\.[78]\..*query"
    sections: dict[str, Any] = {"method": "lora", "lora": {"target_modules": upper}}
    for method in (sections, {"method": "full", "train": {"trainable": [r"layer\.[78]\."]}}):
        recipe = from_dict(settings(folder, tmp_path / "rows.jsonl", **method), (), "the test")
        setting = step.setting_of(recipe, new_head(recipe, COUNTED), False)
        assert step._traced(setting, 3, 11).trained == step._run(setting, None, 3, 11).trained


def test_an_adapter_on_some_layers_is_not_that_of_all(tmp_path: Path) -> None:
    folder = build_model(tmp_path / "bert", "bert", num_hidden_layers=9)
    rows = tmp_path / "rows.jsonl"
    recipe = from_dict(
        settings(folder, rows, method="lora", lora={"target_modules": r".*layer\.[0357]\..*query"}), (), "the test"
    )
    setting = step.setting_of(recipe, new_head(recipe, COUNTED), False)
    assert step._deepened(setting, 3, 11, step.SHALLOW, 9) is None
    assert len(step._traced(setting, 3, 11).trained) == len(step._run(setting, None, 3, 11).trained)
