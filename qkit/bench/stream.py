"""The client that reads streamed answers while a server is benched: when tokens arrived, how many, and anomalies.

vLLM's tool counts every chunk as tokens, even one that holds only the role, and loses the event after a keep-alive comment. So this module
sends the requests and reads the answers; the schedule, the time limits and the statistics remain the tool's. A chunk holds tokens if it has
text of the answer (content, reasoning or a tool call) or token ids.
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
# Fields of a chat delta that hold text of the answer; a completion has it in `text`.
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
REASONING_FIELDS = ("reasoning", "reasoning_content", "thinking")  # some servers send one text under several of these
NON_TEXT_FIELDS = ("type", "index", "id", "status")  # strings in a tool call or content part that are not text
FAILURE_REASONS = ("error", "abort")  # values of finish_reason
ERROR_CHARACTERS = 300
CHUNK_TIMEOUT_SECONDS = 900.0  # without data; the tool's own timeout is six hours
NO_USAGE = "answers came without a token count (usage), so their tokens were counted with the tokenizer"


class Events:
    """Parses a stream of server-sent events, in pieces of any size, to JSON objects; ignores comments and other fields.

    `done`: the stream has sent its end mark, [DONE].
    """

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._rest = ""
        self._parts: list[str] = []
        self._kind = ""
        self._started = self.done = False

    def feed(self, piece: bytes, last: bool = False) -> Iterator[dict[str, Any]]:
        """Yield the events that `piece` completes. `last`: the stream ended, so an event without its blank line is complete.

        Raises:
            ValueError: an event is not a JSON object, reports an error, or follows the end mark.
        """
        text = self._rest + self._decoder.decode(piece, last)
        if text and not self._started:
            self._started, text = True, text.removeprefix("\ufeff")
        *lines, self._rest = LINE_END.split(text)
        for line in [*lines, self._rest, ""] if last else lines:
            name, _, value = line.partition(":")
            if name == "event":
                self._kind = value.strip()
            if name == "data":
                self._parts.append(value.removeprefix(" "))
            if self._parts and (name == "data" or not line):
                yield from self._complete(ended=not line)
            if not line:
                self._kind = ""

    def _complete(self, ended: bool) -> Iterator[dict[str, Any]]:
        """Yield the data so far if it is an event; `ended` by a blank line, which some servers omit."""
        text = "\n".join(self._parts)
        if self._kind == "error" and (ended or _is_json(text)):
            raise ValueError(f"the server reported an error: {text[:ERROR_CHARACTERS]}")
        if text.strip() == DONE:
            self.done = True
        if text.strip() not in ("", DONE):
            try:
                event = json.loads(text)
            except json.JSONDecodeError:
                if ended:
                    raise ValueError(f"the stream has an event that is not JSON: {text[:80]!r}") from None
                return
            if not isinstance(event, dict):
                raise ValueError(f"the stream has an event that is not a JSON object: {text[:80]!r}")
            if self.done and event.get("choices"):
                raise ValueError(f"the stream continues after {DONE}: {text[:80]!r}")
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
    """An answer while it arrives; times in seconds since the request.

    `times`: of its chunks with tokens. `finish_time`: of the chunk with the finish_reason. `id_count`: number of token ids received, None if
    the server sends no ids.
    """

    times: list[float] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    finish_time: float | None = None
    usage: dict[str, Any] = field(default_factory=dict)
    id_count: int | None = None

    def take(self, event: Mapping[str, Any], seconds: float) -> None:
        """Add a chunk that arrived at `seconds`.

        Raises:
            ValueError: the chunk reports an error.
        """
        if (error := _error(event)) is not None:
            raise ValueError(f"the server reported an error: {json.dumps(error)[:ERROR_CHARACTERS]}")
        self.usage.update(event.get("usage") or {})  # some servers send it with every chunk: the last one is right
        for choice in event.get("choices") or ():
            texts = list(_answer_texts(choice))
            self.texts += texts
            has_tokens = bool(texts)
            if isinstance(ids := choice.get("token_ids"), list):
                self.id_count = (self.id_count or 0) + len(ids)
                has_tokens = bool(ids)
            if has_tokens:
                self.times.append(seconds)
            if choice.get("finish_reason") in FAILURE_REASONS:
                raise ValueError(f"the server reported an error: finish_reason {choice['finish_reason']!r}")
            if choice.get("finish_reason"):
                self.finish_time = seconds

    @property
    def tokens(self) -> int | None:
        """The number of output tokens as counted by the server, None if it sends no count."""
        return self.usage.get("completion_tokens") or self.id_count

    def chunks(self) -> list[float]:
        """When tokens arrived, in seconds since the request.

        If there are fewer chunks than tokens, the last tokens may have had no text (special tokens, say). They had arrived when the chunk
        with the finish_reason came, so its time then stands for the last chunk's.

        Raises:
            ValueError: no token arrived.
        """
        if not self.times:
            counted = f"; the server counted {self.tokens}, none of them with text" if self.tokens else ""
            raise ValueError(f"the answer has no tokens{counted}")
        times = list(self.times)
        has_unseen = self.id_count is None and len(times) < (self.tokens or 0)
        if has_unseen and self.finish_time is not None and self.finish_time > times[-1]:
            times[max(1, len(times) - 1) :] = [self.finish_time]
        return times


def _error(event: Mapping[str, Any]) -> Any:
    """The error that an event reports, in any of the forms that servers use; None if it reports none."""
    if event.get("error"):
        return event["error"]
    is_typed = event.get("object") == "error" or event.get("type") == "error"
    is_bare = (
        not event.get("choices") and not event.get("usage") and any(event.get(key) for key in ("message", "detail"))
    )
    return event if is_typed or is_bare else None


def _answer_texts(choice: Mapping[str, Any]) -> Iterator[str]:
    """Yield every text of a chunk that the model generated."""
    delta = choice.get("delta") or {}
    reasoning: list[Any] = []
    for key in TEXT_FIELDS:
        if key in REASONING_FIELDS:
            if delta.get(key) in reasoning:
                continue
            reasoning.append(delta.get(key))
        yield from _strings_in(delta.get(key))
    yield from _strings_in(choice.get("text"))


def _strings_in(value: Any) -> Iterator[str]:
    if isinstance(value, str) and value:
        yield value
    inner = [part for key, part in value.items() if key not in NON_TEXT_FIELDS] if isinstance(value, dict) else value
    for part in inner if isinstance(inner, list) else ():
        yield from _strings_in(part)


def request_body(chat: bool, model: str, prompt: str, tokens: int, extra: Mapping[str, Any]) -> dict[str, Any]:
    """The body of a streaming request: a chat with one user message, or a completion. `extra`: parameters beyond OpenAI's."""
    content = {"messages": [{"role": "user", "content": prompt}]} if chat else {"prompt": prompt}
    limit = "max_completion_tokens" if chat else "max_tokens"
    streaming = {"stream": True, "stream_options": {"include_usage": True}}
    return {"model": model, **content, limit: tokens, **streaming, **extra}


