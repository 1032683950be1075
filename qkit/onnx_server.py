"""An OpenAI-compatible server on an ONNX export, for those without vLLM: `python -m qkit.onnx_server --model FOLDER`.

What it lacks, and says with status 400 and the parameter's name: logprobs, seed (but for temperature 0), penalties other than
`repetition_penalty`, guided and tool-call decoding. `tools` reach the chat template; the answer is text, never `tool_calls`. No adapters.
A parameter that it lacks is let through with a value that changes nothing, and so is every way to write nothing: null, "", [] and {}.
Prompts are made as training made them (`qkit.template`); `/tokenize` shows their ids. Requests are batched statically: see `qkit.onnx_engine`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import time
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from qkit import template
from qkit.admission import KEEP_ALIVE_SECONDS, Admission
from qkit.conversation import NOTHING, call_of, content_of, tools_sent
from qkit.formats import RESERVED
from qkit.onnx_engine import Ended, Engine, Sampling

DEFAULT_MAX_TOKENS = 16  # of /v1/completions, as OpenAI has it
MOST_IDS = 2**31 - 1  # the engine's own integers
# Parameters that change nothing in an answer, and values of others that do not.
IDLE = frozenset(
    {
        "user",
        "metadata",
        "store",
        "service_tier",
        "safety_identifier",
        "prompt_cache_key",
        "prompt_cache_retention",
        "request_id",
    }
)
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    **dict.fromkeys(("frequency_penalty", "presence_penalty", "top_logprobs", "min_p", "min_tokens", "priority"), (0,)),
    **dict.fromkeys(("length_penalty", "best_of"), (1,)),
    **dict.fromkeys(("echo", "logprobs", "use_beam_search", "early_stopping", "include_stop_str_in_output"), (False,)),
    **dict.fromkeys(("return_token_ids", "return_tokens_as_token_ids"), (False,)),
    **dict.fromkeys(("skip_special_tokens", "spaces_between_special_tokens", "include_reasoning"), (True,)),
    **dict.fromkeys(("tool_choice", "function_call"), ("auto", "none")),
    "parallel_tool_calls": (True, False),  # of an answer that holds none
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "verbosity": ("medium",),
}
NEEDED = frozenset({"model", "messages", "prompt"})  # where nothing is not the same as no such parameter
SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Refused(Exception):
    """A request that is not answered. `param`: what in it is wrong."""

    def __init__(self, message: str, param: str | None = None, status: int = 400):
        super().__init__(message)
        self.param = param
        self.status = status


# --- what is asked ------------------------------------------------------------------------------------------------------


class Asked(BaseModel):
    """Parameters that both endpoints know; others are kept, to be named in the refusal."""

    model_config = ConfigDict(extra="allow")
    model: str
    max_tokens: int | None = Field(None, ge=1)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=-1, le=MOST_IDS)
    repetition_penalty: float = Field(1.0, gt=0, le=10)
    n: int = Field(1, ge=1, le=16)
    seed: int | None = None
    stop: str | list[str] | None = None
    stream: bool = False
    stream_options: dict[str, Any] | None = None
    ignore_eos: bool = False

    @model_validator(mode="before")
    @classmethod
    def _without_nothings(cls, given: Any) -> Any:
        """Clients write null, and what else is nothing, for what they leave to the server."""
        if not isinstance(given, dict):
            return given
        return {name: value for name, value in given.items() if name in NEEDED or value not in NOTHING}

    def take(self, own: Mapping[str, Any]) -> None:
        """The model's own values for what the request does not say."""
        for name, value in own.items():
            if name not in self.model_fields_set:
                setattr(self, name, value)

    def check(self, served: str) -> None:
        """Raise Refused for another model, and for what this server does not do."""
        if self.model != served:
            raise Refused(f"the model `{self.model}` does not exist; there is `{served}`", "model", 404)
        for name, value in (self.model_extra or {}).items():
            neutral = NEUTRAL.get(name, (False,))  # what is switched off needs no support
            if name not in IDLE and not any(_same(value, one) for one in neutral):
                raise Refused(f"`{name}` is not supported by this server", name)
        if self.seed is not None and self.temperature > 0:
            raise Refused("`seed` is not supported by this server, but for temperature 0", "seed")

    @property
    def stops(self) -> list[str]:
        return [text for text in ([self.stop] if isinstance(self.stop, str) else self.stop or []) if text]

    def sampling(self, room: int, default: int) -> Sampling:
        """`room`: tokens that are left beside the prompt."""
        wanted = min(self.max_tokens or default, room)
        few = wanted if self.ignore_eos else 0
        return Sampling(wanted, self.temperature, self.top_p, max(self.top_k, 0), few, self.repetition_penalty)


