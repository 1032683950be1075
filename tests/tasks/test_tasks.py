from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qkit.core.strict_json import Struct
from qkit.plugins.example import Conversation, RowError, Text
from qkit.plugins.task import open_task
from qkit.recipe.registry import names
from qkit.recipe.schema import Clean, Data, Evaluate
from qkit.tasks import chat, function_calling


@pytest.mark.parametrize("name", names("tasks"))
def test_every_task_offers_what_a_task_must(name: str) -> None:
    task = open_task(name)
    assert task.METRIC
    with pytest.raises(RowError, match="has the columns nonsense"):
        task.example({"nonsense": 1}, None, "auto", Data())


# Texts with labels


def test_a_batch_of_texts_is_as_long_as_its_longest() -> None:
    """Most are short: a multiple of 16 tokens would be padding to a third."""
    rows = [{"input_ids": [5] * n, "token_type_ids": [], "labels": [n]} for n in (3, 2)]
    batch = open_task("classify").collate(rows, 0)
    assert batch["input_ids"].tolist() == [[5, 5, 5], [5, 5, 0]] and batch["attention_mask"].sum() == 5
    assert batch["labels"].tolist() == batch["lengths"].tolist() == [3, 2]


# Chat


def test_chat_reads_any_format() -> None:
    asked, said = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
    record = {"messages": [asked, said], "text": "t"}
    assert chat.TASK.example(record, None, "auto", Data()) == Conversation((asked, said))
    assert chat.TASK.example(record, ["a", "b"], "auto", Data()) == Conversation((asked, said), ["a", "b"])
    assert chat.TASK.example(record, None, "text", Data()) == Text("t")


@pytest.mark.parametrize(
    ("prediction", "reference", "pattern", "right"),
    [
        ("4", "4", None, True),
        (" a  b\n", "a b", None, True),
        ("A b", "a b", None, False),
        ("b", ["a", "b"], None, True),
        ("so #### 4", "It is\n#### 4", r"#### (.+)", True),
        ("#### 3\nno: #### 4", "#### 4", r"#### (.+)", True),
        ("#### 1,004", "#### 1004", r"#### (.+)", True),
        ("#### 5", "It is\n#### 4", r"#### (.+)", False),
        ("3 apples, so 4 pears", "4 plums", r"(\d+) (\w+)", True),
        ("3 apples, so 5 pears", "4 pears", r"(\d+) (\w+)", False),
        ("so it is 4", "4", r"\d+", True),
        ("none of them", "none", r"#### (\d+)|none", True),
        ("no match", "no  match", r"#### (\d+)", True),
        ("<think>\n\n</think>\n\nFour.", ["4", "Four."], None, True),
        ("<think>5?</think>Four.", "<think>\n\n</think>\n\nFour.", None, True),
        ("5? No.\n</think>\n\nFour.", "Four.", None, True),
        ("<think>Four.</think>Five.", "Four.", None, False),
        ("<think>Four.", "Four.", None, False),
        ("<think>#### 4</think>none", "#### 4", r"#### (.+)", False),
    ],
)
def test_chat_counts_what_equals_the_reference(
    prediction: str, reference: Any, pattern: str | None, right: bool
) -> None:
    assert chat.TASK.correct(prediction, reference, Evaluate(answer_pattern=pattern)) is right


# Function calling

AREA = {
    "name": "area",
    "parameters": {
        "type": "dict",
        "properties": {
            "base": {"type": "integer"},
            "unit": {"type": "string", "enum": ["cm", "m"], "default": "cm"},
            "tags": {"type": "array", "items": {"type": "string"}},
        },
        "required": ["base"],
    },
}
ROW = {"id": 1, "question": [[{"role": "user", "content": "How large?"}]], "function": [AREA]}
ACCEPTED = [{"area": {"base": [10, 10.0], "unit": ["cm", ""], "tags": [["A b"]], "at": [{"x": [1], "y": ["", 2]}]}}]
SIGNATURE = 'area(base: int, unit: "cm"|"m" = "cm", tags: list[str] = null)'


def test_signature() -> None:
    assert function_calling.signature(AREA) == SIGNATURE


def test_a_row_of_the_leaderboard() -> None:
    found = function_calling.TASK.example(ROW, ACCEPTED, "auto", Data(system="Call."))
    assert found == Conversation(
        (
            {"role": "system", "content": f"Call.\n{SIGNATURE}"},
            {"role": "user", "content": "How large?"},
            {"role": "assistant", "content": function_calling.first_answer(ACCEPTED)},
        ),
        ACCEPTED,
    )
    assert json.loads(function_calling.first_answer(ACCEPTED)) == {
        "name": "area",
        "arguments": {"base": 10, "tags": ["A b"], "at": {"x": 1}},
    }


def test_a_row_of_the_leaderboard_out_of_a_table() -> None:
    """There each function has the parameters of all, and null where it has none."""

    def tabled(value: Any) -> Any:
        if isinstance(value, dict):
            return Struct({**{key: tabled(item) for key, item in value.items()}, "of_another_row": None})
        return [tabled(item) for item in value] if isinstance(value, list) else value

    record = {"id": "1", "question": [[{"role": "user", "content": "q"}]], "function": [AREA]}
    accepted = [{"area": {"base": [1], "height": [2]}}]
    plain = function_calling.TASK.example({**record, "note": "n"}, accepted, "auto", Data())
    assert function_calling.TASK.example(tabled(record), tabled(accepted), "auto", Data()) == plain
    assert plain.unread == ("note",)


