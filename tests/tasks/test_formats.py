from __future__ import annotations

import datetime as dt
import decimal
import inspect
import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qkit.core.strict_json import Struct
from qkit.plugins.example import Conversation, Example, Reads, RowError, Text, Tokens
from qkit.recipe.schema import Clean, Data, Split
from qkit.tasks._conversation import formats
from qkit.tasks._conversation.turns import SPEAKERS

ASKED = {"role": "user", "content": "q"}
SAID = {"role": "assistant", "content": "a"}
SYSTEM = {"role": "system", "content": "s"}
TOOL = {"role": "tool", "content": "42"}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
CALLING = {"role": "assistant", "content": "", "tool_calls": [CALL]}
FUNCTION = {"name": "f", "parameters": {"type": "object", "properties": {}}}
OFFERED = {"type": "function", "function": FUNCTION}


def made(record: dict[str, Any], format: str = "auto", **section: Any) -> Example:
    return formats.example(record, format, Data(**section))


def messages(record: dict[str, Any], **section: Any) -> list[Any]:
    found = made(record, **section)
    assert isinstance(found, Conversation)
    return list(found.messages)


def refusal(record: dict[str, Any], format: str = "auto", **section: Any) -> tuple[str, str]:
    with pytest.raises(RowError) as caught:
        made(record, format, **section)
    return caught.value.rule, str(caught.value)


@pytest.mark.parametrize(
    ("name", "record", "expected"),
    [
        ("messages", {"messages": [ASKED, SAID]}, [ASKED, SAID]),
        ("messages", {"messages": json.dumps([ASKED, SAID])}, [ASKED, SAID]),
        ("messages", {"messages": [ASKED, SAID], "system": "s"}, [SYSTEM, ASKED, SAID]),
        ("messages", {"prompt": "unused", "messages": [ASKED, SAID], "id": 1}, [ASKED, SAID]),
        (
            "sharegpt",
            {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "system": "s"},
            [SYSTEM, ASKED, SAID],
        ),
        (
            "sharegpt",
            {"conversations": [{"from": "user", "value": "q"}, {"from": "assistant", "value": "a"}]},
            [ASKED, SAID],
        ),
        ("sharegpt", {"conversations": [SYSTEM, ASKED, SAID]}, [SYSTEM, ASKED, SAID]),
        ("alpaca", {"instruction": "q", "output": "a"}, [ASKED, SAID]),
        ("alpaca", {"instruction": "q", "input": " ", "output": "a"}, [ASKED, SAID]),
        ("alpaca", {"instruction": "q", "input": None, "output": "a"}, [ASKED, SAID]),
        ("alpaca", {"instruction": "q", "input": "i", "output": "a"}, [{**ASKED, "content": "q\n\ni"}, SAID]),
        (
            "alpaca",
            {"instruction": "q", "output": "a", "system": "s", "history": [["q1", "a1"]]},
            [SYSTEM, {**ASKED, "content": "q1"}, {**SAID, "content": "a1"}, ASKED, SAID],
        ),
        ("prompt_completion", {"prompt": "q", "completion": "a"}, [ASKED, SAID]),
        ("prompt_completion", {"prompt": [SYSTEM, ASKED], "completion": [SAID]}, [SYSTEM, ASKED, SAID]),
        ("prompt_completion", {"prompt": [ASKED], "completion": "a"}, [ASKED, SAID]),
    ],
)
def test_conversations(name: str, record: dict[str, Any], expected: list[Any]) -> None:
    assert formats.recognised(record, Data()) == name
    assert messages(record) == expected
    assert made(record) == made(record, name)


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"text": " as it is\n"}, Text(" as it is\n")),
        ({"input_ids": [1, 2, 3]}, Tokens((1, 2, 3), (1, 2, 3))),
        ({"input_ids": "[1, 2]"}, Tokens((1, 2), (1, 2))),
        ({"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}, Tokens((1, 2, 3), (-100, 2, 3))),
        ({"input_ids": [1, 2, 0], "labels": [1, 2, 7], "attention_mask": [1, 1, 0]}, Tokens((1, 2), (1, 2))),
        ({"input_ids": [0, 0, 5], "attention_mask": [0, 0, 1]}, Tokens((5,), (5,))),
        ({"input_ids": [1], "labels": None, "attention_mask": None}, Tokens((1,), (1,))),
    ],
)
def test_text_and_tokens(record: dict[str, Any], expected: Example) -> None:
    assert made(record) == expected


def test_the_format_decides_where_a_record_has_the_columns_of_several() -> None:
    record = {"messages": [ASKED, SAID], "prompt": "p", "completion": "c", "text": "t"}
    assert made(record, "text") == Text("t")
    assert messages(record) == [ASKED, SAID]
    assert formats.recognised({**record, "messages": None}, Data()) == "prompt_completion"
    assert refusal(record, "alpaca") == (
        "malformed",
        "has no column 'instruction', which the format alpaca needs; it has the columns completion, messages, prompt, text",
    )


@pytest.mark.parametrize(
    ("columns", "record", "expected"),
    [
        ({"prompt": "question", "completion": "answer"}, {"question": "q", "answer": "a"}, [ASKED, SAID]),
        ({"messages": "dialog"}, {"dialog": [ASKED, SAID], "text": "t"}, [ASKED, SAID]),
        ({"conversations": "dialog", "system": "role"}, {"dialog": [ASKED, SAID], "role": "s"}, [SYSTEM, ASKED, SAID]),
        ({"instruction": "q", "output": "a", "input": "c"}, {"q": "q", "a": "a", "c": ""}, [ASKED, SAID]),
        ({"prompt": "completion", "completion": "prompt"}, {"completion": "q", "prompt": "a"}, [ASKED, SAID]),
        ({"prompt": "text", "completion": "label", "label": "intent"}, {"text": "q", "label": "a"}, [ASKED, SAID]),
        ({"prompt": "question", "completion": "answer"}, {"messages": [ASKED, SAID]}, [ASKED, SAID]),
    ],
)
def test_columns_are_mapped(columns: dict[str, str], record: dict[str, Any], expected: list[Any]) -> None:
    assert messages(record, columns=columns) == expected


