"""The templates that ship with qkit: each must be one that can be learnt from and served."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from helpers.tiny import build_tokenizer
from qkit.chat import template
from qkit.chat.template import Renderer
from qkit.plugins.example import THINKING, Conversation, Reads
from qkit.recipe import chat_templates
from qkit.recipe.schema import Data
from qkit.tasks._conversation.checks import of_rows
from qkit.tasks._conversation.encode import tokenize
from qkit.tasks._conversation.rows import EncodedRow

SYSTEM = {"role": "system", "content": "Be brief."}
TURNS = (
    {"role": "user", "content": "Two and two?"},
    {"role": "assistant", "content": "Four.\n\nOr 4."},
    {"role": "user", "content": " And three? "},
    {"role": "assistant", "content": "Five."},
)
TOOLS = tuple(
    {
        "type": "function",
        "function": {"name": name, "description": "<&'é", "parameters": {"type": "object", "properties": {}}},
    }
    for name in ("temperature", "wind")
)
CALLS = [
    {"type": "function", "function": {"name": "temperature", "arguments": {"city": 'Bümp"liz', "days": 2}}},
    {"type": "function", "function": {"name": "wind", "arguments": {}}},
]
CALLING = (
    {"role": "user", "content": "Is it cold in Bern?"},
    {"role": "assistant", "content": "", "tool_calls": CALLS},
    {"role": "tool", "content": "-3"},
    {"role": "tool", "content": "calm"},
    {"role": "assistant", "content": "Yes, -3 degrees."},
)


def reader(name: str) -> Renderer:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = (chat_templates.FOLDER / f"{name}.jinja").read_text(encoding="utf-8")
    return template.renderer(tokenizer)


def rows(of: Renderer, messages: Any, tools: Any = (), loss: str = "assistant") -> list[EncodedRow]:
    [result] = tokenize(of, [Conversation(tuple(messages), tools=tuple(tools))], Data(loss=loss))
    assert result.error is None
    return list(result.rows)


def learnt(of: Renderer, row: EncodedRow) -> list[str]:
    """Each stretch of tokens that carries loss, as text."""
    return [of.tokenizer.decode(row.input_ids[begin:end]) for begin, end in of_rows.spans(row.labels)]


def test_the_folder_holds_what_the_errors_name() -> None:
    assert chat_templates.named() == ["chatml", "plain"]


@pytest.mark.parametrize("name", chat_templates.named())
@pytest.mark.parametrize("system", [(), (SYSTEM,)], ids=["", "system"])
def test_every_turn_is_learnt_from_its_prompt_to_its_end(name: str, system: tuple[Any, ...]) -> None:
    of = reader(name)
    [row] = rows(of, [*system, *TURNS])  # a second row would mean that a turn reads differently further on
    end = of.tokenizer.convert_ids_to_tokens(of.end)
    assert end == of.tokenizer.eos_token and learnt(of, row) == [f"Four.\n\nOr 4.{end}", f"Five.{end}"]
    assert not list(of_rows.examine(of, of_rows.facts(of, len(of.tokenizer)), row, "assistant", closely=True))


@pytest.mark.parametrize("name", chat_templates.named())
@pytest.mark.parametrize("system", [(), (SYSTEM,)], ids=["", "system"])
def test_the_prompt_is_a_true_prefix_whatever_is_said_before(name: str, system: tuple[Any, ...]) -> None:
    of = reader(name)
    for count in (1, 3):
        messages = [*system, *TURNS[:count]]
        prompt, whole = of.render(messages), of.render([*messages, TURNS[count]], answered=True)
        assert whole.startswith(prompt)
        prompt_ids, whole_ids = of.encode([prompt, whole])
        assert whole_ids[: len(prompt_ids)] == prompt_ids
        assert of.render([*system, *TURNS], answered=True).startswith(of.through_end(whole))


def test_chatml_reads_as_chatml() -> None:
    assert reader("chatml").render([SYSTEM, *TURNS[:2], {"role": "user", "content": None}]) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nTwo and two?<|im_end|>\n"
        "<|im_start|>assistant\nFour.\n\nOr 4.<|im_end|>\n<|im_start|>user\n<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize("system", [(), (SYSTEM,)], ids=["", "system"])
def test_chatml_offers_tools_in_the_hermes_way(system: tuple[Any, ...]) -> None:
    text = reader("chatml").render([*system, *CALLING], TOOLS, answered=True)
    first, *turns = text.removesuffix("<|im_end|>\n").split("<|im_end|>\n")
    assert first.startswith("<|im_start|>system\n" + ("Be brief.\n\n" if system else ""))
    assert first.count("Be brief.") == len(system) and text.count("<|im_start|>system") == 1
    offered = re.search(r"<tools>\n(.*)\n</tools>", first, re.DOTALL)
    assert offered and [json.loads(line) for line in offered[1].split("\n")] == list(TOOLS)
    assert [turn.split("\n")[0] for turn in turns] == [
        "<|im_start|>user",
        "<|im_start|>assistant",
        "<|im_start|>user",
        "<|im_start|>assistant",
    ]
    assert turns[2] == (
        "<|im_start|>user\n<tool_response>\n-3\n</tool_response>\n<tool_response>\ncalm\n</tool_response>"
    )


@pytest.mark.parametrize("said", ["", "Let me see."])
@pytest.mark.parametrize("written", [False, True], ids=["as objects", "as JSON"])
def test_chatml_writes_calls_that_a_hermes_parser_reads(said: str, written: bool) -> None:
    of = reader("chatml")
    calls = [function | {"arguments": json.dumps(function["arguments"])} for function in (c["function"] for c in CALLS)]
    turn = CALLING[1] | {"content": said, "tool_calls": [{"function": f} for f in calls] if written else CALLS}
    [row] = rows(of, [CALLING[0], turn], TOOLS, loss="completion")
    [answer] = learnt(of, row)
    found = [json.loads(call) for call in re.findall(r"<tool_call>\n(.*?)\n</tool_call>", answer)]
    assert found == [call["function"] for call in CALLS]
    assert answer.startswith(f"{said}\n<tool_call>\n" if said else "<tool_call>\n") and answer.endswith("<|im_end|>")


def test_chatml_learns_calls_and_answers() -> None:
    of = reader("chatml")
    [row] = rows(of, CALLING, TOOLS)
    calls, answer = learnt(of, row)
    assert "wind" in calls and answer == "Yes, -3 degrees.<|im_end|>"
    assert not list(of_rows.examine(of, of_rows.facts(of, len(of.tokenizer)), row, "assistant", closely=True))


def test_plain_reads_as_words() -> None:
    assert reader("plain").render([SYSTEM, *TURNS[:3]]) == (
        "System:\nBe brief.\n\nUser:\nTwo and two?\n\nAssistant:\nFour.\n\nOr 4.<|im_end|>\n\n"
        "User:\nAnd three?\n\nAssistant:\n"
    )


@pytest.mark.parametrize(("messages", "tools"), [(CALLING[:1], TOOLS), (CALLING[:2], ()), (CALLING[2:4], ())])
def test_plain_refuses_tools_and_says_which_template_takes_them(messages: Any, tools: Any) -> None:
    with pytest.raises(template.TemplateRefusal, match="take chatml"):
        reader("plain").render(messages, tools, answered=True)


# What a template reads. The parts are written after those of public templates.
LLAMA = (
    "{%- if custom_tools is defined %}{%- set tools = custom_tools %}{%- endif %}"
    "{%- if not date_string is defined %}{%- set date_string = strftime_now('%d %b %Y') %}{%- endif %}"
    "{%- if messages[0]['role'] == 'system' %}{%- set system_message = messages[0]['content'] | trim %}"
    "{%- else %}{%- set system_message = '' %}{%- endif %}{{ bos_token + system_message + date_string }}"
)
QWEN_VL = (
    "{% set count = namespace(images=0) %}{% for message in messages %}{% if add_vision_id %}Picture: {% endif %}"
    "{{ message.role }}{% for part in message.content %}{{ part.text }}{% endfor %}{% endfor %}"
)
COHERE = (
    "{% set loop_messages = messages[1:] %}{% for m in loop_messages %}{{ m['tool_plan'] }}{{ m.get('citations') }}"
    "{% if 'prefix' in m %}{{ m.prefix }}{% endif %}{% endfor %}{{ messages[-1].partial }}{{ documents | tojson }}"
)


@pytest.mark.parametrize(
    ("text", "variables", "keys"),
    [
        (LLAMA, {"custom_tools", "date_string"}, {"role", "content"}),
        (QWEN_VL, {"add_vision_id"}, {"role", "content"}),
        (COHERE, {"documents"}, {"tool_plan", "citations", "prefix", "partial"}),
        (
            "{% set enable_thinking = enable_thinking | default(true) %}{{ enable_thinking }}",
            {"enable_thinking"},
            set(),
        ),
        (
            "{% macro say(message, times=2) %}{{ message.name * times }}{% endmacro %}{{ say(messages[0]) }}",
            set(),
            {"name"},
        ),
        ("{% generation %}{{ messages[0].x }}{{ eos_token }}{% endgeneration %}{% break_off %}", set(), set()),
        ("{% for m in messages %}{% generation %}{{ m.x }}{% endgeneration %}{% break %}{% endfor %}", set(), {"x"}),
    ],
)
def test_what_a_template_reads(text: str, variables: set[str], keys: set[str]) -> None:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = text
    found = template.reads(tokenizer)
    assert Reads(found.variables, found.keys) == Reads(frozenset(variables), frozenset(keys))
    tokenizer.chat_template = {"default": "{{ messages[0].role }}", "tool_use": text}
    found = template.reads(tokenizer)
    assert Reads(found.variables, found.keys) == Reads(frozenset(variables), frozenset({*keys, "role"}))


@pytest.mark.parametrize(
    ("text", "switches"),
    [
        ("{% if enable_thinking is defined and enable_thinking is false %}a{% endif %}", {"enable_thinking"}),
        ("{% set thinking = thinking if thinking is defined else true %}{{ 'a' if thinking }}", {"thinking"}),
        ("{% if not (thinking | default(true)) or think == false %}a{% endif %}", {"thinking", "think"}),
        ("{% if effort %}{{ effort }}{% endif %}{{ thinking }}", set()),
        ("{% if effort == 'low' %}a{% endif %}{% if mode is string %}b{% endif %}", set()),
        ("{% for tool in builtin_tools %}{{ tool }}{% endfor %}", set()),
    ],
)
def test_what_a_template_takes_for_a_switch(text: str, switches: set[str]) -> None:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = text
    assert template.reads(tokenizer).switches == switches


@pytest.mark.parametrize("name", THINKING)
def test_thinking_has_the_name_that_the_template_reads(name: str) -> None:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = f"{{% for m in messages %}}{{{{ (m.{name} or '') + '|' + m.content }}}}{{% endfor %}}"
    turn = {"role": "assistant", "content": "a", "reasoning_content": "so"}
    assert template.render(tokenizer, [turn], answered=True) == "so|a"


def test_variables_reach_the_template() -> None:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = (
        "{{ messages[0].content + ('!' if loud else '') + (documents or [{'text': 'none'}])[0].text }}"
    )
    turn = {"role": "user", "content": "a"}
    assert template.render(tokenizer, [turn]) == "anone"
    assert template.render(tokenizer, [turn], variables={"loud": True, "documents": [{"text": "d"}]}) == "a!d"


def test_an_answer_keeps_its_indentation_in_our_templates() -> None:
    for name in chat_templates.named():
        of = reader(name)
        code = {"role": "assistant", "content": "    return x\n"}
        [row] = rows(of, [{"role": "user", "content": "def f(x):"}, code])
        assert learnt(of, row) == [f"    return x\n{of.tokenizer.eos_token}"]
