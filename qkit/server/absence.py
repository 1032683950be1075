"""Ways to write nothing in a request that vLLM 0.32 refuses, taken out on their way to it: an empty list of tools, and a name that is null.

Clients write them for what they leave open. A body that has neither is handed on as it came, for the price of a search in it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

PATHS = ("/chat/completions", "/tokenize")
WRITTEN = re.compile(rb'"tools"\s*:\s*\[\s*\]|"name"\s*:\s*null')
CHOICES = ("auto", "none", None)  # of a tool, where there is none to choose


Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]


def without_nothings(body: bytes) -> bytes:
    """The body of a request without what says nothing; as it is where it says something throughout, or is no JSON."""
    if not WRITTEN.search(body):
        return body
    try:
        asked = json.loads(body)
        return json.dumps(asked, allow_nan=False).encode() if _cleared(asked) else body
    except (ValueError, RecursionError):  # the server says what is wrong with it
        return body


def _cleared(asked: Any) -> bool:
    """Take out what says nothing; whether there was any."""
    if not isinstance(asked, dict):
        return False
    offers_none = asked.get("tools") == []
    if offers_none:
        del asked["tools"]
        if asked.get("tool_choice") in CHOICES:
            asked.pop("tool_choice", None)
    turns = asked.get("messages")
    unnamed = (
        [turn for turn in turns if isinstance(turn, dict) and turn.get("name", "") is None]
        if isinstance(turns, list)
        else []
    )
    for turn in unnamed:
        del turn["name"]
    return offers_none or bool(unnamed)


async def received(receive: Receive) -> Receive:
    """The same way to receive a request, its body read and rid of what says nothing; what comes after it passes as it is."""
    pieces, first = [], await receive()
    while first.get("type") == "http.request":
        pieces.append(first.get("body", b""))
        if not first.get("more_body"):
            first = {**first, "body": without_nothings(b"".join(pieces)), "more_body": False}
            break
        first = await receive()
    waiting = [first]

    async def again() -> MutableMapping[str, Any]:
        return waiting.pop() if waiting else await receive()

    return again