def test_columns_of_text_and_tokens_are_mapped() -> None:
    assert made({"body": "t", "prompt": "p"}, columns={"text": "body"}) == Text("t")
    assert made({"prompt": "p", "completion": "c"}, columns={"text": "prompt"}) == Text("p")
    assert made({"ids": [1, 2], "text": "t"}, columns={"input_ids": "ids"}) == Tokens((1, 2), (1, 2))


@pytest.mark.parametrize(
    ("columns", "record", "words"),
    [
        (
            {},
            {"question": "q", "answer": "a"},
            "has the columns answer, question; it must have messages, or conversations, or input_ids, or instruction and output, "
            "or prompt and completion, or text: map yours with data.columns, such as {prompt: question, completion: answer}",
        ),
        ({}, {}, "has the columns (none); it must have messages"),
        ({}, {"\ud800": 1}, "has the columns \\ud800; it must have messages"),
        (
            {"prompt": "question", "completion": "answer"},
            {"questions": "q", "answer": "a"},
            "has no column 'question' (data.columns maps prompt to it); it has the columns answer, questions; "
            "did you mean 'questions'?",
        ),
        (
            {"system": "persona"},
            {"messages": [ASKED, SAID]},
            "has no column 'persona' (data.columns maps system to it); it has the columns messages",
        ),
    ],
)
def test_columns_that_are_not_there_are_named(columns: dict[str, str], record: dict[str, Any], words: str) -> None:
    rule, said = refusal(record, columns=columns)
    assert rule == "malformed" and said.startswith(words)


# Turns


@pytest.mark.parametrize(
    ("turn", "expected"),
    [
        (
            {"content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b", "image": None}]},
            {"content": "a\nb"},
        ),
        ({"content": [{"type": "text", "text": ""}, {"type": "output_text", "text": "b"}]}, {"content": "b"}),
        ({"content": [], "tool_calls": [CALL]}, {"content": "", "tool_calls": [CALL]}),
        ({"content": "a", "tool_calls": ""}, {"content": "a"}),
        ({"content": "a", "tool_calls": [], "function_call": {}}, {"content": "a"}),
        ({"content": "a", "reasoning_content": "so", "id": 7}, {"content": "a", "reasoning_content": "so"}),
        ({"content": "a", "name": "bot", "tool_calls": None}, {"content": "a", "name": "bot"}),
        ({"content": None, "tool_calls": [CALL]}, {"content": "", "tool_calls": [CALL]}),
        ({"tool_calls": json.dumps([CALL])}, {"content": "", "tool_calls": [CALL]}),
        (
            {"content": "so:", "tool_calls": [{**CALL, "id": "1"}]},
            {"content": "so:", "tool_calls": [{**CALL, "id": "1"}]},
        ),
        (
            {"tool_calls": [{"name": "f", "arguments": Struct(x=1, y=None)}]},
            {"content": "", "tool_calls": [CALL]},
        ),
        ({"function_call": {"name": "f", "arguments": '{"x": 1}'}}, {"content": "", "tool_calls": [CALL]}),
        (
            {"tool_calls": [{"function": {"name": "f", "arguments": '{"x": null}'}}]},
            {"content": "", "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"x": None}}}]},
        ),
        (
            {"tool_calls": [{"function": {"name": "f", "arguments": ""}}]},
            {"content": "", "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {}}}]},
        ),
    ],
)
def test_what_an_assistant_turn_may_hold(turn: dict[str, Any], expected: dict[str, Any]) -> None:
    assert messages({"messages": [ASKED, {"role": "assistant", **turn}]})[1] == {"role": "assistant", **expected}


def test_tool_turns_keep_what_they_answer() -> None:
    answers = [{**TOOL, "tool_call_id": "1", "name": "f"}, {**TOOL, "tool_call_id": "2"}]
    turns = [SYSTEM, ASKED, CALLING, *answers, SAID]
    assert messages({"messages": turns}) == turns


