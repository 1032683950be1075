"""An OpenAI-compatible server for an ONNX export, where vLLM is not available: `python -m qkit.server.onnx_app --model FOLDER`.

It does not support logprobs, seed (except with temperature 0), penalties other than `repetition_penalty`, guided decoding, or adapters. Such a
request gets status 400 with the parameter's name, unless the value changes nothing; null, "", [] and {} count as not given. `tools` reach the
chat template, but the answer is text, never `tool_calls`. Prompts are rendered as in training (`qkit.chat.template`); `/tokenize` shows their
token ids. Requests are batched statically: see `qkit.server.onnx_engine`.
"""

from __future__ import annotations

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

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from pydantic import ValidationError

from qkit.server import http_app
from qkit.server.onnx_engine import Ended, Engine, Sampling
from qkit.server.onnx_requests import (
    DEFAULT_MAX_TOKENS,
    Chat,
    Completion,
    model_defaults,
    prompt_ids,
    tokenize_request,
)
from qkit.server.onnx_text import Piece, Text
from qkit.server.refusal import Refused

SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Service:
    """The model with its tokenizer, engine and metrics."""

    def __init__(self, folder: Path, name: str, max_model_len: int, max_num_seqs: int):
        from transformers import AutoTokenizer

        self.name, self.folder = name, folder
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        sizes = json.loads((folder / "genai_config.json").read_text(encoding="utf-8"))["model"]
        self.defaults = model_defaults(folder)
        self.max_model_len, self.vocab_size = min(max_model_len, sizes["context_length"]), sizes["vocab_size"]
        self.engine = Engine(folder, max_num_seqs, failed=lambda: os.kill(os.getpid(), signal.SIGTERM))
        self.metrics = Metrics(self.engine)

    def generation(self, request: Chat | Completion) -> Generation:
        """A request, checked and ready for the engine.

        Raises:
            Refused: the request cannot be answered.
        """
        request = request.with_defaults(self.defaults)
        request.check(self.name)
        prompt = prompt_ids(self.tokenizer, request)
        left = self.tokens_left(prompt, request.wanted_tokens)
        sampling = request.sampling(
            min(left, self.defaults.max_new_tokens or left), left if isinstance(request, Chat) else DEFAULT_MAX_TOKENS
        )
        return Generation(self, request, prompt, sampling, CHAT if isinstance(request, Chat) else PLAIN)

    def tokens_left(self, prompt: Sequence[int], wanted: int | None) -> int:
        """How many tokens an answer can have. `wanted`: how many the request asks for.

        Raises:
            Refused: prompt and answer together are too long, or the model has no embedding for a token of the prompt.
        """
        if prompt and max(prompt) >= self.vocab_size:
            raise Refused(
                f"the prompt has the token id {max(prompt)}; the ids of this model are 0 to {self.vocab_size - 1}",
                "prompt",
            )
        left: int = self.max_model_len - len(prompt)
        if left < (wanted or 1):
            param = "messages" if wanted is None else "max_tokens"
            raise Refused(
                f"`{param}`: the prompt has {len(prompt)} tokens and the answer needs {wanted or 1}; "
                f"this model's maximum context length here is {self.max_model_len} tokens",
                param,
            )
        return left

    async def pieces(self, prompt: list[int], sampling: Sampling, stops: Sequence[str]) -> AsyncIterator[Piece]:
        """An answer as it is generated. Closing the iterator early ends the generation."""
        text, begin = Text(self.tokenizer, stops), time.perf_counter()
        self.metrics.prompt_tokens.inc(len(prompt))
        tokens = self.engine.generate(prompt, sampling)
        try:
            async for item in tokens:
                if isinstance(item, Ended):
                    if item.reason == "error":
                        raise Refused(item.message, status=500)
                    yield Piece(text.end(), item.reason, len(text.ids))
                    return
                if not text.ids:
                    self.metrics.ttft.observe(time.perf_counter() - begin)
                out = text.add(item)
                if text.stopped:
                    yield Piece(out, "stop", len(text.ids))
                    return
                if out:
                    yield Piece(out)
        finally:
            await tokens.aclose()  # type: ignore[attr-defined]
            self.metrics.tokens.inc(len(text.ids))
            self.metrics.seconds.observe(time.perf_counter() - begin)


class Metrics:
    """The metrics at /metrics, in Prometheus' text format."""

    def __init__(self, engine: Engine):
        self.registry = CollectorRegistry()
        common: dict[str, Any] = {"registry": self.registry, "namespace": "qkit"}
        self.requests = http_app.request_counter(self.registry)
        self.prompt_tokens = Counter("prompt_tokens", "Tokens read", **common)
        self.tokens = Counter("generation_tokens", "Tokens written", **common)
        self.ttft = Histogram(
            "time_to_first_token_seconds", "From the request to its first token", buckets=SECONDS, **common
        )
        self.seconds = Histogram("request_seconds", "From the request to its last token", buckets=SECONDS, **common)
        Gauge("requests_running", "In the engine", **common).set_function(lambda: engine.load[0])
        Gauge("requests_waiting", "Before the engine", **common).set_function(lambda: engine.load[1])


