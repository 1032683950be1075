"""How a streamed answer is read while a server is benched: when its tokens came, how many, and what is odd about it.

vLLM's tool takes every chunk for tokens, also the one that only says whose turn it is, and loses the event after a keep-alive comment.
So its requests are sent and read here, and its loads, its clock's limits and its arithmetic stay its own. A chunk holds tokens when it has
text of an answer (content, reasoning, a tool call), or says the ids of some.
"""

from __future__ import annotations

import asyncio
import codecs
import json
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

LINE_END = re.compile(r"\r\n|\n|\r(?!\Z)")
DONE = "[DONE]"
# Where an answer's text is in a chunk's choice: `text` of a completion, and these of a chat's delta.
TEXT_FIELDS = (
    "content",
    "reasoning",
    "reasoning_content",
    "thinking",
    "refusal",
    "tool_calls",
    "function_call",
    "audio",
)
REASONING_FIELDS = (
    "reasoning",
    "reasoning_content",
    "thinking",
)  # names of one text: some servers send it under several
NON_TEXT_FIELDS = ("type", "index", "id", "status")  # in a tool call or a part of a content: no text
FAILURE_REASONS = ("error", "abort")  # as a finish_reason
ERROR_CHARACTERS = 300
CHUNK_TIMEOUT_SECONDS = 900.0  # of a server that says no more: the tool would wait for six hours
NO_USAGE = "answers came without a count of their tokens (usage), which were counted with the tokenizer"


class Events:
    """JSON documents out of a stream of server-sent events, in pieces of any size; comments and other fields are passed over."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._rest = ""
        self._parts: list[str] = []
        self._kind = ""
        self._begun = self.done = False  # `done`: the stream has said that it has ended

    def feed(self, piece: bytes, last: bool = False) -> Iterator[dict[str, Any]]:
        """What a piece completes. `last`: nothing follows, so an event without its blank line is whole.

        Raises:
            ValueError: an event is no JSON object, tells of an error, or comes after the end.
        """
        text = self._rest + self._decoder.decode(piece, last)
        if text and not self._begun:
            self._begun, text = True, text.removeprefix("\ufeff")
        *lines, self._rest = LINE_END.split(text)
        for line in [*lines, self._rest, ""] if last else lines:
            name, _, value = line.partition(":")
            if name == "event":
                self._kind = value.strip()
            if name == "data":
                self._parts.append(value.removeprefix(" "))
            if self._parts and (name == "data" or not line):
                yield from self._whole(ended=not line)
            if not line:
                self._kind = ""

    def _whole(self, ended: bool) -> Iterator[dict[str, Any]]:
        """The event of the data so far, as soon as it is one: some servers leave out the blank line that ends it."""
        text = "\n".join(self._parts)
        if self._kind == "error" and (ended or _is_json(text)):
            raise ValueError(f"the server broke off: {text[:ERROR_CHARACTERS]}")
        if text.strip() == DONE:
            self.done = True
        if text.strip() not in ("", DONE):
            try:
                event = json.loads(text)
            except json.JSONDecodeError:
                if ended:
                    raise ValueError(f"the stream has an event that is no JSON: {text[:80]!r}") from None
                return
            if not isinstance(event, dict):
                raise ValueError(f"the stream has an event that is no JSON object: {text[:80]!r}")
            if self.done and event.get("choices"):
                raise ValueError(f"the stream goes on after {DONE}: {text[:80]!r}")
            yield event
        self._parts.clear()


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except json.JSONDecodeError:
        return False
    return True


@dataclass
class Answer:
    """One answer as it comes in. `times`: of its chunks with tokens, seconds since the request; `ended`: of the chunk that says why."""

    times: list[float] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    ended: float | None = None
    usage: dict[str, Any] = field(default_factory=dict)
    ids: int | None = None

    def take(self, event: Mapping[str, Any], seconds: float) -> None:
        """Read a chunk that came at `seconds`.

        Raises:
            ValueError: it tells of an error.
        """
        if (wrong := _error(event)) is not None:
            raise ValueError(f"the server broke off: {json.dumps(wrong)[:ERROR_CHARACTERS]}")
        self.usage.update(event.get("usage") or {})  # of its own, or with every chunk: the last counts
        for choice in event.get("choices") or ():
            said = list(_answer_texts(choice))
            self.texts += said
            if isinstance(ids := choice.get("token_ids"), list):
                self.ids = (self.ids or 0) + len(ids)
                said = ids
            if said:
                self.times.append(seconds)
            if choice.get("finish_reason") in FAILURE_REASONS:
                raise ValueError(f"the server broke off: finish_reason {choice['finish_reason']!r}")
            if choice.get("finish_reason"):
                self.ended = seconds

    @property
    def tokens(self) -> int | None:
        """As the server counts them; None where it does not."""
        return self.usage.get("completion_tokens") or self.ids

    def chunks(self) -> list[float]:
        """When tokens came. Where there were fewer chunks than tokens, the last may have had no text (a special token, say): they had come
        by the time when the answer was said to have ended.

        Raises:
            ValueError: no token came.
        """
        if not self.times:
            counted = f": {self.tokens} were counted, of which none had text" if self.tokens else ""
            raise ValueError(f"no token came{counted}")
        times, unseen = list(self.times), self.ids is None and len(self.times) < (self.tokens or 0)
        if unseen and self.ended is not None and self.ended > times[-1]:
            times[max(1, len(times) - 1) :] = [self.ended]
        return times


def _error(event: Mapping[str, Any]) -> Any:
    """What an event tells of an error, in the forms that servers have for it; None where it tells of none."""
    if event.get("error"):
        return event["error"]
    named = event.get("object") == "error" or event.get("type") == "error"
    bare = not event.get("choices") and not event.get("usage") and any(event.get(key) for key in ("message", "detail"))
    return event if named or bare else None


def _answer_texts(choice: Mapping[str, Any]) -> Iterator[str]:
    """Every text of a chunk that the model wrote."""
    delta = choice.get("delta") or {}
    seen: list[Any] = []
    for key in TEXT_FIELDS:
        if key in REASONING_FIELDS and delta.get(key) in seen:
            continue
        seen += [delta.get(key)] if key in REASONING_FIELDS else []
        yield from _strings_in(delta.get(key))
    yield from _strings_in(choice.get("text"))


def _strings_in(value: Any) -> Iterator[str]:
    if isinstance(value, str) and value:
        yield value
    inner = [part for key, part in value.items() if key not in NON_TEXT_FIELDS] if isinstance(value, dict) else value
    for part in inner if isinstance(inner, list) else ():
        yield from _strings_in(part)


def request_body(chat: bool, model: str, prompt: str, tokens: int, extra: Mapping[str, Any]) -> dict[str, Any]:
    """A request: of a chat in one turn, or of a completion. `extra`: parameters beyond OpenAI's."""
    what = {"messages": [{"role": "user", "content": prompt}]} if chat else {"prompt": prompt}
    most = "max_completion_tokens" if chat else "max_tokens"
    streamed = {"stream": True, "stream_options": {"include_usage": True}}
    return {"model": model, **what, most: tokens, **streamed, **extra}