def test_calls_and_results_in_sharegpt() -> None:
    turns = [
        {"from": "human", "value": "q"},
        {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
        {"from": "observation", "value": "42"},
        {"from": "gpt", "value": "a"},
    ]
    assert messages({"conversations": turns}) == [ASKED, CALLING, TOOL, SAID]
    turns[1] = {"from": "function_call", "value": json.dumps([CALL["function"], CALL["function"]])}
    assert messages({"conversations": turns})[1]["tool_calls"] == [CALL, CALL]


@pytest.mark.parametrize("tools", [[OFFERED], [FUNCTION], json.dumps([OFFERED]), [{**OFFERED, "strict": None}]])
@pytest.mark.parametrize("column", ["messages", "conversations"])
def test_tools(tools: Any, column: str) -> None:
    found = made({column: [ASKED, CALLING], "tools": tools})
    assert isinstance(found, Conversation) and found.tools == (OFFERED,)


def test_a_key_twice_in_arguments_that_are_text_is_refused() -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": '{"x": 1, "x": 2}'}}
    assert "an object has the key 'x' twice" in refusal({"messages": [ASKED, {**CALLING, "tool_calls": [call]}]})[1]


def test_nulls_are_dropped_from_tables_and_kept_in_json() -> None:
    meant = {"default": None, "enum": [None, 1]}
    function = {"name": "f", "parameters": {"properties": {"x": meant}}}
    table = Struct(name="f", parameters=Struct(properties=Struct(x=Struct(meant))))
    for tools, spec in (
        ([table], {"enum": [None, 1]}),
        ([Struct(type="function", function=table)], {"enum": [None, 1]}),
        ([function], meant),
        (json.dumps([function]), meant),
    ):
        found = made({"messages": [ASKED, SAID], "tools": tools})
        assert isinstance(found, Conversation)
        assert found.tools[0]["function"]["parameters"] == {"properties": {"x": spec}}


@pytest.mark.parametrize("tools", [None, [], "", "[]"])
def test_no_tools(tools: Any) -> None:
    found = made({"messages": [ASKED, SAID], "tools": tools})
    assert isinstance(found, Conversation) and found.tools == ()


def test_what_the_record_says_is_learnt() -> None:
    first, last = {**SAID, "weight": 0}, {**SAID, "train": True}
    found = made({"messages": [ASKED, first, ASKED, last], "system": "s"})
    assert isinstance(found, Conversation) and found.trained == (None, None, False, None, True)
    found = made({"messages": [ASKED, first, ASKED, {**SAID, "weight": 1.0}]}, system="s")
    assert isinstance(found, Conversation) and found.trained == (None, None, False, None, True)
    assert found.messages == (SYSTEM, ASKED, SAID, ASKED, SAID)
    found = made({"messages": [ASKED, {**SAID, "train": False, "weight": 0}]})
    assert isinstance(found, Conversation) and found.trained == (None, False)
    for marks in ({"train": False, "weight": 1}, {"train": True, "weight": 0}):
        said = refusal({"messages": [ASKED, {**SAID, **marks}]})[1]
        assert f"has the train {marks['train']} and the weight {marks['weight']}: keep only one of them" in said
    assert (
        "has the weight 0.5; it must be 0 or 1"
        in refusal({"messages": [ASKED, {**SAID, "train": True, "weight": 0.5}]})[1]
    )
    found = made({"messages": [ASKED, {**SAID, "weight": None}]})
    assert isinstance(found, Conversation) and found.trained == ()


def test_the_system_turn_of_the_recipe_comes_where_there_is_none() -> None:
    assert messages({"prompt": "q", "completion": "a"}, system="s") == [SYSTEM, ASKED, SAID]
    for own in (SYSTEM, {"role": "developer", "content": "d"}):
        assert messages({"messages": [own, ASKED, SAID]}, system="other")[0] == own


def test_accepted_answers_are_the_reference() -> None:
    found = formats.example({"prompt": "q", "completion": "a"}, "auto", Data(), ["x"])
    assert isinstance(found, Conversation) and found.reference == ["x"]
    assert formats.example({"text": "t"}, "auto", Data(), ["x"]) == Text("t")


# What the template is given, and what nothing reads

THINKING_TEMPLATE = Reads(frozenset({"enable_thinking", "documents"}), frozenset({"role", "content", "tool_plan"}))


def read(record: dict[str, Any], reads: Reads = THINKING_TEMPLATE, **section: Any) -> Conversation:
    found = formats.example(record, "auto", Data(**section), reads=reads)
    assert isinstance(found, Conversation)
    return found


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking"])
@pytest.mark.parametrize(
    "record",
    [
        lambda key: {"messages": [ASKED, {**SAID, key: "so"}]},
        lambda key: {"messages": json.dumps([ASKED, {**SAID, key: "so"}])},
        lambda key: {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a", key: "so"}]},
        lambda key: {"prompt": [ASKED], "completion": [{**SAID, key: "so"}]},
        lambda key: {"prompt": "q", "completion": "a", key: "so"},
        lambda key: {"instruction": "q", "output": "a", key: "so"},
    ],
    ids=["messages", "text", "sharegpt", "turns", "prompt_completion", "alpaca"],
)
def test_thinking_is_learnt_by_each_of_its_names(record: Callable[[str], dict[str, Any]], name: str) -> None:
    found = read(record(name))
    assert found.messages == (ASKED, {**SAID, "reasoning_content": "so"}) and found.unread == ()


@pytest.mark.parametrize("record", [{"prompt": "q", "completion": "a"}, {"instruction": "q", "output": "a"}])
def test_a_switch_is_no_thinking(record: dict[str, Any]) -> None:
    """DeepSeek's template has a variable of that name."""
    found = read({**record, "thinking": True}, Reads(frozenset({"thinking"})))
    assert found.messages == (ASKED, SAID) and found.variables == {"thinking": True} and found.unread == ()
    found = read({**record, "thinking": True})
    assert found.messages == (ASKED, SAID) and found.variables == {} and found.unread == ("thinking",)


@pytest.mark.parametrize(
    ("turn", "expected"),
    [
        ({"reasoning": "so", "reasoning_content": "so"}, "so"),
        ({"reasoning": "so", "reasoning_content": None}, "so"),
        ({"reasoning": "so", "reasoning_content": ""}, "so"),
        ({"reasoning": ""}, ""),
    ],
)
def test_thinking_by_two_names_is_one(turn: dict[str, Any], expected: str) -> None:
    assert messages({"messages": [ASKED, {**SAID, **turn}]})[1] == {**SAID, "reasoning_content": expected}


@pytest.mark.parametrize(
    ("turn", "words"),
    [
        (
            {"reasoning": "a", "reasoning_content": "b"},
            "turn 2 of messages has reasoning_content and reasoning, two names for the same value, which differ: 'b' and 'a'",
        ),
        (
            {"reasoning": "a", "thinking": "b"},
            "turn 2 of messages has reasoning and thinking, two names for the same value",
        ),
        (
            {"value": "b"},
            "turn 2 of messages has content and value, two names for the same value, which differ: 'a' and 'b'",
        ),
        ({"from": "human"}, "turn 2 of messages has the role 'assistant' and is from 'human': keep only one of them"),
        ({"reasoning": ["a"]}, "reasoning of turn 2 of messages is not text: ['a']"),
    ],
)
def test_two_names_that_differ_are_an_error(turn: dict[str, Any], words: str) -> None:
    assert refusal({"messages": [ASKED, {**SAID, **turn}]})[1].startswith(words)


def test_two_names_that_agree_are_one() -> None:
    turns = [{**ASKED, "from": "human", "value": "q"}, {**SAID, "from": "gpt"}]
    assert messages({"messages": turns}) == [ASKED, SAID]
    twice = {**CALLING, "function_call": {"name": "f", "arguments": '{"x": 1}'}}
    assert messages({"messages": [ASKED, twice]}) == [ASKED, CALLING]


@pytest.mark.parametrize(
    ("columns", "variables"),
    [
        ({"chat_template_kwargs": {"enable_thinking": False}}, {"enable_thinking": False}),
        ({"chat_template_kwargs": '{"enable_thinking": false}'}, {"enable_thinking": False}),
        ({"chat_template_kwargs": Struct(enable_thinking=True, documents=None)}, {"enable_thinking": True}),
        ({"chat_template_kwargs": {"enable_thinking": None}}, {"enable_thinking": None}),
        *(({"chat_template_kwargs": nothing}, {}) for nothing in (None, "", {}, "{}")),
        ({"enable_thinking": False}, {"enable_thinking": False}),
        ({"enable_thinking": "False"}, {"enable_thinking": False}),
        ({"enable_thinking": None, "documents": ""}, {}),
        ({"documents": [Struct(title="t", text=None)]}, {"documents": [{"title": "t"}]}),
        ({"documents": '[{"title": "t"}]'}, {"documents": [{"title": "t"}]}),
        (
            {"chat_template_kwargs": {"enable_thinking": True}, "enable_thinking": True, "documents": ["d"]},
            {"enable_thinking": True, "documents": ["d"]},
        ),
    ],
)
@pytest.mark.parametrize(
    "record",
    [
        {"messages": [ASKED, SAID]},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        {"prompt": "q", "completion": "a"},
        {"instruction": "q", "output": "a"},
    ],
    ids=["messages", "sharegpt", "prompt_completion", "alpaca"],
)
def test_variables_of_the_template(record: dict[str, Any], columns: dict[str, Any], variables: dict[str, Any]) -> None:
    found = read({**record, **columns})
    assert found.variables == variables and found.unread == ()


def test_a_variable_whose_column_is_not_there_is_named() -> None:
    with pytest.raises(
        RowError, match=r"no column 'thnk' \(data.columns maps enable_thinking to it\).*did you mean 'think'"
    ):
        read({"messages": [ASKED, SAID], "think": False}, columns={"enable_thinking": "thnk"})


SWITCHING = Reads(frozenset({"thinking", "builtin_tools"}), switches=frozenset({"thinking"}))


@pytest.mark.parametrize(
    ("value", "meant"),
    [
        *((on, True) for on in ("1", "yes", "ON", "true", 1, True)),
        *((off, False) for off in ("0", "no", "Off", "false", 0)),
    ],
)
def test_a_switch_is_true_or_false_however_a_table_writes_it(value: Any, meant: bool) -> None:
    for record in ({"messages": [ASKED, SAID]}, {"prompt": "q", "completion": "a"}):
        found = read({**record, "thinking": value}, SWITCHING)
        assert found.variables["thinking"] is meant and found.messages[1] == SAID and found.unread == ()


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"thinking": "maybe"}, "thinking is 'maybe', but thinking is a switch of the chat template"),
        (
            {"chat_template_kwargs": {"thinking": "no"}},
            "thinking of chat_template_kwargs is the text 'no'.*without quotes",
        ),
        ({"chat_template_kwargs": '{"thinking": "false"}'}, "thinking of chat_template_kwargs is the text 'false'"),
    ],
)
def test_text_that_a_switch_would_take_for_true_is_refused(columns: dict[str, Any], words: str) -> None:
    with pytest.raises(RowError, match=words):
        read({"messages": [ASKED, SAID], **columns}, SWITCHING)


