"""The names that are read at each place of a record: columns, and keys of turns, parts, calls and tools."""

from __future__ import annotations

from collections.abc import Iterable

from qkit.plugins.example import ANSWER_KEYS, Reads
from qkit.tasks._conversation.checks.validity import KWARGS
from qkit.tasks._conversation.formats import FORMS
from qkit.tasks._conversation.turns import ANSWER, CALL, FUNCTION, MARKS, OFFERED, PART, TURN

INSIDE = {
    "answers": ANSWER_KEYS,
    "content": PART,
    "tool_calls": CALL + FUNCTION,
    "function_call": FUNCTION,
    "function": FUNCTION,
    "tools": OFFERED,
}
WITH_TURNS = ("messages", "sharegpt", "alpaca", "prompt_completion")


def known_names(name: str, data_format: str, reads: Reads) -> Iterable[str]:
    """The names that are read at the place of `name`, such as messages.id, in a record of this format."""
    above, _, _ = name.rpartition(".")
    if not above:
        form = FORMS.get(data_format)
        variables = reads.variables if data_format in WITH_TURNS else ()
        return {*(form.needs + form.takes if form else ()), *variables}
    if above == KWARGS:
        return reads.variables
    if above.endswith("tools.function"):
        return OFFERED
    return INSIDE.get(above.rpartition(".")[2]) or {*TURN, *MARKS, *ANSWER, *reads.keys}


def belongs_in_a_turn(name: str, data_format: str) -> bool:
    """Whether a column is a key of the assistant's turn."""
    return name in ANSWER and data_format in WITH_TURNS
