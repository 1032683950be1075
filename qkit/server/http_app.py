"""What qkit's own servers share: routes for probes and scrapers, errors in the form of the OpenAI API, the process around the application."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from prometheus_client import CollectorRegistry, Counter, generate_latest

from qkit.server.admission import KEEP_ALIVE_SECONDS, Admission
from qkit.server.refusal import Refused


def new_app() -> FastAPI:
    """An application without documentation pages."""
    return FastAPI(title="qkit", docs_url=None, redoc_url=None, openapi_url=None)


def request_counter(registry: CollectorRegistry) -> Counter:
    """The metric that both servers have under one name."""
    return Counter("requests", "Requests by status", ["status"], registry=registry, namespace="qkit")


def add_status_routes(
    app: FastAPI, registry: CollectorRegistry, is_healthy: Callable[[], bool], model: Callable[[], dict[str, Any]]
) -> None:
    """Add /health, /metrics and /v1/models. `model`: its entry, with `id`, `root` and `max_model_len`."""

    @app.get("/health")
    async def health() -> Response:
        return Response(status_code=200 if is_healthy() else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(generate_latest(registry), media_type="text/plain; version=0.0.4")

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [{"object": "model", "created": 0, "owned_by": "qkit", **model()}]}


def handle_errors(app: FastAPI, requests: Counter) -> None:
    """Errors in the form of the OpenAI API."""

    async def refused(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, Refused)
        requests.labels(error.status).inc()
        return JSONResponse(error_body(str(error), error.param, error.status), error.status)

    async def invalid(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        first = error.errors()[0]
        param = str(first["loc"][1]) if first["type"] != "json_invalid" and len(first["loc"]) > 1 else None
        requests.labels(400).inc()
        return JSONResponse(error_body(f"`{param}`: {first['msg']}" if param else str(first["msg"]), param, 400), 400)

    app.add_exception_handler(Refused, refused)
    app.add_exception_handler(RequestValidationError, invalid)


def error_body(message: str, param: str | None, status: int) -> dict[str, Any]:
    """An error as the OpenAI API writes it."""
    kind = {404: "not_found_error", 500: "internal_error"}.get(status, "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": status}}


def parser(program: str, description: str | None) -> argparse.ArgumentParser:
    """The options that both servers have; their names are vLLM's."""
    made = argparse.ArgumentParser(prog=program, description=description)
    made.add_argument("--model", type=Path, required=True)
    made.add_argument("--served-model-name", required=True)
    made.add_argument("--host", default="127.0.0.1")
    made.add_argument("--port", type=int, default=8000)
    return made


def run(app: FastAPI, host: str, port: int, closing: Sequence[Callable[[], None]]) -> None:
    """Serve the application behind the admission control until the process is told to end; then call each of `closing`."""
    try:
        uvicorn.run(
            Admission(app),
            host=host,
            port=port,
            access_log=False,
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=5,
        )
    finally:
        for close in closing:
            close()
