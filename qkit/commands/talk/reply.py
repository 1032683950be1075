"""An answer while it arrives, and what is in it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from qkit.plugins.example import without_thinking

STOPPED = "stopped"  # the reason of an end by Ctrl-C
OPENING, CLOSING = "<tool_call>", "</tool_call>"
ARGUMENTS = ("arguments", "parameters")  # the second is Llama's name


@dataclass
class Reply:
    """`calls`: as an OpenAI server sends them. `reason`: stop, length, tool_calls, or `stopped`; None while it arrives.

    `computed_tokens`: of the prompt, those that were not in the cache; None where only the server knows. Times in seconds since the question.
    """

    text: str = ""
    thinking: str = ""
    calls: list[dict[str, Any]] = field(default_factory=list)
    reason: str | None = None
    prompt_tokens: int | None = None
    computed_tokens: int | None = None
    tokens: int | None = None
    first_seconds: float | None = None
    seconds: float = 0.0

    @property
    def is_empty(self) -> bool:
        return not (self.text or self.thinking or self.calls)

    @property
    def tokens_per_second(self) -> float | None:
        """Of the tokens after the first."""
        if not self.tokens or self.tokens < 2 or self.first_seconds is None or self.seconds <= self.first_seconds:
            return None
        return (self.tokens - 1) / (self.seconds - self.first_seconds)

    def message(self) -> dict[str, Any]:
        """The turn that a conversation continues with."""
        thinking = {"reasoning_content": self.thinking} if self.thinking else {}
        calls = {"tool_calls": self.calls} if self.calls else {}
        cut = {"train": False} if self.reason in (STOPPED, "length") else {}  # nobody should learn to stop there
        return {"role": "assistant", "content": self.text, **thinking, **calls, **cut}

    def tool_calls(self) -> list[dict[str, Any]]:
        """The calls as {name, arguments}: those that a server has recognized, or those that the text is."""
        if self.calls:
            return [_with_object(call["function"]) for call in self.calls]
        return list(calls_in(self.text))

    def to_dict(self) -> dict[str, Any]:
        """For --json."""
        names = ("prompt_tokens", "computed_tokens", "first_seconds", "seconds", "tokens_per_second")
        thinking = {"thinking": self.thinking} if self.thinking else {}
        return {
            "answer": self.text,
            **thinking,
            "tool_calls": self.tool_calls(),
            "finish_reason": self.reason,
            "completion_tokens": self.tokens,
            **{name: getattr(self, name) for name in names},
        }


def calls_in(text: str) -> Iterator[dict[str, Any]]:
    """The calls that an answer writes as text: between <tool_call> tags, or as nothing but JSON."""
    answer = without_thinking(text).strip()
    if OPENING in answer:
        for part in answer.split(OPENING)[1:]:
            yield from _calls(_json(part.partition(CLOSING)[0]))
        return
    value = _json(answer)
    whole = [call for one in value if (call := _call(one))] if isinstance(value, list) else list(_calls(value))
    if not isinstance(value, list) or len(whole) == len(value):
        yield from whole


def _with_object(function: Mapping[str, Any]) -> dict[str, Any]:
    """A server's call: its arguments are the text of an object, or should be."""
    value = _json(function["arguments"] or "{}")
    return {"name": function["name"], "arguments": function["arguments"] if value is None else value}


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _calls(value: Any) -> Sequence[dict[str, Any]]:
    call = _call(value)
    return [call] if call else []


def _call(value: Any) -> dict[str, Any] | None:
    if not isinstance(value, Mapping) or not isinstance(value.get("name"), str):
        return None
    arguments = next((value[key] for key in ARGUMENTS if isinstance(value.get(key), Mapping)), None)
    return None if arguments is None else {"name": value["name"], "arguments": arguments}