@pytest.mark.parametrize(
    ("text", "meant"),
    [('["brave"]', ["brave"]), ('{"a": 1}', {"a": 1}), ("[not JSON", "[not JSON"), ("no", "no"), ("1", "1")],
)
def test_a_list_in_a_field_of_a_table_is_a_list(text: str, meant: Any) -> None:
    assert read({"messages": [ASKED, SAID], "builtin_tools": text}, SWITCHING).variables == {"builtin_tools": meant}


def test_thinking_beside_an_answer_is_thinking_where_it_is_no_truth() -> None:
    found = read({"prompt": "q", "completion": "a", "thinking": "So."}, SWITCHING)
    assert found.messages[1]["reasoning_content"] == "So." and found.variables == {}


def test_variables_by_another_column() -> None:
    record = {"messages": [ASKED, SAID], "think": False, "kwargs": {"documents": ["d"]}}
    found = read(record, columns={"enable_thinking": "think", "chat_template_kwargs": "kwargs"})
    assert found.variables == {"enable_thinking": False, "documents": ["d"]} and found.unread == ()


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"chat_template_kwargs": [1]}, "chat_template_kwargs is not an object: [1]"),
        ({"documents": "t"}, "documents is text that is not JSON"),
        ({"chat_template_kwargs": "{"}, "chat_template_kwargs is text that is not JSON"),
        ({"chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs holds tokenize, which a row cannot set"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs holds messages, which a row cannot set"),
        (
            {"chat_template_kwargs": {"enable_thinking": True}, "enable_thinking": False},
            "enable_thinking is False in its column and True in chat_template_kwargs: keep only one of them",
        ),
        (
            {"enable_thinking": dt.date(2024, 7, 26)},
            "chat_template_kwargs contains datetime.date(2024, 7, 26), a date, which JSON",
        ),
        ({"chat_template_kwargs": {"documents": "\x00"}}, "chat_template_kwargs contains U+0000 (NUL)"),
    ],
)
def test_variables_that_cannot_be_given(columns: dict[str, Any], words: str) -> None:
    with pytest.raises(RowError) as caught:
        read({"messages": [ASKED, SAID], **columns})
    assert str(caught.value).startswith(words)


