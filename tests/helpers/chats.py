"""Chat requests in every form that OpenAI's interface allows, and templates to render them."""

from __future__ import annotations

import json
from typing import Any

from helpers.data_traps.models import FAMILIES, Tiny
from helpers.paths import GOLDEN

FILE = GOLDEN / "vllm_conversations.json"


MODEL = Tiny(bos="<s>")


# Forms that templates of well-known models have; each shows all that it is given.
PARTS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content is string %}'{{ m.content }}'{% else %}"
    "{% for part in m.content %}[{{ part.text }}]{% endfor %}{% endif %}{{ m.tool_calls | tojson if m.tool_calls else '' }}"
    "{{ m.reasoning_content }}<|im_end|>\n{% endfor %}{{ '<|im_start|>assistant\n' if add_generation_prompt }}"
)


FORMS = {
    "parts": PARTS,
    "parts in a macro": "{% macro write(c) %}{% for p in c %}[{{ p.text }}]{% endfor %}{% endmacro %}{% set turns = messages[0:] %}"
    "{% for m in turns %}{{ m.role }}{{ write(m['content']) }}<|im_end|>\n{% endfor %}",
    "parts by a name": "{% for m in messages %}{% set content = m.content %}{{ m.role }}{% for p in content %}[{{ p.text }}]{% endfor %}"
    "{% generation %}<|im_end|>{% endgeneration %}\n{% endfor %}",
    "developer": "{% for m in messages %}{{ 'system' if m.role == 'developer' else m.role }}: {{ m.content }}<|im_end|>\n{% endfor %}",
    "whole": "{{ tools | tojson }}{{ messages | tojson }}<|im_end|>",
}


TEMPLATES = {name: Tiny(name).chat_template for name in FAMILIES} | FORMS


def parts(*texts: str | None) -> list[dict[str, Any]]:
    return [{"type": "text", "text": text} for text in texts]


def call(number: int, name: str = "add", arguments: Any = None) -> dict[str, Any]:
    written = json.dumps({"b": 1, "a": None}) if arguments is None else arguments
    return {"type": "function", "id": f"call{number:05d}", "function": {"name": name, "arguments": written}}


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def system(content: Any, role: str = "system") -> dict[str, Any]:
    return {"role": role, "content": content}


def said(content: Any, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def result(content: Any, number: int = 0, **more: Any) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": f"call{number:05d}", "content": content, **more}


ADD = {
    "type": "function",
    "function": {"name": "add", "parameters": {"type": "object", "properties": {"b": {}, "a": {}}}},
}


FIND = {
    "function": {
        "parameters": {"type": "object"},
        "description": "<é&'",
        "name": "find",
        "strict": True,
        "returns": "x",
    },
    "x": 1,
}


BARE = {"type": "function", "function": {"name": "bare"}}


ONE_CALL = said(None, tool_calls=[call(0)])


EXTRA = {"type": "text", "text": " only ", "cache_control": {"type": "ephemeral"}}


REQUESTS: dict[str, dict[str, Any]] = {
    "parts": {"messages": [system(parts("Be", "brief.")), user(parts("a", "", "b")), said(parts("c", "d")), user([EXTRA])]},
    "one part": {"messages": [system(parts("Be brief.")), user(parts("a"))]},
    "lines in parts": {"messages": [user(parts("  a\n", "\n  b  "))]},
    "parts with nothing in them": {"messages": [user(parts("", "")), said("c"), user(parts("a", None))]},
    "a refusal": {"messages": [user("a"), said([{"type": "refusal", "refusal": "no"}]), user("b")]},
    "a call and its result": {"messages": [user("a"), ONE_CALL, result("3"), said("three"), user("b")], "tools": [ADD]},
    "a result in parts": {"messages": [user("a"), ONE_CALL, result(parts("3", "", "4"), name="add")], "tools": [ADD]},
    "two calls": {"messages": [user("a"), said("so", tool_calls=[call(0), call(1, "find", "")]), result("3"), result("4", 1)]},
    "tools": {"messages": [system("Be brief."), user("a")], "tools": [FIND, ADD, BARE]},
    "no calls": {"messages": [user("a"), said("b", tool_calls=[]), user("c")]},
    "null calls": {"messages": [user("a"), said("b", tool_calls=None, refusal=None, audio=None), user("c")]},
    "thinking": {"messages": [user("a"), said("b", reasoning="so"), user("c")]},
    "thinking as it was called": {"messages": [user("a"), said("b", reasoning_content="so"), user("c")]},
    "thinking and a call": {"messages": [user("a"), {**ONE_CALL, "reasoning": "so"}, result("3")]},
    "a developer": {"messages": [system("Be brief.", "developer"), user("a")]},
    "system and developer": {"messages": [system("Be brief."), system(parts("And", "kind."), "developer"), user("a")]},
    "a developer later on": {"messages": [system("Be brief."), user("a"), said("b"), system("Now.", "developer"), user("c")]},
    "system later on": {"messages": [user("a"), said("b"), system("Be brief."), user("c")]},
    "a name": {"messages": [{**user("a"), "name": "bob"}]},
    "a special token": {"messages": [user("a<|im_end|>b")]},
}  # fmt: skip


# A request's other names for the same: vLLM refuses them, or takes them for something else.
AFTER = REQUESTS["a call and its result"]["messages"][2:]


def calling(turn: dict[str, Any]) -> dict[str, Any]:
    """A request of which the second turn calls."""
    return {"messages": [user("a"), {"role": "assistant", "tool_calls": [call(0)], **turn}, *AFTER], "tools": [ADD]}


def answering(**more: Any) -> dict[str, Any]:
    return {"messages": [user("a"), said("b", **more), user("c")]}


SAME: dict[str, tuple[dict[str, Any], str]] = {
    "tools: []": ({**REQUESTS["one part"], "tools": []}, "one part"),
    "tools: null": ({**REQUESTS["one part"], "tools": None}, "one part"),
    "tools: ''": ({**REQUESTS["one part"], "tools": ""}, "one part"),
    "content: ''": (calling({"content": ""}), "a call and its result"),
    "content: []": (calling({"content": []}), "a call and its result"),
    "no content": (calling({}), "a call and its result"),
    "nulls": (answering(tool_calls=None, name=None, reasoning=None, tool_call_id=None, function_call=None), "no calls"),
    "nothings": (answering(tool_calls="", name="", reasoning="", function_call={}), "no calls"),
}  # fmt: skip
