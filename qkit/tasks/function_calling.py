"""Function calling: name one of the offered functions and its arguments, as one JSON object.

Reads the Berkeley Function-Calling Leaderboard's rows (`question`, `function`, and a file of accepted answers joined by id), and scores
as the leaderboard describes it: right function, every required argument, every value among the accepted ones. Tools are shown as one-line
signatures, so that a row takes about 100 tokens and not 500.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from pydantic import BaseModel, Field, ValidationError

from qkit.core.errors import listed, short
from qkit.plugins.example import NO_MORE, Conversation, Example, Reads, RowError, without_thinking
from qkit.plugins.first_recipe import Suggestion, Table
from qkit.recipe.schema import Data, Evaluate
from qkit.tasks._conversation.task import ConversationTask

# The leaderboard's type names, as Python writes them.
TYPES = {"string": "str", "integer": "int", "boolean": "bool", "array": "list"}
OMITTED = ""  # among the accepted values: the argument may be left out


class Turn(BaseModel):
    """One turn of a question."""

    content: str


class Spec(BaseModel):
    """JSON schema of one parameter, as far as a signature shows it."""

    type: str = "any"
    enum: list[Any] = []
    items: Spec | None = None


class Parameters(BaseModel):
    """JSON schema of a function's parameters."""

    properties: dict[str, Spec]
    required: list[str] = []


class Function(BaseModel):
    """A function on offer."""

    name: str
    parameters: Parameters


class Row(BaseModel):
    """What a row of the leaderboard must hold; only its first question is read."""

    question: list[list[Turn]] = Field(min_length=1)
    function: list[Function] = Field(min_length=1)
    accepted: list[dict[str, dict[str, list[Any]]]] = Field(min_length=1)


def _check(record: Mapping[str, Any], accepted: Any) -> None:
    """Raise RowError for the first deviation from the leaderboard's format."""
    try:
        Row.model_validate({**record, "accepted": accepted})
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        raise RowError(f"{short('.'.join(map(str, first['loc'])))}: {first['msg']}") from None
    if len(accepted[0]) != 1:
        raise RowError(f"accepted.0 must contain one call (it has {len(accepted[0])})")
    ((name, arguments),) = accepted[0].items()
    for key, options in arguments.items():
        _check_options(options, f"accepted.0.{name}.{key}")


def _check_options(options: Any, where: str) -> None:
    """Objects among the accepted values hold lists of accepted values themselves."""
    if not isinstance(options, list):
        raise RowError(f"{where}: Input should be a valid list")
    for option in options:
        for key, inner in option.items() if isinstance(option, dict) else ():
            _check_options(inner, f"{where}.{key}")
        if isinstance(option, list):
            _check_options(option, where)


def _conversation(record: Mapping[str, Any], accepted: Any, section: Data) -> Conversation:
    tools = "\n".join(signature(function) for function in record["function"])
    question = "\n".join(turn["content"] for turn in record["question"][0])
    messages = (
        {"role": "system", "content": f"{section.system or 'Call one of these functions.'}\n{tools}"},
        {"role": "user", "content": question},
        {"role": "assistant", "content": first_answer(accepted)},
    )
    return Conversation(messages, accepted)


def signature(function: Mapping[str, Any]) -> str:
    """`name(a: int, b: str = null)`, for a function's JSON description."""
    parameters = function["parameters"]
    required = set(parameters.get("required", ()))
    parts = [_parameter(name, spec, name in required) for name, spec in parameters["properties"].items()]
    return f"{function['name']}({', '.join(parts)})"


def _parameter(name: str, spec: Mapping[str, Any], required: bool) -> str:
    kind = TYPES.get(spec.get("type", "any"), spec.get("type", "any"))
    if "enum" in spec:
        kind = "|".join(json.dumps(value) for value in spec["enum"])
    elif kind == "list" and "items" in spec:
        inner = spec["items"].get("type", "any")
        kind = f"list[{TYPES.get(inner, inner)}]"
    return f"{name}: {kind}" if required else f"{name}: {kind} = {json.dumps(spec.get('default'))}"


