"""Converts turns, tools and calls from the forms that data sets use to the form that chat templates read.

A value may have any type. A value that cannot be read raises a RowError that says where it is; names that nothing reads are noted.
"""

from __future__ import annotations

import datetime as dt
import decimal
import reprlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any

from qkit.chat.conversation import FUNCTION_KEYS, content_of
from qkit.core.errors import printable, short
from qkit.core.strict_json import Struct, decode
from qkit.plugins.example import NO_MORE, THINKING, Message, Reads, RowError
from qkit.recipe.schema import Data

ROLES = ("system", "developer", "user", "assistant", "tool")
SPEAKERS = dict(zip(ROLES, ROLES, strict=True)) | {
    "human": "user",
    "gpt": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "function": "tool",
    "function_response": "tool",
}
EXTRAS = ("name", "tool_call_id")  # what chat templates read of any turn beside role and content
TURN = ("role", "from", "content", "value", *EXTRAS)
MARKS = ("train", "weight")
ANSWER = (*THINKING, "tool_calls", "function_call")  # of an assistant's turn
PART = ("type", "text", "refusal")
TOOL = ("type", "function")
OFFERED = (*FUNCTION_KEYS, *TOOL)  # of a function that is offered: what a server hands on
CALL = ("id", "type", "function")
FUNCTION = ("name", "arguments")
NOTED = 40  # names of a record that nothing reads
LOADED = (dt.date, dt.time, dt.timedelta, decimal.Decimal, bytes)  # what loaders make of columns; a datetime is a date


Turn = tuple[Message, bool | None]  # and whether the record says that it is learnt


class Notes:
    """Names in a record that nothing reads, in order, such as `label` and `messages.id`; without those in data.ignore."""

    def __init__(self, section: Data, reads: Reads = NO_MORE):
        self.unread: dict[str, None] = {}
        self.matched: dict[str, None] = {}  # patterns of data.ignore
        self.reads = reads
        self._columns = section.columns
        self._ignore = section.ignore

    def path(self, column: str) -> str:
        """The name that our column has in the record."""
        return self._columns.get(column, column)

    def left_out(self, path: str) -> bool:
        """Whether data.ignore contains exactly this name: then it is not read at all."""
        return path in self.match(path)

    def match(self, path: str) -> list[str]:
        """The patterns of data.ignore that this name matches; they are noted."""
        matching = [pattern for pattern in self._ignore if fnmatchcase(path, pattern)]
        self.matched.update(dict.fromkeys(matching))
        return matching

    def add(self, path: str, value: Any) -> None:
        """Note a name that nothing reads, unless its value is empty."""
        ignored = self.match(path)
        nothing = value is None or (isinstance(value, str | list | Mapping) and not value)
        if not (nothing or ignored or len(self.unread) >= NOTED):
            self.unread[path] = None

    def take(self, given: Mapping[str, Any], known: Collection[str], path: str) -> None:
        """Note all but the known keys."""
        for key in given:
            if key not in known:
                self.add(f"{path}.{key}", given[key])


def plain(role: str, content: str) -> Turn:
    """A turn with a role and a content only."""
    return {"role": role, "content": content}, None


def turns_of(value: Any, column: str, notes: Notes, problem: str = "is not a list of turns") -> list[Turn]:
    """The turns in a column: a list, or the JSON text of one.

    Raises:
        RowError: it is not such a list (the message is `problem`), it is empty, or one of its turns cannot be read.
    """
    turns = listing(value, column, problem)
    if not turns:
        raise RowError(f"{column} is empty: it must contain at least one turn", "empty")
    path = notes.path(column)
    return [_turn(turn, f"turn {number} of {column}", path, notes) for number, turn in enumerate(turns, start=1)]


