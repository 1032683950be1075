"""What onnxruntime-genai's own tokenizer makes of conversations, beside what training had: the real library on real-world templates."""

from __future__ import annotations

import json
import re
import shutil
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from helpers.data_traps.models import FAMILIES, Tiny, build
from qkit.core.files import read_json
from qkit.export import prompts
from qkit.export.formats import onnx
from qkit.export.stage import job
from qkit.model.added_tokens import bare_tokenizer
from qkit.plugins.task import open_task
from qkit.report import model_card
from qkit.run.directory import Run

pytest.importorskip("onnxruntime_genai")

# What onnxruntime-genai's builder writes, as far as its tokenizer reads it.
GENAI = {
    "model": {
        "type": "llama",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "context_length": 512,
        "vocab_size": 300,
    },
    "search": {},
}
SAYS = "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"
BLOCKS = (
    "{% for m in messages %}\n    {% if m.role == 'user' %}\nU:{{ m.content }}\n    {% endif %}\n{% endfor %}\n"
    "{% if add_generation_prompt %}\nA:\n{% endif %}\n<|im_end|>"
)
TOOLS = (
    "{%- if tools %}{%- for t in tools %}{{- t | tojson(indent=4) }}{%- endfor %}{%- endif %}"
    "{%- for m in messages %}{{- '<|im_start|>' + m.role + m.content + '<|im_end|>' }}{%- endfor %}"
)


@pytest.fixture
def no_rows(tmp_path: Path) -> Path:
    return written(tmp_path, [])


def written(folder: Path, rows: list[dict[str, Any]]) -> Path:
    """A train.parquet, as far as prompts are in it."""
    import pyarrow as pa
    from pyarrow import parquet

    from qkit.data.prepare import schema
    from qkit.recipe.schema import Data

    fields = [schema(open_task("chat"), Data()).field(name) for name in ("input_ids", "start", "messages", "tools")]
    parquet.write_table(pa.Table.from_pylist(rows, pa.schema(fields)), folder / "train.parquet")
    return folder / "train.parquet"


def folder_of(model: Tiny, folder: Path) -> Path:
    build(model, folder)
    (folder / "genai_config.json").write_text(json.dumps(GENAI), encoding="utf-8")
    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family: str, tmp_path: Path, no_rows: Path) -> None:
    """All but the one whose tokenizer normalizes: their templates are written so that no engine reads them otherwise."""
    result = prompts.compared(folder_of(FAMILIES[family], tmp_path / "model"), no_rows)
    assert result["cases"] >= 2 and result["by"].startswith("onnxruntime-genai ")
    assert bool(result["differ"]) is (family == "qwen3")


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (Tiny(BLOCKS), r"^a question: from character 0 it has '\\n    \\nU:.* where training has 'U:"),
        (Tiny(TOOLS), r"^a question with a tool: from character .* it has 'name.* where training has 'type"),
        (Tiny(SAYS + "{{ 7 / 2 }}"), r"has '' where training has '\.5'"),
        (Tiny(SAYS + "{{ 3 // (1 / 2) }}"), r"^a question: no prompt: .*[Dd]ivision by zero"),
        (Tiny(SAYS, composes=True), r"^a question: \d+ token ids for the same text where training has \d+"),
    ],
    ids=["blocks", "tools", "division", "refused", "normalizes"],
)
def test_what_the_library_does_otherwise_is_found(model: Tiny, expected: str, tmp_path: Path, no_rows: Path) -> None:
    result = prompts.compared(folder_of(model, tmp_path / "model"), no_rows)
    assert re.search(expected, result["differ"][0])


def test_what_is_the_same_is_not_accused(tmp_path: Path, no_rows: Path) -> None:
    assert prompts.compared(folder_of(Tiny(SAYS), tmp_path / "model"), no_rows)["differ"] == []


def test_the_runs_own_rows_are_tried(tmp_path: Path) -> None:
    """A template that is read otherwise only where a turn has a name, which no probe has."""
    template = "{% for m in messages %}{% if m.name %}{{ 7 / 2 }}{% endif %}{{ m.content }}<|im_end|>{% endfor %}"
    folder = folder_of(Tiny(template), tmp_path / "model")
    tokenizer = bare_tokenizer(folder, False)
    named, plain = [{"role": "user", "name": "Ann", "content": "a"}], [{"role": "user", "content": "b"}]
    rows = []
    for messages, text in ((plain, "b<|im_end|>"), (named, "3.5a<|im_end|>")):
        ids = tokenizer(text, add_special_tokens=False).input_ids
        rows.append({"input_ids": [*ids, 9, 9], "start": len(ids), "messages": json.dumps(messages), "tools": "[]"})
    result = prompts.compared(folder, written(tmp_path, rows))
    assert result["differ"] == ["row 1: from character 1 it has 'a<|im_end|>' where training has '.5a<|im_end|>'"]
    assert result["cases"] == 5


