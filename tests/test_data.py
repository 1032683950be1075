from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from transformers import AutoTokenizer

from qkit import data, pipeline
from qkit.errors import DataError, ModelError
from qkit.recipe import Data, Evaluate, Source, load
from qkit.rows import read
from qkit.run import Run
from qkit.task import Conversation, RowError
from qkit.tasks import chat, function_calling

TURNS = [{"role": "user", "content": "say a"}, {"role": "assistant", "content": "aaa"}]


def test_only_the_completion_and_its_end_carry_loss(tiny_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(str(tiny_model))
    row = data.tokenize(Conversation(tuple(TURNS[:1]), "aaa", "aaa"), "here", tokenizer)
    assert tokenizer.decode(row.input_ids[row.start :]) == "aaa<|im_end|>"
    assert tokenizer.decode(row.input_ids[: row.start]).endswith("<|im_start|>assistant\n")


def test_a_template_that_writes_the_answer_elsewhere_is_refused(tiny_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(str(tiny_model))
    tokenizer.chat_template = tokenizer.chat_template.replace("assistant\n", "assistant: ")
    with pytest.raises(ModelError, match="writes the answered conversation differently"):
        data.tokenize(Conversation(tuple(TURNS[:1]), "aaa", "aaa"), "here", tokenizer)


def test_a_template_that_never_ends_the_turn_is_refused(tiny_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(str(tiny_model))
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    with pytest.raises(ModelError, match="could not learn to stop"):
        data.tokenize(Conversation(tuple(TURNS[:1]), "aaa", "aaa"), "here", tokenizer)


def test_padding_differs_from_the_end_of_a_turn(tiny_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(str(tiny_model))
    tokenizer.pad_token = tokenizer.eos_token
    tokens = data.special_tokens(tokenizer, None)
    assert tokens["pad"] not in tokens["stop"] and tokens["end_of_turn"] in tokens["stop"]
    with pytest.raises(ModelError, match=r"model\.pad_token"):
        data.special_tokens(tokenizer, tokenizer.eos_token)


def test_the_ledger_names_every_record(tiny_recipe: Path, tmp_path: Path) -> None:
    run = Run.create(tmp_path / "run", load(tiny_recipe, ["data.max_length=40"]))
    pipeline.execute(run, "data")
    ledger = pq.read_table(run.folder("data") / "ledger.parquet").to_pylist()
    train = pq.read_table(run.folder("data") / "train.parquet").to_pylist()
    rows = [row for row in ledger if row["split"] == "train"]
    assert len(rows) == 24
    assert len(train) == sum(row["status"] == "kept" for row in rows) < 24
    assert all(row["reason"] == f"{row['tokens']} tokens, max_length 40" for row in rows if row["status"] == "dropped")
    assert sum(row["labelled_tokens"] for row in rows if row["status"] == "kept") == sum(
        len(row["input_ids"]) - row["start"] for row in train
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"messages": []}\n{"messages": oops}\n', r"bad\.jsonl:2: not JSON"),
        ("[1]", "element 1 is not a JSON object"),
        ('[{"a": 1},\n {"a": }]', r"bad\.jsonl:2: not JSON"),
        ('"text"\n', r"bad\.jsonl:1: is not a JSON object"),
    ],
)
def test_a_broken_line_is_named(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "bad.jsonl"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=message):
        list(read(Source(source=str(file))))


def test_slices_answers_and_formats(tmp_path: Path) -> None:
    rows = [{"id": i, "prompt": f"p{i}", "completion": "c"} for i in range(5)]
    lines, array, csv = tmp_path / "a.jsonl", tmp_path / "a.json", tmp_path / "a.csv"
    lines.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    array.write_text(json.dumps(rows), encoding="utf-8")
    csv.write_text("id,prompt,completion\n" + "".join(f"{i},p{i},c\n" for i in range(5)), encoding="utf-8")
    for file in (lines, array, csv):
        assert [r.value["prompt"] for r in read(Source(source=str(file), rows="1:3"))] == ["p1", "p2"]
    answers = tmp_path / "answers.jsonl"
    answers.write_text('{"id": 3, "ground_truth": ["x"]}\n', encoding="utf-8")
    joined = list(read(Source(source=str(lines), answers=str(answers))))
    assert [r.accepted for r in joined] == [None, None, None, ["x"], None]
    assert joined[3].place == f"{lines}:4"


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"messages": TURNS[:1]}, "no assistant turn"),
        ({"messages": TURNS[1:]}, "nothing before it"),
        ({"messages": []}, "not a list of turns"),
        ({"messages": [{"role": "user"}]}, "needs a role and a content"),
        ({"question": "q"}, "data.columns"),
        ({"prompt": "", "completion": "c"}, "empty"),
    ],
)
def test_rows_that_cannot_be_learnt_from(record: dict[str, Any], message: str) -> None:
    with pytest.raises(RowError, match=message):
        chat.conversation(record, None, Data())