class StreamClient:
    """What vLLM's tool calls for each request, in place of its own. `output`: its class for what came of one.

    Of parameters beyond OpenAI's a request has those of `--extra-body` and no others: the tool adds ignore_eos to random prompts by itself.
    """

    def __init__(self, output: Callable[[], Any]):
        self.output = output
        self.doubts: Counter[str] = Counter()

    async def completions(self, request_func_input: Any, session: Any, pbar: Any = None) -> Any:
        """Ask /v1/completions."""
        return await self._send(request_func_input, session, chat=False)

    async def chat(self, request_func_input: Any, session: Any, pbar: Any = None) -> Any:
        """Ask /v1/chat/completions, in one turn."""
        return await self._send(request_func_input, session, chat=True)

    async def _send(self, asked: Any, session: Any, chat: bool) -> Any:
        found, answer = self.output(), Answer()
        what = request_body(
            chat, asked.model_name or asked.model, asked.prompt, asked.output_len, asked.extra_body or {}
        )
        found.prompt_len, found.start_time = asked.prompt_len, time.perf_counter()
        try:
            async with session.post(url=asked.api_url, json=what, headers=_headers(asked)) as response:
                await _read(response, answer, found.start_time)
            self._fill(found, answer)
        except Exception as error:  # of any kind, and this request's alone: it has failed, and says why
            found.success, found.error = False, f"{type(error).__name__}: {error}"
        return found

    def _fill(self, found: Any, answer: Answer) -> None:
        times = answer.chunks()
        found.ttft, found.latency = times[0], times[-1]
        found.itl = [after - before for before, after in pairwise(times)]
        found.generated_text = "".join(answer.texts)
        found.output_tokens = answer.tokens or 0  # the tool counts the text's then
        found.prompt_len = answer.usage.get("prompt_tokens") or found.prompt_len
        found.success = True
        self.doubts[NO_USAGE] += answer.tokens is None


def _headers(asked: Any) -> dict[str, str]:
    key = os.environ.get("OPENAI_API_KEY")
    named = {"x-request-id": asked.request_id} if asked.request_id else {}
    return {**({"Authorization": f"Bearer {key}"} if key else {}), **(asked.extra_headers or {}), **named}


async def _read(response: Any, answer: Answer, begin: float) -> None:
    if response.status != 200:
        text = " ".join((await response.text(errors="replace")).split())[:ERROR_CHARACTERS]
        raise ValueError(f"{response.status} {response.reason or ''} {text}".rstrip())
    kind = response.headers.get("Content-Type", "").partition(";")[0].strip()
    if kind == "application/json":
        raise ValueError("it answered whole where a stream was asked for, so when its first token came cannot be told")
    events = Events()
    while piece := await asyncio.wait_for(response.content.readany(), CHUNK_TIMEOUT_SECONDS):
        seconds = time.perf_counter() - begin
        for event in events.feed(piece):
            answer.take(event, seconds)
    for event in events.feed(b"", last=True):
        answer.take(event, time.perf_counter() - begin)
    if answer.ended is None and not events.done:
        raise ValueError(f"the stream ended with neither a finish_reason nor {DONE}: the answer may be cut short")