def test_what_is_reserved_is_what_transformers_takes_itself() -> None:
    from transformers import PreTrainedTokenizerBase

    takes = inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters
    own = {name for name, one in takes.items() if one.kind is not one.VAR_KEYWORD} - {"self", "documents"}
    assert own <= formats.RESERVED


PARTS = [{"type": "text", "text": "q", "cache_control": {"type": "ephemeral"}, "image": None}]


@pytest.mark.parametrize(
    ("record", "unread"),
    [
        ({"messages": [ASKED, {**SAID, "id": 7}], "id": 3, "source": "web"}, ["messages.id", "id", "source"]),
        ({"messages": [{**ASKED, "content": PARTS}, SAID]}, ["messages.content.cache_control"]),
        (
            {"messages": [ASKED, {**CALLING, "tool_calls": [{**CALL, "index": 0}]}]},
            ["messages.tool_calls.index"],
        ),
        (
            {"messages": [ASKED, {"role": "assistant", "tool_calls": [{"name": "f", "parameters": {"x": 1}}]}]},
            ["messages.tool_calls.parameters"],
        ),
        (
            {"messages": [ASKED, {"role": "assistant", "function_call": {"name": "f", "args": {"x": 1}}}]},
            ["messages.function_call.args"],
        ),
        (
            {
                "conversations": [
                    {"from": "human", "value": "q"},
                    {"from": "function_call", "value": '{"name": "f", "y": 1}'},
                ]
            },
            ["conversations.y"],
        ),
        ({"messages": [ASKED, SAID], "tools": [{**OFFERED, "strict": True}]}, ["tools.strict"]),
        ({"messages": [{**ASKED, "train": True, "reasoning": "so"}, SAID]}, ["messages.train", "messages.reasoning"]),
        ({"messages": [{**ASKED, "name": "Ann"}, SAID]}, ["messages.name"]),
        ({"messages": [ASKED, CALLING, {**TOOL, "name": "f"}, SAID]}, []),  # whose result it is, the turn before says
        ({"messages": [{**ASKED, "weight": 0}, {**SAID, "weight": 1}]}, []),
        ({"messages": [ASKED, {**SAID, "tool_plan": "p"}]}, []),
        ({"messages": [ASKED, SAID], "empty": "", "none": None, "list": [], "object": {}}, []),
        ({"messages": [ASKED, SAID], "chat_template_kwargs": {"other": 1}}, ["chat_template_kwargs.other"]),
        ({"messages": [ASKED, SAID], "text": "t", "prompt": "p"}, ["text", "prompt"]),
        ({"prompt": [ASKED], "completion": [SAID], "reasoning": "so"}, ["reasoning"]),
        ({"prompt": "q", "completion": "a", "chosen": "c"}, ["chosen"]),
        ({"instruction": "q", "output": "a", "category": "c"}, ["category"]),
        ({"text": "t", "label": 1, "chat_template_kwargs": {"x": 1}}, ["label", "chat_template_kwargs"]),
        ({"input_ids": [1, 2], "completion_mask": [0, 1]}, ["completion_mask"]),
    ],
)
def test_what_nothing_reads_is_noted(record: dict[str, Any], unread: list[str]) -> None:
    assert list(formats.example(record, "auto", Data(), reads=THINKING_TEMPLATE).unread) == unread


def test_what_the_recipe_uses_is_read() -> None:
    record = {"messages": [ASKED, SAID], "source": "web", "label": "x", "id": 1}
    division = Split(train=0.5, test=0.5)
    assert formats.example(record, "auto", Data(group="source", split=division), "accepted").unread == ()
    assert formats.example(record, "auto", Data(group="origin", columns={"origin": "source"})).unread == ("label", "id")
    for ambiguous in ({"prompt": "q", "completion": "a", "label": True}, {"text": "t", "label": "x"}):
        assert formats.example(ambiguous, "auto", Data(split=division)).unread == ("label",)


def test_what_is_ignored_is_neither_read_nor_noted() -> None:
    record = {"messages": [ASKED, {**SAID, "reasoning": "so", "id": 7}], "tools": [OFFERED], "id": 1, "idea": 2}
    found = read(record, ignore=["messages.reasoning", "id", "tools"])
    assert found.messages == (ASKED, SAID) and found.tools == () and found.unread == ("messages.id", "idea")
    assert read(record, ignore=["messages.*", "id*"]).messages[1]["reasoning_content"] == "so"
    assert read(record, ignore=["messages.*", "id*"]).unread == ()
    patterns = ["messages.reasoning", "tools", "id*", "messages.id", "idd", "message.*", "nothing"]
    assert set(read({**record, "nothing": None}, ignore=patterns).ignored) == {*patterns} - {"idd", "message.*"}
    assert read({"messages": [ASKED, SAID], "enable_thinking": True}, ignore=["enable_thinking"]).variables == {}