def test_columns_and_answer_pattern() -> None:
    section = Data(columns={"prompt": "question", "completion": "answer"}, system="Be brief.")
    found = chat.conversation({"question": "2+2?", "answer": "It is\n#### 4"}, None, section)
    assert found.prompt[0] == {"role": "system", "content": "Be brief."}
    pattern = Evaluate(answer_pattern=r"#### (.+)")
    assert chat.correct("so #### 4", found.reference, pattern)
    assert chat.correct("#### 1,004", "#### 1004", pattern)
    assert not chat.correct("#### 5", found.reference, pattern)


ACCEPTED = [{"area": {"base": [10, 10.0], "unit": ["cm", ""], "tags": [["A b"]], "at": [{"x": [1], "y": ["", 2]}]}}]


@pytest.mark.parametrize(
    ("arguments", "right"),
    [
        ({"base": 10, "tags": ["a-b"], "at": {"x": 1}}, True),
        ({"base": 10.0, "unit": "CM", "tags": ["A B"], "at": {"x": 1, "y": 2}}, True),
        ({"tags": ["a b"], "at": {"x": 1}}, False),
        ({"base": True, "tags": ["a b"], "at": {"x": 1}}, False),
        ({"base": 10, "tags": ["a b", "c"], "at": {"x": 1}}, False),
        ({"base": 10, "tags": ["a b"], "at": {"x": 1}, "more": 1}, False),
        ({"base": 10, "unit": "m", "tags": ["a b"], "at": {"x": 1}}, False),
        ({"base": "10", "tags": ["a b"], "at": {"x": 1}}, False),
    ],
)
def test_calls_are_right_by_the_accepted_values(arguments: dict[str, Any], right: bool) -> None:
    text = json.dumps({"name": "area", "arguments": arguments})
    assert function_calling.correct(text, ACCEPTED, Evaluate()) is right
    assert not function_calling.correct(text.replace("area", "volume"), ACCEPTED, Evaluate())


def test_what_is_no_call_is_wrong_and_the_first_answer_is_right() -> None:
    for text in ("", "area(base=10)", "[]", '{"name": "area"}', '{"name": "area", "arguments": []}', "null"):
        assert not function_calling.correct(text, ACCEPTED, Evaluate())
    assert function_calling.correct(function_calling.first_answer(ACCEPTED), ACCEPTED, Evaluate())


def test_signature() -> None:
    function = {
        "name": "area",
        "parameters": {
            "properties": {
                "base": {"type": "integer"},
                "unit": {"type": "string", "enum": ["cm", "m"], "default": "cm"},
                "tags": {"type": "array", "items": {"type": "string"}},
            },
            "required": ["base"],
        },
    }
    assert function_calling.signature(function) == 'area(base: int, unit: "cm"|"m" = "cm", tags: list[str] = null)'