@pytest.mark.parametrize(
    ("changed", "accepted", "rule", "words"),
    [
        ({}, None, "malformed", "has no accepted answer for id 1: set data.*.answers to the file that contains it"),
        ({}, [], "malformed", "accepted: List should have at least 1 item"),
        ({}, "f(x)", "malformed", "accepted: Input should be a valid list"),
        ({}, [{}], "malformed", "accepted.0 must contain one call (it has 0)"),
        ({}, [{"f": {"x": 1}}], "malformed", "accepted.0.f.x: Input should be a valid list"),
        ({}, [{"f": {"x": [{"y": 1}]}}], "malformed", "accepted.0.f.x.y: Input should be a valid list"),
        ({}, [{"f": {"x": [[{"y": "z"}]]}}], "malformed", "accepted.0.f.x.y: Input should be a valid list"),
        ({}, [{"f": {"x": ["\ud800"]}}], "unicode", "the accepted answer contains U+D800"),
        ({"question": []}, ACCEPTED, "malformed", "question: List should have at least 1 item"),
        ({"question": "q"}, ACCEPTED, "malformed", "question: Input should be a valid list"),
        ({"question": [[{"role": "user"}]]}, ACCEPTED, "malformed", "question.0.0.content: Field required"),
        ({"question": [[{"content": " "}]]}, ACCEPTED, "empty", "turn 2 (user) is empty"),
        ({"question": [[{"content": "\x00"}]]}, ACCEPTED, "unicode", "the row contains U+0000 (NUL)"),
        ({"function": []}, ACCEPTED, "malformed", "function: List should have at least 1 item"),
        ({"function": [{}]}, ACCEPTED, "malformed", "function.0.name: Field required"),
        ({"function": [{"name": "f"}]}, ACCEPTED, "malformed", "function.0.parameters: Field required"),
        (
            {"function": [{"name": "f", "parameters": {"properties": {"x": {"type": ["string", "null"]}}}}]},
            ACCEPTED,
            "malformed",
            "function.0.parameters.properties.x.type: Input should be a valid string",
        ),
    ],
)
def test_rows_that_are_not_the_leaderboards(changed: dict[str, Any], accepted: Any, rule: str, words: str) -> None:
    with pytest.raises(RowError) as caught:
        function_calling.TASK.example({**ROW, **changed}, accepted, "auto", Data())
    assert caught.value.rule == rule and str(caught.value).startswith(words)


NAMES = st.sampled_from(
    ["name", "parameters", "properties", "required", "type", "enum", "items", "default", "content", "x"]
)
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters(), max_size=3)
    | st.binary(max_size=2),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=4),
    max_leaves=12,
)
SPECS = st.dictionaries(NAMES, st.dictionaries(NAMES, VALUES | st.just("string"), max_size=3), max_size=2)
PARAMETERS = st.fixed_dictionaries({"properties": SPECS}, optional={"required": VALUES})
FUNCTIONS = st.lists(st.fixed_dictionaries({"name": st.just("f"), "parameters": PARAMETERS}), min_size=1, max_size=2)
ARGUMENTS = st.dictionaries(NAMES, st.lists(VALUES, max_size=2), max_size=3)
CALLS = st.fixed_dictionaries({"f": ARGUMENTS}).map(lambda call: [call])


def outcome(record: dict[str, Any], accepted: Any) -> Conversation | RowError:
    try:
        found = function_calling.TASK.example(record, accepted, "auto", Data(clean=Clean(unicode="keep", empty="keep")))
    except RowError as error:
        return error
    assert isinstance(found, Conversation)
    return found


@pytest.mark.slow
@settings(max_examples=500, deadline=None)
@given(function=FUNCTIONS | VALUES, question=st.just(ROW["question"]) | VALUES, accepted=CALLS | VALUES)
def test_whatever_comes_only_row_errors_leave(function: Any, question: Any, accepted: Any) -> None:
    found = outcome({"function": function, "question": question}, accepted)
    if isinstance(found, RowError):
        assert str(found).encode()
    else:
        assert function_calling.TASK.correct(found.messages[-1]["content"], found.reference, Evaluate())


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
    assert function_calling.TASK.correct(text, ACCEPTED, Evaluate()) is right
    assert function_calling.TASK.correct(f"<think>\n\n</think>\n\n{text}", ACCEPTED, Evaluate()) is right
    assert not function_calling.TASK.correct(text.replace("area", "volume"), ACCEPTED, Evaluate())


@pytest.mark.parametrize(
    "text", ["", "area(base=10)", "[]", '{"name": "area"}', '{"name": "area", "arguments": []}', "null", "[" * 20_000]
)
def test_what_is_no_call_is_wrong(text: str) -> None:
    assert not function_calling.TASK.correct(text, ACCEPTED, Evaluate())
