"""Checks whether a row can be trained on: its texts are valid, and its turns come in a valid order."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from qkit.core.batching import IGNORED
from qkit.core.errors import printable, short
from qkit.plugins.example import Conversation, Example, Message, RowError, Text, Tokens
from qkit.recipe.schema import Data
from qkit.tasks._conversation.turns import loaded, shown
from qkit.tasks._texts import check_characters

SYSTEM = ("system", "developer")
KWARGS = "chat_template_kwargs"  # TRL's and vLLM's name for a template's variables


def check_texts(example: Example, section: Data) -> None:
    if isinstance(example, Text):
        check_text(example.text, "text", section)
    if isinstance(example, Conversation):
        for number, message in enumerate(example.messages, start=1):
            # most turns have only a role and a content; walking through their keys would double the time for a row
            spoken = message["content"] if len(message) == 2 else message
            check_text(spoken, f"turn {number} ({message['role']})", section)
        check_text(example.tools, "tools", section)
        check_text(example.variables, KWARGS, section)
        check_text(example.reference, "the accepted answer", section)


def check_text(value: Any, where: str, section: Data) -> None:
    """Check every text of a value, keys of objects included, for invalid characters.

    Raises:
        RowError: a text contains one, or JSON cannot represent the value.
    """
    check_characters(value if isinstance(value, str) else "\n".join(_strings(value, where)), where, section)


def _strings(value: Any, where: str, key: str = "") -> Iterator[str]:
    """Every text in a value. `key`: the path of keys that leads to it, for a message."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for name, item in value.items():
            yield from _strings(name, where)
            yield from _strings(item, where, f"{key}.{name}")
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _strings(item, where, key)
    elif not (value is None or isinstance(value, int) or (isinstance(value, float) and math.isfinite(value))):
        at = f" (in {short(printable(key[1:]))})" if key else ""
        kind = type(value).__name__
        raise RowError(f"{where} contains {shown(value)}, a {kind}, which JSON cannot represent{at}{loaded(value)}")


def check_empty(example: Example) -> None:
    if isinstance(example, Text) and not example.text.strip():
        raise RowError("text is empty or contains only white space", "empty")
    if isinstance(example, Tokens) and not set(example.labels) - {IGNORED}:
        raise RowError("has no label that carries loss", "empty")
    if isinstance(example, Conversation):
        for number, message in enumerate(example.messages, start=1):
            if message["role"] in ("user", "assistant") and not _says(message):
                raise RowError(f"turn {number} ({message['role']}) is empty or contains only white space", "empty")


def _says(message: Message) -> bool:
    return bool(message["content"].strip() or message.get("tool_calls") or message.get("reasoning_content", "").strip())


def check_order(roles: Sequence[str]) -> None:
    problem = _order_problem(roles)
    if problem:
        raise RowError(problem, "roles")


def _order_problem(roles: Sequence[str]) -> str:
    """What is wrong with the order of the turns; "" if it is valid."""
    if roles[-1] != "assistant":
        return f"must end with an assistant message (the last role is {roles[-1]!r})"
    if len(roles) == 1:
        return "has no prompt: nothing comes before its assistant message"
    for number, (before, role) in enumerate(zip(["", *roles], roles, strict=False), start=1):
        if role in SYSTEM and number > 1:
            return f"has a system message at position {number}; only the first message can be a system message"
        if role == before and role in ("user", "assistant"):
            return f"has two consecutive {role} messages, {number - 1} and {number}"
        if role == "tool" and before not in ("assistant", "tool"):
            return f"has a tool message at position {number} that does not follow an assistant message"
    return ""