def _turn(value: Any, where: str, path: str, notes: Notes) -> Turn:
    """A turn with the names that chat templates read. Nulls are skipped: they are columns that only other rows of the table use."""
    given = _mapping(value, where, path, notes)
    speaker = _speaker(given, where)
    role, content = SPEAKERS[speaker], one_of(given, ("content", "value"), where)
    known = (*TURN, *(MARKS + ANSWER if role == "assistant" else ()))
    more = {key: given[key] for key in given if key not in known and key in notes.reads.keys}
    known = tuple(key for key in known if key != "name" or role == "tool" or key in notes.reads.keys)
    notes.take({key: given[key] for key in given if key not in more and not _no_mark(key, given[key])}, known, path)
    calls = _calls(given, where, path, notes)
    if calls and role != "assistant":
        raise RowError(
            f"{where} has tool calls, but its role is {speaker!r}; only an assistant can call tools", "roles"
        )
    if speaker == "function_call":
        calls, content = [*calls, *_said_calls(content, where, path, notes)], None
    message: dict[str, Any] = {"role": role, "content": _content(content, where, path, notes, optional=bool(calls))}
    extras = {key: string(given[key], f"{key} of {where}") for key in EXTRAS if key in given}
    thought: Message = thought_of(given, where) if role == "assistant" else {}
    written = {key: without_fillers(item) for key, item in more.items()}
    called = {"tool_calls": calls} if calls else {}
    return {**message, **extras, **thought, **written, **called}, _decided(given, where)


def _speaker(given: Mapping[str, Any], where: str) -> str:
    """The speaker as the turn names it; `role` and `from` may both be present if they agree."""
    speakers = [given[key] for key in ("role", "from") if key in given]
    for speaker in speakers or [None]:
        if not isinstance(speaker, str):
            raise RowError(f"{where} must have a role and a content: {shown(given)}")
        if speaker not in SPEAKERS:
            raise RowError(
                f"{where} has the unknown role {shown(speaker)}; valid roles: {', '.join(SPEAKERS)}", "roles"
            )
    if SPEAKERS[speakers[0]] != SPEAKERS[speakers[-1]]:
        raise RowError(
            f"{where} has the role {speakers[0]!r} and is from {speakers[-1]!r}: keep only one of them", "roles"
        )
    return str(speakers[0])


def one_of(given: Mapping[str, Any], names: Iterable[str], where: str) -> Any:
    """The value that several names can have; None if none of them is present.

    Raises:
        RowError: two of them are present and differ.
    """
    present = [name for name in names if given.get(name) is not None]
    used = [name for name in present if given[name] != ""] or present
    for name in used:
        if given[name] != given[used[0]]:
            raise RowError(
                f"{where} has {used[0]} and {name}, two names for the same value, which differ: "
                f"{shown(given[used[0]])} and {shown(given[name])}; keep only one of them"
            )
    return given[used[0]] if used else None


def thought_of(given: Mapping[str, Any], where: str) -> Message:
    """The thinking of a turn, under the first of its names.

    Raises:
        RowError: it is not text, or is present under two names and differs.
    """
    for name in THINKING:
        if name in given:
            string(given[name], f"{name} of {where}")
    thought = one_of(given, THINKING, where)
    return {} if thought is None else {THINKING[0]: thought}


def _no_mark(key: str, value: Any) -> bool:
    """Whether it marks a turn as not trained on; for turns of other roles than the assistant that is always so."""
    return key in MARKS and not value


def _decided(given: Mapping[str, Any], where: str) -> bool | None:
    """Whether the record says that a turn is learnt: OpenAI's `weight`, or `train`."""
    marks = {name: given[name] for name in MARKS if name in given}
    for name, value in marks.items():
        if value not in (0, 1):
            raise RowError(f"{where} has the {name} {shown(value)}; it must be 0 or 1")
    if len({bool(value) for value in marks.values()}) > 1:
        raise RowError(
            f"{where} has the train {shown(marks['train'])} and the weight {shown(marks['weight'])}: keep only one of them"
        )
    return next((bool(value) for value in marks.values()), None)


def _content(value: Any, where: str, path: str, notes: Notes, optional: bool) -> str:
    """The text of a turn; text in parts is one text."""
    if not isinstance(value, str | list) and not (value is None and optional):
        raise RowError(f"{where} must have a role and a content, both text: {shown(value)}{loaded(value)}")
    for number, part in enumerate(value if isinstance(value, list) else (), start=1):
        inside = f"{path}.content"
        notes.take(_mapping(part, f"part {number} of {where}", inside, notes), PART, inside)
    try:
        return content_of(value, where, "only text can be trained on")
    except ValueError as error:
        raise RowError(short(printable(str(error)))) from None


def tools_of(value: Any, notes: Notes) -> Iterator[Mapping[str, Any]]:
    """Function descriptions as templates read them: {"type": "function", "function": {"name": ...}}."""
    path, tools = notes.path("tools"), parsed(value or [], "tools")
    for number, tool in enumerate(listing(tools or [], "tools", "is not a list of functions"), start=1):
        where = f"function {number} of tools"
        given = _mapping(tool, where, path, notes)
        if "function" in given:
            notes.take(given, TOOL, path)
        function = given.get("function", tool)
        held = _mapping(function, where, path, notes)
        _name(held, where)
        notes.take(held, OFFERED, f"{path}.function" if "function" in given else path)
        yield {"type": "function", "function": without_fillers(function)}


