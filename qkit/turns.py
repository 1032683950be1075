"""Turns, tools and calls as data sets write them, in the form that chat templates read. A value may be of any type: what cannot be
read is a RowError that says where it is.
"""

from __future__ import annotations

import reprlib
from collections.abc import Iterator, Mapping
from typing import Any

from qkit.rows import decode
from qkit.task import Message, RowError

ROLES = ("system", "developer", "user", "assistant", "tool")
SPEAKERS = dict(zip(ROLES, ROLES, strict=True)) | {
    "human": "user",
    "gpt": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "function": "tool",
    "function_response": "tool",
}
EXTRAS = ("name", "tool_call_id", "reasoning_content", "thinking")  # what chat templates read beside role and content

Turn = tuple[Message, bool | None]  # and whether the record says that it is learnt


def plain(role: str, content: str) -> Turn:
    """A turn of which nothing is said but who speaks."""
    return {"role": role, "content": content}, None


def turns_of(value: Any, column: str, problem: str = "is not a list of turns") -> list[Turn]:
    """The turns in a column: a list, or the JSON text of one.

    Raises:
        RowError: it is no such list (`problem` says so), it is empty, or a turn of it cannot be read.
    """
    found = listing(value, column, problem)
    if not found:
        raise RowError(f"{column} is empty: there are no turns", "empty")
    return [_turn(turn, f"turn {number} of {column}") for number, turn in enumerate(found, start=1)]


def _turn(value: Any, where: str) -> Turn:
    """A turn by the names that chat templates read; nulls are columns that other rows of the table have."""
    given = _mapping(value, where)
    speaker = given.get("role", given.get("from"))
    content = given.get("content", given.get("value"))
    if not isinstance(speaker, str):
        raise RowError(f"{where} needs a role and a content: {shown(value)}")
    if speaker not in SPEAKERS:
        raise RowError(f"{where} is by {shown(speaker)}; known are {', '.join(SPEAKERS)}", "roles")
    calls = _calls(given, where)
    if calls and SPEAKERS[speaker] != "assistant":
        raise RowError(f"{where} is by {speaker!r} and has tool calls, which only an assistant makes", "roles")
    if speaker == "function_call":
        calls, content = [*calls, *_said_calls(content, where)], None
    message = {"role": SPEAKERS[speaker], "content": _content(content, where, optional=bool(calls))}
    extras = {key: string(given[key], f"{key} of {where}") for key in EXTRAS if key in given}
    return message | extras | ({"tool_calls": calls} if calls else {}), _decided(given, where)


def _decided(given: Mapping[str, Any], where: str) -> bool | None:
    """Whether the record says that a turn is learnt: OpenAI's `weight`, or `train`."""
    said = given.get("train", given.get("weight"))
    if said is None:
        return None
    if said not in (0, 1):
        raise RowError(f"{where} has the weight {shown(said)}; it can be 0 or 1")
    return bool(said)


def _content(value: Any, where: str, optional: bool) -> str:
    """The text of a turn; text in parts is joined."""
    if value is None and optional:
        return ""
    if isinstance(value, list):
        return "".join(_part(part, f"part {number} of {where}") for number, part in enumerate(value, start=1))
    if not isinstance(value, str):
        raise RowError(f"{where} needs a role and a content, both text: {shown(value)}")
    return value


def _part(value: Any, where: str) -> str:
    part = _mapping(value, where)
    if part.get("type") != "text":
        raise RowError(f"{where} is of type {shown(part.get('type'))}; only text can be learnt")
    return string(part.get("text"), where)


def tools_of(value: Any) -> Iterator[Mapping[str, Any]]:
    """Function descriptions as templates read them: {"type": "function", "function": {"name": ...}}."""
    for number, tool in enumerate(listing(value or [], "tools", "is not a list of functions"), start=1):
        where = f"function {number} of tools"
        given = _mapping(tool, where)
        function = _mapping(given.get("function", given), where)
        _name(function, where)
        yield {"type": "function", "function": function if isinstance(value, str) else _without_nulls(function)}


def _calls(given: Mapping[str, Any], where: str) -> list[Message]:
    """A turn's tool calls; `function_call` is what they were called before there could be several."""
    calls = listing(given.get("tool_calls", []), f"tool_calls of {where}", "is not a list of calls")
    if "function_call" in given:
        calls = [*calls, given["function_call"]]
    return [_call(call, f"call {number} of {where}") for number, call in enumerate(calls, start=1)]


def _said_calls(content: Any, where: str) -> list[Message]:
    """The calls in a turn of which the text is the call."""
    value = _parsed(content, where)
    return [_call(call, where) for call in (value if isinstance(value, list) else [value])]


def _call(value: Any, where: str) -> Message:
    """A call with its arguments as an object, because that is what templates write down."""
    given = _mapping(value, where)
    function = _mapping(given.get("function", given), where)
    arguments = function.get("arguments", {})
    read = _parsed(arguments, f"arguments of {where}") if arguments else {}
    if not isinstance(read, Mapping):
        raise RowError(f"arguments of {where} are not an object: {shown(arguments)}")
    named = {"name": _name(function, where), "arguments": read if isinstance(arguments, str) else _without_nulls(read)}
    identity = {"id": string(given["id"], f"id of {where}")} if "id" in given else {}
    return {"type": "function", **identity, "function": named}


def _name(function: Mapping[str, Any], where: str) -> str:
    if not isinstance(function.get("name"), str):
        raise RowError(f"{where} has no name: {shown(function)}")
    return str(function["name"])


def listing(value: Any, what: str, problem: str) -> list[Any]:
    """A list, or the JSON text of one."""
    found = _parsed(value, what)
    if not isinstance(found, list):
        raise RowError(f"{what} {problem}: {shown(value)}")
    return found


def _parsed(value: Any, what: str) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return decode(value)
    except ValueError as error:
        raise RowError(f"{what} is text that is not JSON ({error}): {shown(value)}") from None


def _mapping(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise RowError(f"{where} is not an object: {shown(value)}")
    return {str(key): item for key, item in value.items() if item is not None}


def string(value: Any, what: str) -> str:
    """The value, if it is text; else a RowError that begins with `what`."""
    if not isinstance(value, str):
        raise RowError(f"{what} is not text: {shown(value)}")
    return value


def _without_nulls(value: Any) -> Any:
    """Objects without what is null: in a table each has the keys of all others. (JSON in a text keeps its nulls: they are meant.)"""
    if isinstance(value, Mapping):
        return {str(key): _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def shown(value: Any) -> str:
    """A value of any size and depth, for a message."""
    return printable(reprlib.repr(value))


def printable(text: str) -> str:
    """Text that any output takes: lone surrogates are written out."""
    return text.encode("utf-8", "backslashreplace").decode()