class StreamClient:
    """The request functions that replace those of vLLM's tool. `output`: the tool's class for the result of a request.

    A request has only the extra parameters of `--extra-body`: the tool itself would add ignore_eos to random prompts.
    """

    def __init__(self, output: Callable[[], Any]):
        self.output = output
        self.doubts: Counter[str] = Counter()

    async def completions(self, request_func_input: Any, session: Any, pbar: Any = None) -> Any:
        """Send a request to /v1/completions."""
        return await self._send(request_func_input, session, chat=False)

    async def chat(self, request_func_input: Any, session: Any, pbar: Any = None) -> Any:
        """Send a request to /v1/chat/completions, as one user message."""
        return await self._send(request_func_input, session, chat=True)

    async def _send(self, request: Any, session: Any, chat: bool) -> Any:
        result, answer = self.output(), Answer()
        model, extra = request.model_name or request.model, request.extra_body or {}
        body = request_body(chat, model, request.prompt, request.output_len, extra)
        result.prompt_len, result.start_time = request.prompt_len, time.perf_counter()
        try:
            async with session.post(url=request.api_url, json=body, headers=_headers(request)) as response:
                await _read(response, answer, result.start_time)
            self._fill(result, answer)
        except Exception as error:  # an error of any kind fails this request only, and is kept as its reason
            result.success, result.error = False, f"{type(error).__name__}: {error}"
        return result

    def _fill(self, result: Any, answer: Answer) -> None:
        times = answer.chunks()
        result.ttft, result.latency = times[0], times[-1]
        result.itl = [after - before for before, after in pairwise(times)]
        result.generated_text = "".join(answer.texts)
        result.output_tokens = answer.tokens or 0  # for 0, the tool counts the tokens of the text
        result.prompt_len = answer.usage.get("prompt_tokens") or result.prompt_len
        result.success = True
        self.doubts[NO_USAGE] += answer.tokens is None


def _headers(request: Any) -> dict[str, str]:
    key = os.environ.get("OPENAI_API_KEY")
    authorization = {"Authorization": f"Bearer {key}"} if key else {}
    identity = {"x-request-id": request.request_id} if request.request_id else {}
    return {**authorization, **(request.extra_headers or {}), **identity}


async def _read(response: Any, answer: Answer, begin: float) -> None:
    if response.status != 200:
        text = " ".join((await response.text(errors="replace")).split())[:ERROR_CHARACTERS]
        raise ValueError(f"{response.status} {response.reason or ''} {text}".rstrip())
    content_type = response.headers.get("Content-Type", "").partition(";")[0].strip()
    if content_type == "application/json":
        raise ValueError("the server did not stream the answer, so the time of its first token is unknown")
    events = Events()
    while piece := await asyncio.wait_for(response.content.readany(), CHUNK_TIMEOUT_SECONDS):
        seconds = time.perf_counter() - begin
        for event in events.feed(piece):
            answer.take(event, seconds)
    for event in events.feed(b"", last=True):
        answer.take(event, time.perf_counter() - begin)
    if answer.finish_time is None and not events.done:
        raise ValueError(f"the stream ended without a finish_reason or {DONE}; the answer may be incomplete")
