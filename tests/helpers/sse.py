"""A server that streams completions at set times and keeps a log of when it sent what: a second clock for the same requests."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

FIRST, GAP = 0.4, 0.15  # seconds from a request to its first chunk, and from chunk to chunk
ANSWERING = ("steady", "client", "several", "miscounts", "half", "breaks", "strict")
TEXT = "abc"  # of a chunk: as many tokens as letters for a tokenizer of bytes


@dataclass
class Sent:
    """One request as the server saw it: when it came, and when each chunk was handed to the network."""

    arrived: float
    prompt: int = 0
    chunks: list[float] = field(default_factory=list)
    tokens: int = 0


class Fake:
    """`log` has the requests of each model. The model's name says how to behave: steady, client, several, miscounts, fails, half,
    breaks (every second answer ends after a token), strict (takes OpenAI's parameters alone); or it has a script: what to write, text as it is
    and documents as events, and at how many seconds after the request.
    """

    def __init__(self) -> None:
        self.log: dict[str, list[Sent]] = {}
        self.scripts: dict[str, list[tuple[float, str | dict[str, Any]]]] = {}
        self.url = ""

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while head := await reader.readuntil(b"\r\n\r\n"):
            arrived = time.perf_counter()
            lines = head.decode().lower().split("\r\n")
            length = next((int(line.split(":")[1]) for line in lines if line.startswith("content-length:")), 0)
            body = json.loads(await reader.readexactly(length)) if length else {}
            if "/completions" in lines[0]:
                await self.answer(body, arrived, writer)
            else:
                writer.write(b"HTTP/1.1 404 None\r\nContent-Length: 0\r\n\r\n")

    async def answer(self, body: dict[str, Any], arrived: float, writer: asyncio.StreamWriter) -> None:
        sent = self.log.setdefault(body.get("model", ""), [])
        sent.append(Sent(arrived, len(body.get("prompt", ""))))
        mine, model = sent[-1], body.get("model")
        if model == "strict" and (
            odd := {"cache_salt", "add_special_tokens", "ignore_eos", "repetition_penalty", "return_token_ids"}
            & body.keys()
        ):
            writer.write(f"HTTP/1.1 400 {'-'.join(odd)}\r\nContent-Length: 0\r\n\r\n".encode())
            return
        if model in self.scripts:
            await self.play(self.scripts[model], arrived, writer)
            return
        if model not in ANSWERING or (model == "half" and len(sent) % 2):
            writer.write(b"HTTP/1.1 500 No\r\nContent-Length: 0\r\n\r\n")
            return
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
        size = len(TEXT) if model == "several" else 1
        whole = (
            1
            if model == "breaks" and len(sent) % 2
            else (body.get("max_tokens") or body["max_completion_tokens"]) // size
        )
        for number in range(whole):
            await asyncio.sleep(arrived + FIRST + number * GAP - time.perf_counter())
            mine.chunks.append(time.perf_counter())
            mine.tokens += size
            await self.event(writer, {"choices": [{"index": 0, "text": TEXT[:size]}]})
        counted = len(body.get("prompt", "")) + (model == "miscounts")
        await self.event(writer, {"choices": [], "usage": {"prompt_tokens": counted, "completion_tokens": mine.tokens}})
        await self.event(writer, None)
        writer.write(b"0\r\n\r\n")

    async def play(
        self, script: list[tuple[float, str | dict[str, Any]]], arrived: float, writer: asyncio.StreamWriter
    ) -> None:
        """A script, in a response that ends with the connection."""
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n")
        for seconds, what in script:
            await asyncio.sleep(arrived + seconds - time.perf_counter())
            writer.write((what if isinstance(what, str) else f"data: {json.dumps(what)}\n\n").encode())
            await writer.drain()
        writer.close()

    async def event(self, writer: asyncio.StreamWriter, value: dict[str, Any] | None) -> None:
        data = f"data: {'[DONE]' if value is None else json.dumps(value)}\n\n".encode()
        writer.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        await writer.drain()


@contextmanager
def serving() -> Iterator[Fake]:
    """The server in a thread of its own."""
    fake, up = Fake(), threading.Event()
    ends: list[Callable[[], object]] = []

    async def quiet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await fake.handle(reader, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def live() -> None:
        ended, loop = asyncio.Event(), asyncio.get_running_loop()
        ends.append(lambda: loop.call_soon_threadsafe(ended.set))
        async with await asyncio.start_server(quiet, "127.0.0.1", 0) as server:
            fake.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
            up.set()
            await ended.wait()
            for task in asyncio.all_tasks() - {asyncio.current_task()}:
                task.cancel()

    thread = threading.Thread(target=lambda: asyncio.run(live()), daemon=True)
    thread.start()
    assert up.wait(10)
    try:
        yield fake
    finally:
        ends[0]()
        thread.join(10)
