"""The conversations of prepared rows, read back from their columns; and the questions of records, which need no answer."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qkit.core.errors import listed, short
from qkit.plugins.example import RowError

PROMPTS = ("messages", "prompt", "question", "text")  # columns that hold the question, the first that a record has
BESIDE = ("tools", "chat_template_kwargs")


@dataclass(frozen=True)
class PreparedConversations:
    """By row: the prompts as token ids, and the turns that they were rendered from.

    `calls`: tool calls of each answer. `variables`: chat template variables.
    """

    rows: tuple[Sequence[int], ...]
    prompts: tuple[Sequence[int], ...]
    messages: tuple[list[dict[str, Any]], ...]
    tools: tuple[list[dict[str, Any]], ...]
    answers: tuple[str, ...]
    calls: tuple[list[dict[str, Any]], ...]
    variables: tuple[dict[str, Any], ...]


def conversations(records: Sequence[Mapping[str, Any]]) -> PreparedConversations:
    """Read the columns of prepared rows; those of earlier versions may lack `calls` and `variables`."""
    return PreparedConversations(
        rows=tuple(r["input_ids"] for r in records),
        prompts=tuple(r["input_ids"][: r["start"]] for r in records),
        messages=tuple(json.loads(r["messages"]) for r in records),
        tools=tuple(json.loads(r["tools"]) for r in records),
        answers=tuple(r["answer"] for r in records),
        calls=tuple(json.loads(r.get("calls") or "[]") for r in records),
        variables=tuple(json.loads(r.get("variables") or "{}") for r in records),
    )


def asked(record: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """`messages` that end with a question, and `tools` and `chat_template_kwargs` where the record has them.

    `columns`: the record's names for `messages`, `prompt`, `system` and these.

    Raises:
        RowError: there is no question.
    """
    values = {name: record.get(columns.get(name, name)) for name in (*PROMPTS, *BESIDE, "system")}
    name = next((name for name in PROMPTS if values[name] is not None), None)
    if name is None:
        wanted = ", ".join(PROMPTS[:-1])
        raise RowError(f"has the columns {listed(record)}; it must have a column {wanted} or {PROMPTS[-1]}")
    turns = _turns(name, values[name])
    system = [{"role": "system", "content": values["system"]}] if values["system"] else []
    beside = {name: _loaded(name, values[name]) for name in BESIDE if values[name] is not None}
    return {"messages": [*system, *turns], **beside}


def _turns(name: str, value: Any) -> list[Any]:
    """The turns of a conversation up to its last question; of a text, that text as a question."""
    if name != "messages" and isinstance(value, str):
        if not value.strip():
            raise RowError(f"{name} is empty or contains only white space", "empty")
        return [{"role": "user", "content": value}]
    turns = _loaded(name, value) if name == "messages" else value
    if not isinstance(turns, list):
        raise RowError(f"{name} is not a text or a list of turns: {short(repr(value))}")
    if turns and isinstance(turns[-1], Mapping) and turns[-1].get("role") == "assistant":
        turns = turns[:-1]
    if not turns or not all(isinstance(turn, Mapping) and "role" in turn for turn in turns):
        raise RowError(f"{name} is not a list of turns that begins with a question: {short(repr(value))}")
    return turns


def _loaded(name: str, value: Any) -> Any:
    """A value that tables hold as JSON."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError:
        raise RowError(f"{name} is text, but not JSON: {short(repr(value))}") from None