def test_keys_that_the_template_reads_reach_it() -> None:
    assert read({"messages": [{**ASKED, "name": "Ann"}, SAID]}, Reads(keys=frozenset({"name"}))).unread == ()
    turn = {**SAID, "tool_plan": Struct(first="f", second=None)}
    assert read({"messages": [ASKED, turn]}).messages[1] == {**SAID, "tool_plan": {"first": "f"}}
    assert read({"messages": [ASKED, turn]}, Reads()).messages[1] == SAID


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (dt.datetime(2024, 7, 26), "datetime"),
        (dt.date(2024, 7, 26), "date"),
        (dt.time(1, 2), "time"),
        (dt.timedelta(1), "timedelta"),
        (decimal.Decimal("1.5"), "Decimal"),
        (b"a", "bytes"),
    ],
)
def test_what_a_loader_made_of_text_is_named(value: Any, kind: str) -> None:
    remedy = f"{kind} is a type of the data set or of its loader; convert it to text first (datasets: cast_column"
    call = {"name": "f", "arguments": {"when": {"day": value}}}
    for record, words in (
        ({"prompt": "q", "completion": value}, f"completion is neither text nor a list of turns: {kind}"),
        ({"instruction": "q", "output": value}, "output is not text: "),
        ({"text": value}, "text is not text: "),
        (
            {"messages": [ASKED, {**SAID, "content": value}]},
            "turn 2 of messages must have a role and a content, both text: ",
        ),
        ({"messages": [ASKED, {**SAID, "reasoning": value}]}, "reasoning of turn 2 of messages is not text: "),
        ({"messages": [ASKED, {"role": "assistant", "tool_calls": [call]}]}, "turn 2 (assistant) contains "),
    ):
        said = refusal(record)[1]
        assert said.startswith(words) and remedy in said
    assert "(in tool_calls.function.arguments.when.day)" in said


def test_a_message_is_short_whatever_the_value() -> None:
    deep: Any = "x" * 1000
    for _ in range(8):
        deep = [deep] * 8
    assert len(refusal({"messages": deep})[1]) < 300
    assert len(refusal({f"column {number}": 1 for number in range(1000)})[1]) < 500


# Rules


@pytest.mark.parametrize(
    ("turns", "words"),
    [
        ([ASKED], "must end with an assistant message (the last role is 'user')"),
        ([ASKED, SAID, ASKED], "must end with an assistant message (the last role is 'user')"),
        ([ASKED, CALLING, TOOL], "must end with an assistant message (the last role is 'tool')"),
        ([SAID], "has no prompt: nothing comes before its assistant message"),
        ([ASKED, ASKED, SAID], "has two consecutive user messages, 1 and 2"),
        ([ASKED, SAID, SAID], "has two consecutive assistant messages, 2 and 3"),
        ([ASKED, SYSTEM, SAID], "has a system message at position 2; only the first message can be a system message"),
        ([SYSTEM, SYSTEM, ASKED, SAID], "has a system message at position 2"),
        ([ASKED, TOOL, SAID], "has a tool message at position 2 that does not follow an assistant message"),
        ([TOOL, SAID], "has a tool message at position 1"),
        ([{**CALLING, "role": "user"}, SAID], "turn 1 of messages has tool calls, but its role is 'user'"),
        (
            [{"role": "bot", "content": "q"}, SAID],
            "turn 1 of messages has the unknown role 'bot'; valid roles: system, developer, user, ",
        ),
        (
            [{"from": "narrator", "value": "q"}, SAID],
            "turn 1 of messages has the unknown role 'narrator'; valid roles: ",
        ),
    ],
)
def test_turns_in_no_order_to_learn_from(turns: list[Any], words: str) -> None:
    for column in ("messages", "conversations"):
        rule, said = refusal({column: turns})
        assert rule == "roles" and said.startswith(words.replace("of messages", f"of {column}"))


@pytest.mark.parametrize(
    "turns",
    [
        [SYSTEM, SAID],
        [SAID, ASKED, SAID],
        [SYSTEM, ASKED, CALLING, TOOL, TOOL, SAID, ASKED, SAID],
        [ASKED, CALLING, TOOL, CALLING, TOOL, SAID],
        [ASKED, CALLING],
    ],
)
def test_orders_to_learn_from(turns: list[Any]) -> None:
    assert messages({"messages": turns}) == turns


def test_a_system_column_beside_a_system_turn_is_one_too_many() -> None:
    assert refusal({"messages": [SYSTEM, ASKED, SAID], "system": "other"})[0] == "roles"


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"prompt": " \n", "completion": "a"}, "turn 1 (user) is empty or contains only white space"),
        ({"prompt": "q", "completion": ""}, "turn 2 (assistant) is empty or contains only white space"),
        ({"instruction": "", "input": " ", "output": "a"}, "turn 1 (user) is empty"),
        ({"messages": [SYSTEM, ASKED, {**SAID, "content": "\t"}]}, "turn 3 (assistant) is empty"),
        ({"text": " \n"}, "text is empty or contains only white space"),
        ({"input_ids": [1, 2], "labels": [-100, -100]}, "has no label that carries loss"),
    ],
)
def test_nothing_said(record: dict[str, Any], words: str) -> None:
    rule, said = refusal(record)
    assert rule == "empty" and said.startswith(words)
    assert made(record, clean=Clean(empty="keep"))


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"messages": []}, "messages is empty: it must contain at least one turn"),
        ({"conversations": "[]"}, "conversations is empty: it must contain at least one turn"),
        ({"input_ids": []}, "input_ids is empty"),
        ({"input_ids": [1], "attention_mask": [0]}, "input_ids is empty"),
    ],
)
def test_what_is_not_there_cannot_be_kept(record: dict[str, Any], words: str) -> None:
    assert refusal(record) == ("empty", words)
    assert refusal(record, clean=Clean(empty="keep")) == ("malformed", words)


