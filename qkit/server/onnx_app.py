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
from typing import TYPE_CHECKING, Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from pydantic import ValidationError

from qkit.server.admission import KEEP_ALIVE_SECONDS, Admission
from qkit.server.onnx_engine import Ended, Engine, Sampling
from qkit.server.onnx_requests import (
    DEFAULT_MAX_TOKENS,
    Chat,
    Completion,
    Refused,
    chat_prompt,
    own_sampling,
    text_prompt,
)
from qkit.server.onnx_text import Piece, Text

if TYPE_CHECKING:
    from qkit.server.onnx_requests import Asked


SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


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
    parser = argparse.ArgumentParser(prog="qkit.server.onnx_app", description=__doc__)
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
