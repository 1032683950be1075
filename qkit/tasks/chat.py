"""Chat: answer the last user turn. A prediction counts when it equals the reference, or the part of it that a pattern picks."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from qkit.recipe import Data, Evaluate
from qkit.task import Conversation, Message, RowError

METRIC = "exact match"


def conversation(record: Mapping[str, Any], accepted: Any, section: Data) -> Conversation:
    """A record with `messages`, or with `prompt` and `completion`; `data.columns` maps other names to these."""
    names = {**{name: name for name in ("messages", "prompt", "completion")}, **section.columns}
    if names["messages"] in record:
        turns = _turns(record[names["messages"]])
    elif names["prompt"] in record and names["completion"] in record:
        turns = [
            {"role": "user", "content": _text(record, names["prompt"])},
            {"role": "assistant", "content": _text(record, names["completion"])},
        ]
    else:
        raise RowError(
            f"has the columns {', '.join(sorted(record))}; wanted messages, or prompt and completion: "
            "map yours with data.columns, such as {prompt: question, completion: answer}"
        )
    prompt = _without_answer(turns)
    if section.system and prompt[0]["role"] != "system":
        prompt = [{"role": "system", "content": section.system}, *prompt]
    answer = turns[-1]["content"]
    return Conversation(tuple(prompt), answer, answer if accepted is None else accepted)


def correct(prediction: str, reference: Any, section: Evaluate) -> bool:
    """Equal after the pattern has picked its part, white space and thousands separators aside."""
    wanted = reference if isinstance(reference, list) else [reference]
    return _picked(prediction, section) in {_picked(str(text), section) for text in wanted}


def _picked(text: str, section: Evaluate) -> str:
    if section.answer_pattern and (found := re.findall(section.answer_pattern, text)):
        text = found[-1]
    return " ".join(text.replace(",", "").split())


def _text(record: Mapping[str, Any], name: str) -> str:
    value = record[name]
    if not isinstance(value, str) or not value.strip():
        raise RowError(f"column {name!r} is empty or no text: {value!r}")
    return value


def _turns(value: Any) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise RowError("messages is not a list of turns")
    for turn in value:
        if (
            not isinstance(turn, Mapping)
            or not isinstance(turn.get("role"), str)
            or not isinstance(turn.get("content"), str)
        ):
            raise RowError(f"a turn needs a role and a content, both text: {turn!r}")
    return [{"role": turn["role"], "content": turn["content"]} for turn in value]


def _without_answer(turns: list[Message]) -> list[Message]:
    if turns[-1]["role"] != "assistant":
        raise RowError(
            f"has no assistant turn at its end (the last turn is by {turns[-1]['role']!r}): nothing to learn from it"
        )
    if len(turns) < 2:
        raise RowError("has an assistant turn and nothing before it: there is no prompt")
    return turns[:-1]
