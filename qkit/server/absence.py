"""Removes two ways of writing "not given" that vLLM 0.32 refuses: an empty list of tools, and a message's `name` that is null.

Clients send them for parameters that they leave open. A body without them passes unchanged, at the cost of one search.
"""

from __future__ import annotations

import json
import re
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

PATHS = ("/chat/completions", "/tokenize")
PATTERN = re.compile(rb'"tools"\s*:\s*\[\s*\]|"name"\s*:\s*null')
CHOICES = ("auto", "none", None)  # values of tool_choice that mean nothing without tools


Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]


def remove_empty(body: bytes) -> bytes:
    """The body of a request without its empty parameters; unchanged if it has none, or is not JSON."""
    if not PATTERN.search(body):
        return body
    try:
        request = json.loads(body)
        return json.dumps(request, allow_nan=False).encode() if _remove(request) else body
    except (ValueError, RecursionError):  # the server's answer will name the fault
        return body


def _remove(request: Any) -> bool:
    """Remove the empty parameters in place. Returns whether there were any."""
    if not isinstance(request, dict):
        return False
    has_empty_tools = request.get("tools") == []
    if has_empty_tools:
        del request["tools"]
        if request.get("tool_choice") in CHOICES:
            request.pop("tool_choice", None)
    turns = request.get("messages")
    unnamed = (
        [turn for turn in turns if isinstance(turn, dict) and turn.get("name", "") is None]
        if isinstance(turns, list)
        else []
    )
    for turn in unnamed:
        del turn["name"]
    return has_empty_tools or bool(unnamed)


async def receive_cleaned(receive: Receive) -> Receive:
    """A `receive` that returns the request's body at once, without its empty parameters, and later events unchanged."""
    pieces, first = [], await receive()
    while first.get("type") == "http.request":
        pieces.append(first.get("body", b""))
        if not first.get("more_body"):
            first = {**first, "body": remove_empty(b"".join(pieces)), "more_body": False}
            break
        first = await receive()
    waiting = [first]

    async def receive_again() -> MutableMapping[str, Any]:
        return waiting.pop() if waiting else await receive()

    return receive_again
