"""A server of the OpenAI API that answers a conversation: its template, its stop tokens, its defaults."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qkit.bench.stream import REASONING_FIELDS, Events
from qkit.commands.talk.reply import Reply
from qkit.commands.talk.speakers import Speaker, Turn
from qkit.core.errors import ServerError, short
from qkit.server.client import Client

PATH = "/v1/chat/completions"
THINK, END_THINK = "<think>\n", "\n</think>\n\n"


@dataclass(frozen=True)
class Remote(Speaker):
    """A model of a server. `given`: the parameters that requests have; the server knows the others."""

    client: Client
    model: str
    given: Mapping[str, Any]

    def answer(self, messages: Sequence[Turn], reply: Reply, attempt: int) -> Iterator[str]:
        begin = time.perf_counter()
        seed = {"seed": self.given["seed"] + attempt} if "seed" in self.given else {}
        options = {"stream": True, "stream_options": {"include_usage": True}}
        body = {"model": self.model, "messages": list(messages), **self.given, **seed, **options}
        try:
            for event in self._events(body):
                thought, text = _taken(event, reply)
                if reply.first_seconds is None and not reply.is_empty:
                    reply.first_seconds = time.perf_counter() - begin
                if shown := _shown(thought, text, reply):
                    yield shown
        finally:
            reply.seconds = time.perf_counter() - begin
        if reply.reason is None:
            raise self._broken("it ended without a finish_reason")

    def _events(self, body: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
        events = Events()
        for part in self.client.streamed(PATH, body):
            try:
                received = list(events.feed(part))
            except ValueError as error:
                raise self._broken(str(error)) from None
            for event in received:
                if event.get("error"):
                    raise self._broken(short(json.dumps(event["error"])))
                yield event

    def _broken(self, why: str) -> ServerError:
        url = self.client.url
        return ServerError(f"the answer of the server at {url} broke off: {why}", url=url, reason=why)

    def close(self) -> None:
        self.client.close()


def _shown(thought: str, text: str, reply: Reply) -> str:
    """What a reader sees of a chunk: thinking between the tags that models write themselves where no server takes them away."""
    opens = THINK if thought and reply.thinking == thought else ""
    closes = END_THINK if text and reply.thinking and reply.text == text else ""
    return f"{opens}{thought}{closes}{text}"


def _taken(event: Mapping[str, Any], reply: Reply) -> tuple[str, str]:
    """Note what a chunk has; returns its thinking and its text."""
    usage = event.get("usage") or {}
    if usage:
        reply.prompt_tokens, reply.tokens = usage.get("prompt_tokens"), usage.get("completion_tokens")
        cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")
        if cached is not None and reply.prompt_tokens is not None:
            reply.computed_tokens = reply.prompt_tokens - cached
    choice: Mapping[str, Any] = next(iter(event.get("choices") or ()), {})
    reply.reason = choice.get("finish_reason") or reply.reason
    delta = choice.get("delta") or {}
    thought = str(next((delta[name] for name in REASONING_FIELDS if delta.get(name)), ""))
    reply.thinking += thought
    for part in delta.get("tool_calls") or ():
        _add_call(reply.calls, part)
    text = str(delta.get("content") or "")
    reply.text += text
    return thought, text


def _add_call(calls: list[dict[str, Any]], part: Mapping[str, Any]) -> None:
    """Add a part of a call: the first has its name, further ones more of its arguments."""
    place = int(part.get("index") or 0)
    while len(calls) <= place:
        calls.append({"id": f"call_{len(calls)}", "type": "function", "function": {"name": "", "arguments": ""}})
    call, function = calls[place], part.get("function") or {}
    call["id"] = part.get("id") or call["id"]
    call["function"]["name"] = function.get("name") or call["function"]["name"]
    arguments = function.get("arguments") or ""
    call["function"]["arguments"] += arguments if isinstance(arguments, str) else json.dumps(arguments)