def first_answer(accepted: Sequence[Mapping[str, Mapping[str, Sequence[Any]]]]) -> str:
    """The call to learn, as JSON text, from the accepted values."""
    ((name, arguments),) = accepted[0].items()
    chosen = {key: _concrete(values[0]) for key, values in arguments.items() if values and OMITTED not in values}
    return json.dumps({"name": name, "arguments": chosen})


def _concrete(value: Any) -> Any:
    """One accepted value with the lists of alternatives inside its objects resolved to their first."""
    if isinstance(value, dict):
        return {key: _concrete(options[0]) for key, options in value.items() if options and OMITTED not in options}
    return [_concrete(item) for item in value] if isinstance(value, list) else value


def parse(text: str) -> tuple[str, Mapping[str, Any]] | None:
    """(name, arguments) of a call written as JSON, or None if the text is not a call."""
    try:
        call = json.loads(text)
        name, arguments = call["name"], call["arguments"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return (name, arguments) if isinstance(name, str) and isinstance(arguments, dict) else None


def _object_matches(given: Mapping[str, Any], accepted: Mapping[str, Sequence[Any]]) -> bool:
    """Every given value is accepted, and nothing is left out that may not be."""
    known = all(key in accepted and _matches(value, accepted[key]) for key, value in given.items())
    return known and all(key in given or not options or OMITTED in options for key, options in accepted.items())


def _matches(value: Any, options: Sequence[Any]) -> bool:
    return any(_equals(value, option) for option in options)


def _equals(value: Any, option: Any) -> bool:
    """One value against one accepted value: text without case and punctuation, integers as floats too, booleans only as booleans."""
    if isinstance(option, dict):
        return isinstance(value, dict) and _object_matches(value, option)
    if isinstance(option, list):
        return isinstance(value, list) and len(value) == len(option) and all(map(_equals, value, option))
    if isinstance(option, str) and isinstance(value, str):
        return _plain(value) == _plain(option)
    return bool(value == option) and isinstance(value, bool) == isinstance(option, bool)


def _plain(text: str) -> str:
    return re.sub(r"[ ,./\-_*^]", "", text).lower().replace("'", '"')


class FunctionCallingTask(ConversationTask):
    """Rows of the leaderboard; a prediction is correct if it is an accepted call."""

    METRIC = "exact call match"

    def suggestion(self, table: Table) -> Suggestion | None:
        """None: the answers are in a file of their own, which a data set does not name."""
        return None

    def example(
        self, record: Mapping[str, Any], accepted: Any, data_format: str, section: Data, reads: Reads = NO_MORE
    ) -> Example:
        """A leaderboard row; the answer holds the first accepted value of every argument that may not be left out."""
        from qkit.tasks._conversation import formats
        from qkit.tasks._conversation.checks import validity
        from qkit.tasks._conversation.turns import Notes, shown, without_fillers

        if "function" not in record or "question" not in record:
            raise RowError(f"has the columns {listed(record)}; it must have question and function")
        if accepted is None:
            raise RowError(
                f"has no accepted answer for id {shown(record.get('id'))}: set data.*.answers to the file that contains it"
            )
        try:
            record, accepted = {key: without_fillers(item) for key, item in record.items()}, without_fillers(accepted)
            validity.check_text([record["question"], record["function"]], "the row", section)
            validity.check_text(accepted, "the accepted answer", section)
            _check(record, accepted)
            conversation, notes = _conversation(record, accepted, section), Notes(section, reads)
            formats.note_columns(record, {"question", "function"}, section, notes, conversation, accepted)
            return formats.checked(
                replace(conversation, unread=tuple(notes.unread), ignored=tuple(notes.matched)), section
            )
        except RecursionError:
            raise RowError("is nested too deeply") from None

    def correct(self, prediction: str, reference: Any, section: Evaluate) -> bool:
        """Whether the prediction is the call, ignoring its reasoning, with an accepted value for every argument."""
        call = parse(without_thinking(prediction))
        if call is None:
            return False
        ((name, accepted),) = reference[0].items()
        return call[0] == name and _object_matches(call[1], accepted)


TASK = FunctionCallingTask()