class Chat(Asked):
    """POST /v1/chat/completions."""

    messages: list[dict[str, Any]] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    tools: list[dict[str, Any]] | None = None
    documents: list[dict[str, Any]] | None = None
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    reasoning_effort: str | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    add_special_tokens: bool = False

    def variables(self) -> dict[str, Any]:
        """What the chat template is given beside messages and tools; an effort switches thinking on or off, as vLLM has it."""
        effort = self.reasoning_effort
        given = {} if effort is None else {"enable_thinking": effort != "none"}
        given |= self.chat_template_kwargs | ({} if effort is None else {"reasoning_effort": effort})
        if reserved := RESERVED & given.keys():
            raise Refused(f"`chat_template_kwargs` cannot hold {', '.join(sorted(reserved))}", "chat_template_kwargs")
        if self.continue_final_message and self.add_generation_prompt:
            raise Refused("`continue_final_message` goes with `add_generation_prompt` false", "continue_final_message")
        asked = {"add_generation_prompt": self.add_generation_prompt}
        asked |= {"continue_final_message": True} if self.continue_final_message else {}
        return {**given, **asked, **({"documents": self.documents} if self.documents else {})}


class Completion(Asked):
    """POST /v1/completions: one prompt, as text or token ids, or a list that holds one."""

    prompt: Any
    add_special_tokens: bool = True


def _same(value: Any, other: Any) -> bool:
    """Equal, where false is not 0 and true is not 1."""
    return bool(value == other) and isinstance(value, bool) == isinstance(other, bool)


def as_templates_have_it(message: Mapping[str, Any], where: str = "messages") -> dict[str, Any]:
    """A message of the API, its content as text that remembers its parts, the arguments of its calls as objects.

    Raises:
        Refused: it has no role, a part of it is no text, or a call has no function with arguments in JSON.
    """
    if not isinstance(message.get("role"), str):
        raise Refused(f"`{where}.role` is missing, or no text", "messages")
    if message.get("function_call"):
        raise Refused(f"`{where}.function_call` is not supported by this server; write `tool_calls`", "messages")
    try:
        content = content_of(message.get("content"), f"`{where}`", "this server reads text")
        return {
            **message,
            "content": content,
            "tool_calls": [call_of(call) for call in message.get("tool_calls") or ()],
        }
    except ValueError as error:
        raise Refused(f"`{where}`: {error}", "messages") from None


def read_tools(tools: Sequence[Mapping[str, Any]] | None) -> list[dict[str, Any]]:
    """The functions that a request offers, as a template is given them.

    Raises:
        Refused: one is not a function with a name, or its description and parameters are no text and no object.
    """
    for number, tool in enumerate(tools or ()):
        function = tool.get("function")
        if tool.get("type", "function") != "function" or not isinstance(function, Mapping):
            raise Refused(f"`tools[{number}]` is not of the form {{'type': 'function', 'function': {{...}}}}", "tools")
        for key, kind in (("name", str), ("description", str | None), ("parameters", dict | None)):
            if not isinstance(function.get(key), kind):
                raise Refused(f"`tools[{number}].function.{key}` is missing, or not of the right type", "tools")
    return tools_sent(tools)


def chat_prompt(tokenizer: Any, asked: Chat) -> list[int]:
    """The ids of a conversation, rendered by the model's own template as training rendered it.

    Raises:
        Refused: the template does not take these messages.
    """
    messages = [as_templates_have_it(message, f"messages[{number}]") for number, message in enumerate(asked.messages)]
    tools = read_tools(asked.tools)
    try:
        text = template.render(tokenizer, messages, tools, variables=asked.variables())
    except template.TemplateRefusal as error:
        raise Refused(f"the chat template does not take these `messages`: {error}", "messages") from None
    ids: list[int] = tokenizer(text, add_special_tokens=asked.add_special_tokens)["input_ids"]
    return ids