def test_a_call_or_a_thought_is_something_said() -> None:
    thought = {**SAID, "content": "", "reasoning_content": "so"}
    assert messages({"messages": [ASKED, CALLING, {**TOOL, "content": ""}, thought]})[3] == thought


@pytest.mark.parametrize(
    ("sign", "words"),
    [
        ("\x00", "U+0000 (NUL)"),
        ("\x1b", "U+001B (a control character)"),
        ("\ufffd", "U+FFFD (the replacement character)"),
        ("\ud83d", "U+D83D (half a surrogate pair)"),
    ],
)
@pytest.mark.parametrize(
    ("template", "where"),
    [
        ({"prompt": "q", "completion": "a?"}, "turn 2 (assistant) contains "),
        ({"messages": [ASKED, {**SAID, "reasoning_content": "?"}]}, "turn 2 (assistant) contains "),
        ({"messages": [ASKED, {"role": "assistant", "tool_calls": [{"name": "f", "arguments": {"?": 1}}]}]}, "turn 2 "),
        ({"messages": [ASKED, SAID], "tools": [{"name": "f", "description": "?"}]}, "tools contains "),
        ({"text": "a\tb\r\n?"}, "text contains "),
    ],
)
def test_characters_that_cannot_be_learnt(template: dict[str, Any], where: str, sign: str, words: str) -> None:
    record = json.loads(json.dumps(template).replace("?", json.dumps(sign)[1:-1]))
    rule, said = refusal(record)
    assert rule == "unicode" and said.startswith(where) and said.endswith(words)
    if "surrogate" in words:
        assert refusal(record, clean=Clean(unicode="keep"))[0] == "malformed"
    else:
        assert made(record, clean=Clean(unicode="keep"))


def test_ordinary_text_of_the_world_is_no_trouble() -> None:
    said = "tab\tline\r\n\u200b naïve 日本語 🙂\u0085"
    assert messages({"prompt": said, "completion": said})[1]["content"] == said


def test_an_accepted_answer_is_looked_at_too() -> None:
    with pytest.raises(RowError, match=r"the accepted answer contains U\+D800"):
        formats.example({"prompt": "q", "completion": "a"}, "auto", Data(), ["\ud800"])


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"messages": "oops"}, "messages is text that is not JSON (Expecting value: line 1 column 1 (char 0)): 'oops'"),
        ({"messages": {"role": "user"}}, "messages is not a list of turns: {'role': 'user'}"),
        ({"messages": None}, "messages is not a list of turns: None"),
        ({"messages": ["q"]}, "turn 1 of messages is not an object: 'q'"),
        ({"messages": [{"content": "q"}]}, "turn 1 of messages must have a role and a content"),
        ({"messages": [{"role": "user"}]}, "turn 1 of messages must have a role and a content"),
        ({"messages": [{"role": 1, "content": "q"}]}, "turn 1 of messages must have a role and a content"),
        (
            {"messages": [ASKED, {**SAID, "content": 4}]},
            "turn 2 of messages must have a role and a content, both text: 4",
        ),
        (
            {
                "messages": [
                    {**ASKED, "content": [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": "b"}]}
                ]
            },
            "part 2 of turn 1 of messages is of type 'image_url'; only text can be trained on",
        ),
        ({"messages": [{**ASKED, "content": ["a"]}]}, "part 1 of turn 1 of messages is not an object"),
        ({"messages": [ASKED, {**SAID, "weight": 0.5}]}, "turn 2 of messages has the weight 0.5; it must be 0 or 1"),
        ({"messages": [ASKED, {**SAID, "name": 7}]}, "name of turn 2 of messages is not text: 7"),
        (
            {"messages": [ASKED, {**SAID, "tool_calls": 7}]},
            "tool_calls of turn 2 of messages is not a list of calls: 7",
        ),
        ({"messages": [ASKED, {**SAID, "tool_calls": [{}]}]}, "call 1 of turn 2 of messages has no name: {}"),
        (
            {"messages": [ASKED, {**SAID, "tool_calls": [{"name": "f", "arguments": "{"}]}]},
            "arguments of call 1 of turn 2 of messages is text that is not JSON",
        ),
        (
            {"messages": [ASKED, {**SAID, "tool_calls": [{"name": "f", "arguments": "[1]"}]}]},
            "arguments of call 1 of turn 2 of messages are not an object: '[1]'",
        ),
        (
            {"messages": [ASKED, {**SAID, "tool_calls": [{"name": "f", "arguments": {"x": b"1"}}]}]},
            "turn 2 (assistant) contains b'1', a bytes, which JSON cannot represent",
        ),
        (
            {"messages": [ASKED, SAID], "tools": [{"name": "f", "x": float("nan")}]},
            "tools contains nan, a float, which JSON cannot represent",
        ),
        (
            {"conversations": [{"from": "function_call", "value": "f(x)"}]},
            "turn 1 of conversations is text that is not JSON",
        ),
        ({"messages": [ASKED, SAID], "tools": "f"}, "tools is text that is not JSON"),
        ({"messages": [ASKED, SAID], "tools": {"f": 1}}, "tools is not a list of functions"),
        ({"messages": [ASKED, SAID], "tools": [{"type": "web_search"}]}, "function 1 of tools has no name"),
        ({"messages": [ASKED, SAID], "system": 3}, "system is not text: 3"),
        ({"prompt": 1, "completion": "a"}, "prompt is neither text nor a list of turns: 1"),
        ({"prompt": "q", "completion": None}, "completion is neither text nor a list of turns: None"),
        ({"instruction": 1, "output": "a"}, "instruction is not text: 1"),
        (
            {"instruction": "q", "output": "a", "history": [["q"]]},
            "pair 1 of history must be a question and an answer: ['q']",
        ),
        ({"instruction": "q", "output": "a", "history": [["q", 1]]}, "pair 1 of history is not text: 1"),
        ({"text": ["t"]}, "text is not text: ['t']"),
        ({"input_ids": [1, "2"]}, "input_ids is not a list of integers: [1, '2']"),
        ({"input_ids": [True]}, "input_ids is not a list of integers: [True]"),
        ({"input_ids": [1, -1]}, "has input_ids from -1 to 1; ids must be 0 to 2147483647"),
        ({"input_ids": [1, 2**31]}, "has input_ids from 1 to 2147483648; ids must be 0 to 2147483647"),
        ({"input_ids": [1, 2], "labels": [1]}, "has 2 input_ids and 1 labels"),
        (
            {"input_ids": [1, 2], "labels": [1, 3]},
            "has the label 3 at position 1, where the token is 2: a label must be its token or -100",
        ),
        (
            {"input_ids": [1, 2], "attention_mask": [1]},
            "attention_mask must have 2 values, one for each of input_ids (it has 1)",
        ),
        (
            {"input_ids": [1, 2, 3], "attention_mask": [1, 0, 1]},
            "attention_mask must have 3 values",
        ),
        (
            {"input_ids": [1, 2], "attention_mask": [1, 2]},
            "attention_mask must have 2 values",
        ),
    ],
)
def test_malformed(record: dict[str, Any], words: str) -> None:
    rule, said = refusal(record)
    assert rule == "malformed" and said.startswith(words)


