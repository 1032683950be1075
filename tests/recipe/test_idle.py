"""Values of a recipe that another value makes idle: refused, or said in the plan and in the stage; both values are named."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from helpers.tiny import chat_rows, tiny_settings
from helpers.training import Heard
from qkit import pipeline
from qkit.core.errors import RecipeError
from qkit.plan import screen, sheet
from qkit.recipe import idle
from qkit.recipe.load import from_dict, load
from qkit.recipe.schema import Recipe
from qkit.run.directory import Run

ROWS: dict[str, Any] = {"source": "rows.jsonl"}


def _recipe(**sections: Any) -> Recipe:
    raw = {"task": "chat", "model": {"source": "owner/x"}, "data": {}}
    return from_dict({**raw, **sections}, (), "the test")


MISTAKES = [
    (
        {"train": {"lr_scheduler_type": "constant", "warmup_steps": 4}},
        "train.warmup_steps=4 has no effect with train.lr_scheduler_type=constant",
    ),
    ({"serve": {"concurrency": 9, "max_num_seqs": 8}}, "serve.concurrency=9 .* serve.max_num_seqs=8"),
    ({"serve": {"max_num_seqs": 8, "max_requests": 4}}, "serve.max_num_seqs=8 .* serve.max_requests=4"),
    (
        {"merge": {"base": "16bit", "dtype": "float16", "choose": "score"}},
        "merge.choose=score .* merge.base=16bit and merge.dtype=float16",
    ),
    (
        {"task": "function_calling", "evaluate": {"answer_pattern": "A"}},
        "evaluate.answer_pattern=A applies to free text .task=chat.: remove it for task=function_calling",
    ),
    ({"lora": {"lora_dropout": 1.0}}, "lora.lora_dropout: Input should be less than 1, got 1.0"),
    ({"lora": {"lora_alpha": 0}}, "lora.lora_alpha: Input should be greater than 0, got 0"),
    ({"model": {"source": "pypi:a==1!b.gguf", "revision": "main"}}, "model.revision=main .* the source is pypi:a==1!b"),
    (
        {"model": {"source": "owner/x", "sha256": "0" * 64}},
        "model.sha256=0+ .* a pypi: source, but the source is owner/x",
    ),
    ({"data": {"test": [ROWS, {**ROWS, "streaming": True}]}}, "data.test.1.streaming=true .* the source is rows.jsonl"),
    ({"data": {"train": [{**ROWS, "sample_by": "line"}]}}, r"sample_by=line .* text files \(.txt, .md\)"),
    ({"data": {"train": [{**ROWS, "weight": 2.0}]}}, "data.train.0.weight=2 .* there is only one"),
    ({"data": {"group": "user"}}, "data.group=user .* data.split is not set"),
    ({"data": {"stratify": "topic"}}, "data.stratify=topic .* data.split is not set"),
    (
        {"data": {"too_long": "split", "train": [{**ROWS, "format": "messages"}]}},
        "data.too_long=split divides plain text, but data.train is all messages",
    ),
    ({"data": {"packing": True, "batch_rows": 8}}, "data.batch_rows=8 has no effect with data.packing=true"),
]


@pytest.mark.parametrize(
    ("sections", "said"), MISTAKES, ids=lambda value: "" if isinstance(value, str) else str(value)[:60]
)
def test_what_can_only_be_a_mistake_is_refused(sections: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        _recipe(**sections)


@pytest.mark.parametrize(
    "sections",
    [
        {"serve": {"concurrency": 8, "max_num_seqs": 8, "max_requests": 8}},
        {"serve": {"concurrency": 8}},
        {"task": "chat", "evaluate": {"answer_pattern": "A"}},
        {"merge": {"base": "16bit", "choose": "score"}},  # between bfloat16 and float16
        {"model": {"source": "owner/x", "revision": "main"}},
        {"data": {"train": [{"source": "owner/rows", "split": "test", "streaming": True, "sample_by": "line"}]}},
        {
            "data": {
                "train": [{"source": "rows.txt.gz", "sample_by": "line"}, {"source": "folder", "sample_by": "line"}]
            }
        },
        {"data": {"train": [{**ROWS, "weight": 2.0}, ROWS]}},
        {"data": {"train": [ROWS], "group": "user", "stratify": "topic", "split": {"train": 0.9, "test": 0.1}}},
        {"data": {"too_long": "split", "train": [{**ROWS, "format": "messages"}, {**ROWS, "format": "text"}]}},
        {"data": {"train": [{"source": "saved", "split": "test"}]}},  # a folder of save_to_disk has splits
    ],
)
def test_what_has_an_effect_is_taken(sections: dict[str, Any]) -> None:
    assert not list(idle.remarks(_recipe(**sections)))


REMARKS = [
    (
        {"train": {"max_steps": 20, "num_train_epochs": 2.0}},
        "train.num_train_epochs=2 has no effect with train.max_steps=20",
    ),
    *(
        ({"quantization": {"load_in_4bit": False, name: value}}, f"quantization.{name}={said} has no effect with")
        for name, value, said in (
            ("bnb_4bit_quant_type", "fp4", "fp4"),
            ("bnb_4bit_use_double_quant", False, "false"),
            ("bnb_4bit_compute_dtype", "float32", "float32"),
        )
    ),
    (
        {"export": {"formats": ["vllm"], "method": "awq"}, "bench": {"runtimes": []}},
        "export.method=awq applies to vllm-w4a16",
    ),
    (
        {"export": {"formats": ["vllm"], "calibration_rows": 9}, "bench": {"runtimes": []}},
        "export.calibration_rows=9 applies to vllm-w4a16 and vllm-w8a8",
    ),
    (
        {"bench": {"sweep": True, "concurrency": [1, 4]}},
        "bench.concurrency=[1, 4] has no effect with bench.sweep=true",
    ),
    (
        {"data": {"validation": [ROWS]}, "train": {"eval_strategy": "no"}},
        "data.validation: these rows are held out, but with train.eval_strategy=no no stage reads them",
    ),
    (
        {
            "data": {"train": [ROWS], "split": {"train": 0.8, "validation": 0.1, "test": 0.1}},
            "train": {"eval_strategy": "no"},
        },
        "data.split.validation=0.1: these rows are held out",
    ),
]


@pytest.mark.parametrize(("sections", "said"), REMARKS, ids=lambda value: value if isinstance(value, str) else "")
def test_what_a_trial_makes_idle_is_said(sections: dict[str, Any], said: str) -> None:
    (text,) = [text for _, text in idle.remarks(_recipe(**sections))]
    assert text.startswith(said)


def test_the_plan_and_the_stage_say_it(tiny_model: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in chat_rows(24)), encoding="utf-8")
    settings = tiny_settings(tiny_model, rows)
    settings["data"].update(validation=[{"source": str(rows), "rows": "20:"}], max_overlap=1.0)
    settings["train"]["eval_strategy"] = "no"
    how = from_dict(settings, (), "the test")
    ((_, text),) = idle.remarks(how)
    found = sheet.sheet(how)
    assert sheet.to_dict(found)["remarks"] == [text]
    drawn = io.StringIO()
    Console(width=300, file=drawn).print(screen.screen(found))
    assert f"warning: {text}" in drawn.getvalue()
    heard = Heard()
    pipeline.execute(Run.create(tmp_path / "run", how, heard), "data")
    assert f"data: warning: {text}" in heard.lines


def test_a_whole_data_set_given_for_a_recipe_is_not_printed_back(tmp_path: Path) -> None:
    many = [{"messages": "x" * 1000}] * 85
    for name, content in (
        ("rows.json", json.dumps(many)),
        ("one.json", json.dumps({"task": many, "model": {"source": "x"}, "data": {}, "y" * 900: 1})),
    ):
        (tmp_path / name).write_text(content, encoding="utf-8")
        with pytest.raises(RecipeError) as caught:
            load(tmp_path / name)
        assert len(str(caught.value)) < 2000