def text_prompt(tokenizer: Any, asked: Completion) -> list[int]:
    """The ids of a prompt: its own, or those of its text.

    Raises:
        Refused: it is neither, or several, or has ids that the vocabulary lacks.
    """
    given: Any = asked.prompt
    if isinstance(given, list) and given and isinstance(given[0], str | list):
        if len(given) > 1:
            raise Refused("`prompt`: one at a time is supported by this server", "prompt")
        given = given[0]
    if isinstance(given, str):
        given = tokenizer(given, add_special_tokens=asked.add_special_tokens)["input_ids"]
    if not isinstance(given, list) or not all(type(token) is int for token in given):
        raise Refused("`prompt` is a text, or token ids, or a list that holds one of these", "prompt")
    if not given or not all(0 <= token < len(tokenizer) for token in given):
        raise Refused("`prompt` is empty, or holds ids that the vocabulary lacks", "prompt")
    return given


# --- text ---------------------------------------------------------------------------------------------------------------


class Text:
    """Token ids in, text out as soon as it is certain: no half characters, and nothing that may yet become a stop."""

    def __init__(self, tokenizer: Any, stops: Sequence[str]):
        self.tokenizer = tokenizer
        self.stops = stops
        self.ids: list[int] = []
        self.prefix = self.read = (
            0  # the ids of which the text was given out, and some before them, whose text shapes it
        )
        self.held = ""
        self.stopped = False

    def add(self, token: int) -> str:
        """What can be given out now."""
        self.ids.append(token)
        before = self._decode(self.ids[self.prefix : self.read])
        now = self._decode(self.ids[self.prefix :])
        if len(now) <= len(before) or now.endswith("\ufffd"):
            return ""
        self.prefix, self.read = self.read, len(self.ids)
        return self._cut(now[len(before) :], last=False)

    def end(self) -> str:
        """What was held back."""
        before = self._decode(self.ids[self.prefix : self.read])
        return "" if self.stopped else self._cut(self._decode(self.ids[self.prefix :])[len(before) :], last=True)

    def _decode(self, ids: Sequence[int]) -> str:
        text: str = self.tokenizer.decode(ids, skip_special_tokens=True)
        return text

    def _cut(self, new: str, last: bool) -> str:
        self.held += new
        found = [place for stop in self.stops if (place := self.held.find(stop)) >= 0]
        if found:
            self.stopped = True
            return self.held[: min(found)]
        keep = 0 if last else max((_overlap(self.held, stop) for stop in self.stops), default=0)
        out, self.held = self.held[: len(self.held) - keep], self.held[len(self.held) - keep :]
        return out


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` begin `stop`."""
    return next((size for size in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:size])), 0)


@dataclass(frozen=True)
class Piece:
    """A part of an answer. `reason` is set on the last one, where `tokens` counts the whole answer's."""

    text: str
    reason: str | None = None
    tokens: int = 0


# --- the server ---------------------------------------------------------------------------------------------------------


OWN = ("temperature", "top_p", "top_k", "repetition_penalty")  # of a generation config, as vLLM takes them for requests


def own_sampling(folder: Path) -> dict[str, Any]:
    """How the model wants to be sampled where a request does not say."""
    file = folder / "generation_config.json"
    held = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return {name: held[name] for name in OWN if held.get(name) is not None}


class Service:
    """The model, its tokenizer and its figures."""

    def __init__(self, folder: Path, name: str, max_model_len: int, max_num_seqs: int):
        from transformers import AutoTokenizer

        self.name, self.folder = name, folder
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        sizes = json.loads((folder / "genai_config.json").read_text(encoding="utf-8"))["model"]
        self.own = own_sampling(folder)
        self.room, self.rows = min(max_model_len, sizes["context_length"]), sizes["vocab_size"]
        self.engine = Engine(folder, max_num_seqs, failed=lambda: os.kill(os.getpid(), signal.SIGTERM))
        self.figures = Figures(self.engine)

    def space(self, prompt: Sequence[int], wanted: int | None) -> int:
        """Tokens that an answer may have.

        Raises:
            Refused: prompt and answer together are too long, or the prompt has a token that the model has no row for.
        """
        if prompt and max(prompt) >= self.rows:
            raise Refused(
                f"the prompt has the token id {max(prompt)}, and the model has 0 to {self.rows - 1}", "prompt"
            )
        left: int = self.room - len(prompt)
        if left < (wanted or 1):
            param = "messages" if wanted is None else "max_tokens"
            raise Refused(
                f"`{param}`: the prompt has {len(prompt)} tokens and {wanted or 1} are to follow; "
                f"this model's maximum context length here is {self.room} tokens",
                param,
            )
        return left

    async def pieces(self, prompt: list[int], sampling: Sampling, stops: Sequence[str]) -> AsyncIterator[Piece]:
        """The answer as it comes. Leaving this early ends the generation."""
        text, begin = Text(self.tokenizer, stops), time.perf_counter()
        self.figures.prompt_tokens.inc(len(prompt))
        tokens = self.engine.generate(prompt, sampling)
        try:
            async for item in tokens:
                if isinstance(item, Ended):
                    if item.reason == "error":
                        raise Refused(item.message, status=500)
                    yield Piece(text.end(), item.reason, len(text.ids))
                    return
                if not text.ids:
                    self.figures.ttft.observe(time.perf_counter() - begin)
                out = text.add(item)
                if text.stopped:
                    yield Piece(out, "stop", len(text.ids))
                    return
                if out:
                    yield Piece(out)
        finally:
            await tokens.aclose()  # type: ignore[attr-defined]
            self.figures.tokens.inc(len(text.ids))
            self.figures.seconds.observe(time.perf_counter() - begin)


class Figures:
    """What /metrics tells, in Prometheus' text format."""

    def __init__(self, engine: Engine):
        self.registry = CollectorRegistry()
        own: dict[str, Any] = {"registry": self.registry, "namespace": "qkit"}
        self.requests = Counter("requests", "Requests by status", ["status"], **own)
        self.prompt_tokens = Counter("prompt_tokens", "Tokens read", **own)
        self.tokens = Counter("generation_tokens", "Tokens written", **own)
        self.ttft = Histogram(
            "time_to_first_token_seconds", "From the request to its first token", buckets=SECONDS, **own
        )
        self.seconds = Histogram("request_seconds", "From the request to its last token", buckets=SECONDS, **own)
        Gauge("requests_running", "In the engine", **own).set_function(lambda: engine.load[0])
        Gauge("requests_waiting", "Before the engine", **own).set_function(lambda: engine.load[1])


def build(service: Service) -> FastAPI:
    """The application; `qkit.admission` is wrapped around it."""
    app = FastAPI(title="qkit", docs_url=None, redoc_url=None, openapi_url=None)

    @app.get("/health")
    async def health() -> Response:
        return Response(status_code=503 if service.engine.failure else 200)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(generate_latest(service.figures.registry), media_type="text/plain; version=0.0.4")

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        entry = {"id": service.name, "object": "model", "created": 0, "owned_by": "qkit", "root": str(service.folder)}
        entry["max_model_len"] = service.room
        return {"object": "list", "data": [entry]}

    @app.post("/v1/chat/completions")
    async def chat(asked: Chat, request: Request) -> Response:
        asked.take(service.own)
        asked.check(service.name)
        prompt = chat_prompt(service.tokenizer, asked)
        asked.max_tokens = asked.max_completion_tokens or asked.max_tokens
        left = service.space(prompt, asked.max_tokens)
        return await _answered(service, asked, prompt, asked.sampling(left, left), CHAT, request)

    @app.post("/tokenize")
    async def tokenize(given: dict[str, Any]) -> dict[str, Any]:
        """The ids that a request to either endpoint would be answered from; the same as vLLM's."""
        try:
            asked = (Chat if "messages" in given else Completion).model_validate({"model": service.name, **given})
        except ValidationError as error:
            raise RequestValidationError([{**one, "loc": ("body", *one["loc"])} for one in error.errors()]) from None
        asked.check(service.name)
        ids = (
            chat_prompt(service.tokenizer, asked) if isinstance(asked, Chat) else text_prompt(service.tokenizer, asked)
        )
        return {"count": len(ids), "max_model_len": service.room, "tokens": ids}

    @app.post("/v1/completions")
    async def completions(asked: Completion, request: Request) -> Response:
        asked.take(service.own)
        asked.check(service.name)
        prompt = text_prompt(service.tokenizer, asked)
        left = service.space(prompt, asked.max_tokens)
        return await _answered(service, asked, prompt, asked.sampling(left, DEFAULT_MAX_TOKENS), PLAIN, request)

    _handle_errors(app, service.figures)
    return app


def _handle_errors(app: FastAPI, figures: Figures) -> None:
    """Errors as OpenAI has them."""

    async def refused(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, Refused)
        figures.requests.labels(error.status).inc()
        return JSONResponse(_error(str(error), error.param, error.status), error.status)

    async def invalid(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        first = error.errors()[0]
        param = str(first["loc"][1]) if first["type"] != "json_invalid" and len(first["loc"]) > 1 else None
        figures.requests.labels(400).inc()
        return JSONResponse(_error(f"`{param}`: {first['msg']}" if param else str(first["msg"]), param, 400), 400)

    app.add_exception_handler(Refused, refused)
    app.add_exception_handler(RequestValidationError, invalid)


def _error(message: str, param: str | None, status: int) -> dict[str, Any]:
    kind = {404: "not_found_error", 500: "internal_error"}.get(status, "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": status}}


# --- answers ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Form:
    """How an endpoint writes its answers."""

    prefix: str
    whole: str
    part: str
    chat: bool

    def choice(self, index: int, piece: Piece, first: bool, stream: bool) -> dict[str, Any]:
        told: dict[str, Any] = {"index": index, "finish_reason": piece.reason, "logprobs": None}
        if not self.chat:
            return {**told, "text": piece.text}
        turn: dict[str, Any] = {"role": "assistant"} if first or not stream else {}
        return {**told, ("delta" if stream else "message"): {**turn, "content": piece.text}}


CHAT = Form("chatcmpl", "chat.completion", "chat.completion.chunk", True)
PLAIN = Form("cmpl", "text_completion", "text_completion", False)


async def _answered(
    service: Service, asked: Asked, prompt: list[int], sampling: Sampling, form: Form, request: Request
) -> Response:
    head = {"id": f"{form.prefix}-{uuid.uuid4().hex[:16]}", "created": int(time.time()), "model": service.name}
    if asked.stream:
        events = _events(service, asked, prompt, sampling, form, {**head, "object": form.part})
        service.figures.requests.labels(200).inc()
        return StreamingResponse(events, media_type="text/event-stream", headers={"cache-control": "no-cache"})
    whole = await asyncio.gather(*(_whole(service, prompt, sampling, asked.stops, request) for _ in range(asked.n)))
    choices = [form.choice(index, piece, True, False) for index, piece in enumerate(whole)]
    usage = _usage(prompt, sum(piece.tokens for piece in whole))
    service.figures.requests.labels(200).inc()
    return JSONResponse({**head, "object": form.whole, "choices": choices, "usage": usage})


async def _whole(
    service: Service, prompt: list[int], sampling: Sampling, stops: Sequence[str], request: Request
) -> Piece:
    """The whole answer; no more of it is made when the client is gone."""
    parts, pieces = [], service.pieces(prompt, sampling, stops)
    async for piece in pieces:
        parts.append(piece.text)
        if piece.reason:
            return Piece("".join(parts), piece.reason, piece.tokens)
        if await request.is_disconnected():
            break
    await pieces.aclose()  # type: ignore[attr-defined]
    raise Refused("the client is gone", status=499)


async def _events(
    service: Service, asked: Asked, prompt: list[int], sampling: Sampling, form: Form, head: Mapping[str, Any]
) -> AsyncIterator[str]:
    """Server-sent events: the choices one after the other, the usage where it is asked for, [DONE]."""
    total = 0
    try:
        for index in range(asked.n):
            first = True
            async for piece in service.pieces(prompt, sampling, asked.stops):
                yield _event({**head, "choices": [form.choice(index, piece, first, True)]})
                first, total = False, total + piece.tokens
        if (asked.stream_options or {}).get("include_usage"):
            yield _event({**head, "choices": [], "usage": _usage(prompt, total)})
    except Refused as error:
        yield _event(_error(str(error), None, 500))
    yield "data: [DONE]\n\n"


def _event(body: Mapping[str, Any]) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"


def _usage(prompt: Sequence[int], tokens: int) -> dict[str, int]:
    return {"prompt_tokens": len(prompt), "completion_tokens": tokens, "total_tokens": len(prompt) + tokens}


def main(arguments: Sequence[str] | None = None) -> None:
    """The program; its options have vLLM's names."""
    parser = argparse.ArgumentParser(prog="qkit.onnx_server", description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--served-model-name", required=True)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--max-model-len", type=int, default=2048)
    parser.add_argument("--max-num-seqs", type=int, default=4)
    given = parser.parse_args(arguments)
    service = Service(given.model, given.served_model_name, given.max_model_len, given.max_num_seqs)
    try:
        app = Admission(build(service))
        uvicorn.run(
            app,
            host=given.host,
            port=given.port,
            access_log=False,
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=5,
        )
    finally:
        service.engine.close()


if __name__ == "__main__":
    main()