def test_what_is_nested_too_deeply_is_refused() -> None:
    deep: Any = 1
    for _ in range(20_000):
        deep = [deep]
    for record in (
        {"messages": [ASKED, {**SAID, "tool_calls": [{"name": "f", "arguments": {"x": deep}}]}]},
        {"messages": [ASKED, SAID], "tools": [{"name": "f", "parameters": deep}]},
        {"messages": "[" * 20_000},
    ):
        assert refusal(record) == ("malformed", "is nested too deeply")


# Values of any kind

KEYS = st.sampled_from(
    ["role", "content", "from", "value", "type", "text", "weight", "tool_calls", "function_call", "name", "arguments"]
)
SPOKEN = st.sampled_from([*SPEAKERS, "text", "f", "{}", "[]", '{"name": "f", "arguments": "{}"}'])
ANY_TEXT = st.text(st.characters())  # lone surrogates too
LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | ANY_TEXT | st.binary(max_size=3) | SPOKEN
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS | ANY_TEXT, inner, max_size=5),
    max_leaves=25,
)
TURN = st.fixed_dictionaries(
    {"role": SPOKEN, "content": SPOKEN | VALUES}, optional={"tool_calls": VALUES, "weight": VALUES}
)
TURNS = st.lists(TURN | st.dictionaries(KEYS, VALUES, max_size=4), max_size=4) | st.lists(TURN, min_size=2, max_size=2)
OURS = st.sampled_from(sorted(formats.KNOWN))
IDS = st.lists(st.integers(-101, 3), max_size=3)
COLUMNS = VALUES | TURNS | TURNS.map(repr) | IDS | SPOKEN


@st.composite
def records(draw: st.DrawFn) -> tuple[str, dict[str, Any]]:
    """A format, and a record that mostly has its columns."""
    name = draw(st.sampled_from(sorted(formats.FORMS)))
    form = formats.FORMS[name]
    own = dict.fromkeys(form.needs, COLUMNS)
    record = draw(st.fixed_dictionaries(own, optional=dict.fromkeys(form.takes, COLUMNS)))
    return name, record | draw(st.dictionaries(OURS | ANY_TEXT, COLUMNS, max_size=1))


def outcome(record: dict[str, Any], format: str, **section: Any) -> Example | RowError:
    try:
        return made(record, format, **section)
    except RowError as error:
        return error


@pytest.mark.slow
@settings(max_examples=500, deadline=None)
@given(
    named=records(),
    auto=st.booleans(),
    keep=st.booleans(),
    columns=st.just({}) | st.dictionaries(OURS, OURS | ANY_TEXT, max_size=2),
)
def test_whatever_comes_only_row_errors_leave(
    named: tuple[str, dict[str, Any]], auto: bool, keep: bool, columns: dict[str, str]
) -> None:
    name, record = named
    clean = Clean(unicode="keep", empty="keep") if keep else Clean()
    found = outcome(record, "auto" if auto else name, clean=clean, columns=columns)
    if isinstance(found, RowError):
        assert str(found).encode() and getattr(clean, found.rule) != "keep"
    if isinstance(found, Conversation):
        assert json.dumps([found.messages, found.tools], ensure_ascii=False, allow_nan=False).encode()
        assert found.messages[-1]["role"] == "assistant" and len(found.messages) > 1
        assert len(found.trained) in (0, len(found.messages))


PLAIN = st.text(st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="\ufffd"), min_size=1).filter(
    str.strip
)


@settings(deadline=None)
@given(said=st.lists(st.tuples(PLAIN, PLAIN), min_size=1, max_size=3))
def test_text_passes_as_it_is(said: list[tuple[str, str]]) -> None:
    pairs = [zip(("user", "assistant"), pair, strict=True) for pair in said]
    turns = [{"role": role, "content": text} for pair in pairs for role, text in pair]
    assert messages({"messages": turns}) == turns == messages({"messages": json.dumps(turns)})
    *history, (prompt, completion) = said
    assert messages({"instruction": prompt, "output": completion, "history": history}) == turns
