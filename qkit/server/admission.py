"""Admission control for a server, as ASGI middleware: readiness, draining, the key on every path, and limits on size and number of requests.

vLLM loads it into its own process (`--middleware qkit.admission.Admission`), and so does qkit's ONNX server. vLLM does not limit the size of
requests, checks the key only on some paths, answers 200 on /health while it shuts down, and refuses some empty parameters
(`qkit.server.absence`). A request costs one `stat` and a few comparisons more; tokens pass untouched. Only the standard library is imported.

    /health   200, or 503 while draining; then `{"draining": true, "in_flight": N}`
    else      401 without the key, 503 while draining, 429 for too many requests, 411 and 413 for a body without a length or too long

As a program, `python -m qkit.admission URL` drains the server at URL; a Kubernetes preStop hook calls it.
"""

from __future__ import annotations

import hmac
import http.client
import json
import os
import sys
import time
import urllib.request
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qkit.server import absence

DRAIN_FILE = "QKIT_DRAIN_FILE"  # the server drains while this file exists
MAX_BODY_BYTES = "QKIT_MAX_BODY_BYTES"
MAX_REQUESTS = "QKIT_MAX_REQUESTS"
DRAIN_SECONDS = "QKIT_DRAIN_SECONDS"
API_KEY = "VLLM_API_KEY"
# Idle connections are kept longer than clients and proxies keep them (usually 60 s; vLLM's default is 5 s, like that of httpx). If the
# server closed them first, a request that is already on its way would fail.
KEEP_ALIVE_SECONDS = 75
OPEN = frozenset({"/health", "/metrics"})  # probes and scrapers send no key


Scope = MutableMapping[str, Any]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


@dataclass(frozen=True)
class Limits:
    """What is admitted. `drain_file`: the server drains while it exists. Zero means no limit."""

    drain_file: str = ""
    max_body_bytes: int = 0
    max_requests: int = 0
    key: str = field(default="", repr=False)

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Limits:
        return cls(
            drain_file=environment.get(DRAIN_FILE, ""),
            max_body_bytes=int(environment.get(MAX_BODY_BYTES) or 0),
            max_requests=int(environment.get(MAX_REQUESTS) or 0),
            key=environment.get(API_KEY, ""),
        )


@dataclass(frozen=True)
class Refusal:
    """An error in the form of the OpenAI API."""

    status: int
    kind: str
    message: str
    headers: tuple[tuple[bytes, bytes], ...] = ()