def test_a_plain_text_begins_as_the_tokenizer_begins_it(tmp_path: Path) -> None:
    folder = folder_of(FAMILIES["llama3"], tmp_path / "model")
    row = {"input_ids": [0, 40, 41], "start": 1, "messages": "[]", "tools": "[]"}
    assert prompts.compared(folder, written(tmp_path, [row]))["differ"] == [
        "row 0: 2 token ids for the same text where training has 3"
    ]


def test_rows_are_taken_from_all_over(tmp_path: Path) -> None:
    folder = folder_of(Tiny(SAYS), tmp_path / "model")
    rows = [{"input_ids": [1], "start": 1, "messages": "[]", "tools": "[]"}] * 100
    cases = [*prompts.cases_of(folder, written(tmp_path, rows), False)]
    numbers = [int(case.name.split()[1]) for case in cases if case.name.startswith("row")]
    assert 1 < len(numbers) <= prompts.ROWS and numbers[-1] > 80


@pytest.mark.slow
def test_a_template_that_never_ends_there_ends_no_export(
    tmp_path: Path, no_rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half the tests of this loop are false for Python, which stops at once, and none for an engine that divides integers."""
    endless = "{% for i in range(99999) if tools and 1 / 2 == 0 %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    monkeypatch.setattr(prompts, "SECONDS", 3.0)
    result = prompts.compared(folder_of(Tiny(SAYS + endless), tmp_path / "model"), no_rows)
    assert result["differ"] == [
        f"{name}: no prompt: no answer within 3 s" for name in ("a question with a tool", "a tool call")
    ]


def test_a_crash_is_told_from_an_error() -> None:
    crash = f"import os; os.kill(os.getpid(), {int(signal.SIGSEGV)})"
    assert prompts.ending_of([sys.executable, "-c", crash]) == f"the library crashed (signal {int(signal.SIGSEGV)})"
    assert prompts.ending_of([sys.executable, "-c", "raise ValueError('oh')"]) == "ValueError: oh"


def test_a_tokenizer_that_the_library_does_not_open(tmp_path: Path, no_rows: Path) -> None:
    folder = folder_of(Tiny(SAYS), tmp_path / "model")
    (folder / "genai_config.json").write_text("{}")
    result = prompts.compared(folder, no_rows)
    assert len(result["differ"]) == result["cases"] == 3 and "no prompt:" in result["differ"][0]


# --- through an export ------------------------------------------------------------------------------------------------


def exported(trained_run: Run, root: Path, template: str | None = None) -> tuple[Run, list[str]]:
    """The tiny run with its ONNX export in fp32, optionally with another template, and the messages of the export."""
    shutil.copytree(trained_run.root, root)
    run, messages = Run(root, trained_run.recipe), []
    if template:
        (run.folder("merge") / "chat_template.jinja").write_text(template, encoding="utf-8")
    run.folder("export").mkdir()
    onnx.export(replace(job(run), notify=messages.append), run.folder("export") / "onnx-fp32", "fp32")
    return run, messages


@pytest.mark.parametrize("changed", [False, True], ids=["alike", "other"])
def test_the_readme_shows_what_makes_the_prompts_of_training(
    changed: bool, trained_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, messages = exported(trained_run, tmp_path / "run", BLOCKS if changed else None)
    folder = run.folder("export") / "onnx-fp32"
    result = read_json(folder / "qkit.json")["prompts"]
    assert result["cases"] > 3 and bool(result["differ"]) is changed
    assert len(messages) == changed and all(
        "its README.md shows how to make them with transformers" in text for text in messages
    )
    card, merged = model_card.render(run, "onnx-fp32"), model_card.render(run)
    assert ("Render with transformers" in card) is ("makes other prompts of `onnx-fp32`" in merged) is changed
    code = card.split("```python\n")[1].partition("```")[0]
    assert ("AutoTokenizer" in code) is changed
    monkeypatch.chdir(folder)
    ran: dict[str, Any] = {"print": lambda text: None}
    exec(compile(code, "README.md", "exec"), ran)
    prompt = bare_tokenizer(folder, False).apply_chat_template(
        model_card._messages(run.recipe), add_generation_prompt=True, return_dict=False
    )
    written = ran["generator"].get_sequence(0).tolist()
    assert written[: len(prompt)] == prompt


def test_an_export_of_an_earlier_version_is_rendered_the_safe_way(trained_run: Run, tmp_path: Path) -> None:
    shutil.copytree(trained_run.root, tmp_path / "run")
    run = Run(tmp_path / "run", trained_run.recipe)
    (run.folder("export") / "onnx-int4").mkdir(parents=True)
    text = model_card.render(run, "onnx-int4")
    assert "has not been tried" in text and "AutoTokenizer" in text.partition("## Use")[2]