def build(service: Service) -> FastAPI:
    """The application, without the admission control that `main` wraps around it."""
    app = http_app.new_app()
    http_app.add_status_routes(
        app, service.metrics.registry, lambda: not service.engine.failure, lambda: _model_entry(service)
    )
    _add_request_routes(app, service)
    http_app.handle_errors(app, service.metrics.requests)
    return app


def _model_entry(service: Service) -> dict[str, Any]:
    return {"id": service.name, "root": str(service.folder), "max_model_len": service.max_model_len}


def _add_request_routes(app: FastAPI, service: Service) -> None:
    @app.post("/v1/chat/completions")
    async def chat(body: Chat, request: Request) -> Response:
        return await _answer(service.generation(body), request)

    @app.post("/v1/completions")
    async def completions(body: Completion, request: Request) -> Response:
        return await _answer(service.generation(body), request)

    @app.post("/tokenize")
    async def tokenize(body: dict[str, Any]) -> dict[str, Any]:
        """The token ids of the prompt that either endpoint makes of such a request; the same as vLLM's."""
        try:
            request = tokenize_request(body, service.name)
        except ValidationError as error:
            raise RequestValidationError([{**one, "loc": ("body", *one["loc"])} for one in error.errors()]) from None
        request.check(service.name)
        ids = prompt_ids(service.tokenizer, request)
        return {"count": len(ids), "max_model_len": service.max_model_len, "tokens": ids}


# --- answers ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AnswerFormat:
    """How an endpoint writes its answers: the prefix of ids, and the `object` of whole answers and of streamed chunks."""

    prefix: str
    whole: str
    chunk: str
    chat: bool

    def choice(self, index: int, piece: Piece, first: bool, stream: bool) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": index, "finish_reason": piece.reason, "logprobs": None}
        if not self.chat:
            return {**choice, "text": piece.text}
        role: dict[str, Any] = {"role": "assistant"} if first or not stream else {}
        return {**choice, ("delta" if stream else "message"): {**role, "content": piece.text}}


CHAT = AnswerFormat("chatcmpl", "chat.completion", "chat.completion.chunk", True)
PLAIN = AnswerFormat("cmpl", "text_completion", "text_completion", False)


@dataclass(frozen=True)
class Generation:
    """A request on its way to an answer."""

    service: Service
    request: Chat | Completion
    prompt: list[int]
    sampling: Sampling
    answer_format: AnswerFormat

    def pieces(self) -> AsyncIterator[Piece]:
        """One of the `n` answers, as it is generated."""
        return self.service.pieces(self.prompt, self.sampling, self.request.stops)

    def usage(self, tokens: int) -> dict[str, int]:
        prompt = len(self.prompt)
        return {"prompt_tokens": prompt, "completion_tokens": tokens, "total_tokens": prompt + tokens}


async def _answer(generation: Generation, connection: Request) -> Response:
    service, form, request = generation.service, generation.answer_format, generation.request
    head = {"id": f"{form.prefix}-{uuid.uuid4().hex[:16]}", "created": int(time.time()), "model": service.name}
    if request.stream:
        events = _events(generation, {**head, "object": form.chunk})
        service.metrics.requests.labels(200).inc()
        return StreamingResponse(events, media_type="text/event-stream", headers={"cache-control": "no-cache"})
    answers = await asyncio.gather(*(_whole(generation, connection) for _ in range(request.n)))
    choices = [form.choice(index, piece, True, False) for index, piece in enumerate(answers)]
    usage = generation.usage(sum(piece.tokens for piece in answers))
    service.metrics.requests.labels(200).inc()
    return JSONResponse({**head, "object": form.whole, "choices": choices, "usage": usage})


async def _whole(generation: Generation, connection: Request) -> Piece:
    """One whole answer. Generation ends when the client disconnects."""
    texts, pieces = [], generation.pieces()
    async for piece in pieces:
        texts.append(piece.text)
        if piece.reason:
            return Piece("".join(texts), piece.reason, piece.tokens)
        if await connection.is_disconnected():
            break
    await pieces.aclose()  # type: ignore[attr-defined]
    raise Refused("the client has disconnected", status=499)


async def _events(generation: Generation, head: Mapping[str, Any]) -> AsyncIterator[str]:
    """Server-sent events: one choice after the other, the usage if the request asks for it, [DONE]."""
    request, total = generation.request, 0
    try:
        for index in range(request.n):
            first = True
            async for piece in generation.pieces():
                yield _event({**head, "choices": [generation.answer_format.choice(index, piece, first, True)]})
                first, total = False, total + piece.tokens
        if (request.stream_options or {}).get("include_usage"):
            yield _event({**head, "choices": [], "usage": generation.usage(total)})
    except Refused as error:
        yield _event(http_app.error_body(str(error), None, 500))
    yield "data: [DONE]\n\n"


def _event(body: Mapping[str, Any]) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the server. The options have the names that vLLM gives them."""
    parser = http_app.parser("qkit.server.onnx_app", __doc__)
    parser.add_argument("--max-model-len", type=int, default=2048)
    parser.add_argument("--max-num-seqs", type=int, default=4)
    options = parser.parse_args(arguments)
    service = Service(options.model, options.served_model_name, options.max_model_len, options.max_num_seqs)
    http_app.run(build(service), options.host, options.port, [service.engine.close])


if __name__ == "__main__":
    main()