def _calls(given: Mapping[str, Any], where: str, path: str, notes: Notes) -> list[Message]:
    """A turn's tool calls; `function_call` is the older form, with a single call."""
    listed = listing(given.get("tool_calls") or [], f"tool_calls of {where}", "is not a list of calls")
    inside = f"{path}.tool_calls"
    calls = [_call(call, f"call {number} of {where}", inside, notes) for number, call in enumerate(listed, start=1)]
    if given.get("function_call"):
        old = _call(given["function_call"], f"call {len(calls) + 1} of {where}", f"{path}.function_call", notes)
        calls += [] if any(call["function"] == old["function"] for call in calls) else [old]  # under both names
    return calls


def _said_calls(content: Any, where: str, path: str, notes: Notes) -> list[Message]:
    """The calls of a turn whose text is the call."""
    value = parsed(content, where)
    return [_call(call, where, path, notes) for call in (value if isinstance(value, list) else [value])]


def _call(value: Any, where: str, path: str, notes: Notes) -> Message:
    """A call with its arguments as an object, because templates expect one."""
    given = _mapping(value, where, path, notes)
    function = _mapping(given.get("function", given), where, path, notes)
    if "function" in given:
        notes.take(given, CALL, path)
        notes.take(function, FUNCTION, f"{path}.function")
    else:
        notes.take(given, CALL + FUNCTION, path)
    arguments = function.get("arguments", {})
    read = parsed(arguments, f"arguments of {where}") if arguments else {}
    if not isinstance(read, Mapping):
        raise RowError(f"arguments of {where} are not an object: {shown(arguments)}")
    named = {"name": _name(function, where), "arguments": without_fillers(read)}
    identity = {"id": string(given["id"], f"id of {where}")} if "id" in given else {}
    return {"type": "function", **identity, "function": named}


def _name(function: Mapping[str, Any], where: str) -> str:
    if not isinstance(function.get("name"), str):
        raise RowError(f"{where} has no name: {shown(function)}")
    return str(function["name"])


def listing(value: Any, what: str, problem: str) -> list[Any]:
    """A list, or the JSON text of one."""
    items = parsed(value, what)
    if not isinstance(items, list):
        raise RowError(f"{what} {problem}: {shown(value)}")
    return items


def parsed(value: Any, what: str) -> Any:
    """A value; a text is decoded as JSON."""
    if not isinstance(value, str):
        return value
    try:
        return decode(value)
    except ValueError as error:
        raise RowError(f"{what} is text that is not JSON ({error}): {shown(value)}") from None


def _mapping(value: Any, where: str, path: str, notes: Notes) -> dict[str, Any]:
    """The items of an object without nulls and without what data.ignore excludes."""
    if not isinstance(value, Mapping):
        raise RowError(f"{where} is not an object: {shown(value)}")
    return {str(key): item for key, item in value.items() if item is not None and not notes.left_out(f"{path}.{key}")}


def string(value: Any, what: str) -> str:
    """The value, which must be text.

    Raises:
        RowError: it is not; the message begins with `what`.
    """
    if not isinstance(value, str):
        raise RowError(f"{what} is not text: {shown(value)}{loaded(value)}")
    return value


def loaded(value: Any) -> str:
    """How to fix a value that a loader converted to a type that JSON does not have."""
    if not isinstance(value, LOADED):
        return ""
    return (
        f": {type(value).__name__} is a type of the data set or of its loader; convert it to text first "
        '(datasets: cast_column(NAME, Value("string"))), or provide the rows as JSON lines, which are read unchanged'
    )


def without_fillers(value: Any) -> Any:
    """A value without the nulls of table structs, which have the keys of all rows. Nulls from JSON are intended and stay."""
    if isinstance(value, Struct):
        return {str(key): without_fillers(item) for key, item in value.items() if item is not None}
    if isinstance(value, Mapping):
        return {str(key): without_fillers(item) for key, item in value.items()}
    return [without_fillers(item) for item in value] if isinstance(value, list) else value


def shown(value: Any) -> str:
    """A value of any size and depth, for a message."""
    return short(printable(reprlib.repr(value)))