class Admission:
    """Wraps an ASGI application. Its limits come from the environment, which may contain a secret, and never from argv."""

    def __init__(self, app: App, limits: Limits | None = None):
        self.app = app
        self.limits = limits or Limits.from_environment(os.environ)
        self.in_flight = 0
        if self.limits.drain_file:  # in a restarted container, it was meant for the previous process
            Path(self.limits.drain_file).unlink(missing_ok=True)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await self._converse(scope, receive, send)
        elif scope["type"] != "http":
            await self.app(scope, receive, send)
        elif scope["path"] == "/health" and self.draining():
            await _answer(send, 503, {"draining": True, "in_flight": self.in_flight})
        elif scope["path"] in OPEN:
            await self.app(scope, receive, send)
        elif refusal := self.refusal(scope):
            error = {"message": refusal.message, "type": refusal.kind, "param": None, "code": refusal.status}
            await _answer(send, refusal.status, {"error": error}, refusal.headers)
        else:
            await self._admit(scope, receive, send)

    async def _converse(self, scope: Scope, receive: Receive, send: Send) -> None:
        """A websocket counts as one request while it is open. If it is closed before it is accepted, its client gets status 403."""
        if self.refusal(scope):
            await send({"type": "websocket.close", "code": POLICY_VIOLATION})
        else:
            await self._admit(scope, receive, send)

    async def _admit(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.in_flight += 1
        try:
            has_prompt = scope["type"] == "http" and scope["path"].endswith(absence.PATHS)
            await self.app(scope, await absence.receive_cleaned(receive) if has_prompt else receive, send)
        finally:
            self.in_flight -= 1

    def draining(self) -> bool:
        return bool(self.limits.drain_file) and os.path.exists(self.limits.drain_file)  # noqa: PTH110 (faster)

    def refusal(self, scope: Scope) -> Refusal | None:
        """Why a request is not admitted, or None if it is."""
        if not _authorized(scope, self.limits.key):
            return Refusal(
                401, "authentication_error", "the API key is missing or wrong: send `Authorization: Bearer KEY`"
            )
        if self.draining():
            return Refusal(503, "unavailable", "the server is shutting down; use another one", RETRY_ELSEWHERE)
        if self.limits.max_requests and self.in_flight >= self.limits.max_requests:
            message = f"{self.in_flight} requests are running or waiting, which is the limit (serve.max_requests); try again later"
            return Refusal(429, "rate_limit_error", message, RETRY_SOON)
        return self._size_refusal(dict(scope["headers"]))

    def _size_refusal(self, headers: Mapping[bytes, bytes]) -> Refusal | None:
        most, size = self.limits.max_body_bytes, headers.get(b"content-length", b"0")
        if most and b"transfer-encoding" in headers:  # if both are given, the length does not count
            return Refusal(411, "invalid_request_error", "send the body with a Content-Length, not in chunks")
        if most and (not size.isdigit() or int(size) > most):
            message = f"the body has {size.decode('latin-1')} bytes; the limit is {most} (serve.max_body_bytes)"
            return Refusal(413, "invalid_request_error", message, ((b"connection", b"close"),))
        return None


POLICY_VIOLATION = 1008  # close code of a websocket
RETRY_SOON = ((b"retry-after", b"1"),)
RETRY_ELSEWHERE = ((b"retry-after", b"1"), (b"connection", b"close"))


def _authorized(scope: Scope, key: str) -> bool:
    """Compared in constant time. Browsers send an OPTIONS request, without the key, before the actual one."""
    if not key or scope.get("method") == "OPTIONS":
        return True
    scheme, _, given = dict(scope["headers"]).get(b"authorization", b"").partition(b" ")
    return scheme.lower() == b"bearer" and hmac.compare_digest(given, key.encode())


async def _answer(send: Send, status: int, body: Any, headers: tuple[tuple[bytes, bytes], ...] = ()) -> None:
    content = json.dumps(body).encode()
    fixed = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": [*fixed, *headers]})
    await send({"type": "http.response.body", "body": content})


# --- draining a server ------------------------------------------------------------------------------------------------


def drain(url: str, drain_file: Path, seconds: float, ended: Callable[[], bool] = lambda: False) -> int:
    """Make a server refuse new requests, and wait up to `seconds` for the current ones. Returns how many are left.

    `ended` is called ten times a second; when it returns True, the wait is over.
    """
    drain_file.touch()
    deadline, left = time.monotonic() + seconds, 0
    while not ended():
        left = _in_flight(url)
        if not left or time.monotonic() >= deadline:
            return left
        time.sleep(0.1)
    return left


def _in_flight(url: str) -> int:
    """The number of requests that a draining server has. It is 0 if nothing, or another program, listens at the URL; and at least 1 if the
    server is too busy to answer.
    """
    try:
        with _DIRECT.open(f"{url}/health", timeout=2.0):
            return 1  # it has not noticed the file yet
    except urllib.error.HTTPError as error:
        return _count(error.read()) if error.code == 503 else 0
    except http.client.HTTPException:
        return 0
    except OSError as error:
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        return 1 if isinstance(reason, TimeoutError) else 0


def _count(answer: bytes) -> int:
    try:
        return int(json.loads(answer or b"{}").get("in_flight", 0))
    except (ValueError, TypeError, AttributeError):
        return 0  # not an answer of this middleware; a proxy's, for example


# The server is on this machine, so http_proxy does not apply.
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def main() -> None:
    """The preStop hook: drain the server at the URL that the command line gives."""
    drain(sys.argv[1], Path(os.environ[DRAIN_FILE]), float(os.environ.get(DRAIN_SECONDS, "30")))


if __name__ == "__main__":
    main()
