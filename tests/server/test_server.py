"""The door, and what is around a server: with a small program in vLLM's place, where what is asked is qkit's own."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, MutableMapping
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from qkit.core.device import Device
from qkit.core.errors import ServerError
from qkit.plan.sheet import Options, recipe_for
from qkit.recipe.schema import Serve
from qkit.runtimes import vllm
from qkit.serve import lifecycle, request
from qkit.serve import serving as serve_serving
from qkit.serve.request import Serving
from qkit.server import absence, admission, log_causes, process
from qkit.server.admission import Admission, Limits

# Answers, then does what LAST says: one ends with a cause, the other leaves a child behind that ignores SIGTERM, as an engine may.
PROGRAM = """
import http.server, os, signal, sys, threading, time
class Handler(http.server.BaseHTTPRequestHandler):
    def answer(self):
        self.send_response(200)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"{}")
    do_GET = do_POST = answer
    def log_message(self, *_):
        pass
print("started", flush=True)
server = http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler)
threading.Thread(target=server.serve_forever, daemon=True).start()
LAST
"""
DIES = "time.sleep(1); print('ValueError: [/odd] cause', flush=True); os._exit(1)"
LIVES = "os.fork() or signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"


def serving(tmp_path: Path, port: int = 0) -> Serving:
    recipe = recipe_for(Options("owner/name"), (f"serve.port={port}", "serve.drain_seconds=1"))
    device = Device("cpu", "a CPU", 24 << 30, 2)
    return Serving("owner/name", "name", recipe, device, tmp_path / "logs", "vllm", vllm.Extras())


def started(last: str) -> Callable[[Serving], process.Server]:
    def start(given: Serving) -> process.Server:
        port = given.section.port
        argv = (sys.executable, "-c", PROGRAM.replace("LAST", last), str(process.free_port(given.section)))
        return process.Server(process.Program("a program", argv), "name", given.section, port, given.log)

    return start


class Enough(Exception):
    """A test has seen what it wanted to."""


# --- ending by itself -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_log_of_every_start_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it died of the first time can be read when it runs for the second; each message tells of its own end."""
    monkeypatch.setattr(lifecycle, "start", started(DIES))
    monkeypatch.setattr(lifecycle, "BACK_OFF_SECONDS", (0.0,))
    told: list[str] = []

    def again(why: str, _: float) -> None:
        told.append(why)
        if len(told) == 2:
            raise Enough

    with pytest.raises(Enough):
        lifecycle.serve(serving(tmp_path), lambda _: None, lifecycle.watch, again)
    assert all("ValueError: [/odd] cause" in why for why in told)
    (log,) = (tmp_path / "logs").iterdir()
    assert str(log) in told[0] and log.read_text().count("ValueError") == 2


@pytest.mark.slow
def test_a_port_that_is_taken_in_between_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lifecycle, "start", started(DIES))
    monkeypatch.setattr(lifecycle, "BACK_OFF_SECONDS", (0.0,))
    told: list[str] = []
    with socket.socket() as taken:

        def again(why: str, _: float) -> None:
            told.append(why)
            if len(told) == 1:
                taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                taken.bind(("127.0.0.1", int(why.partition("serve-")[2].partition(".")[0])))
                taken.listen()
            elif len(told) == 2:
                taken.close()
            else:
                raise Enough

        with pytest.raises(Enough):
            lifecycle.serve(serving(tmp_path), lambda _: None, lifecycle.watch, again)
    assert "cannot listen on" in told[1] and "ValueError" in told[2]


def test_waits_grow_until_a_server_has_run_steadily() -> None:
    backoff = lifecycle.Backoff()
    assert [backoff.next_pause(uptime) for uptime in (1, 0, 0)] == [1.0, 2.0, 4.0]
    assert [backoff.next_pause(0) for _ in range(9)][-1] == 60.0
    assert [backoff.next_pause(uptime) for uptime in (lifecycle.STEADY_SECONDS + 1, 1)] == [1.0, 2.0]


@pytest.mark.slow
def test_a_killed_server_is_seen_before_its_children_are_tidied_up(tmp_path: Path) -> None:
    fixed = serving(tmp_path, process.free_port(Serve(port=0)))
    fixed.logs.mkdir()
    running = started(LIVES)(fixed)
    try:
        running.wait()
        (own,) = running.processes
        assert not running.ended()
        os.kill(own.pid, signal.SIGKILL)
        deadline = time.monotonic() + 10
        while not running.ended():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert running.child.running()  # the guard is still at it
        assert "killed from outside" in running.ending()
    finally:
        running.stop()


def test_a_start_that_the_system_kills_is_explained() -> None:
    said = (
        "RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {'EngineCore': -9}"
    )
    assert "out-of-memory killer" in log_causes.explain(f"INFO loading\n{said}")
    assert "illegal instruction" in log_causes.explain(said.replace("-9", "-4"))


# --- options that qkit gives itself -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rest", "how"),
    [
        (("--host", "0.0.0.0"), "serve.host"),
        (("--dtype", "float32", "--hos=0.0.0.0"), "serve.host"),
        (("--port=9000",), "serve.port"),
        (("--api_key", "a-secret"), "--api-key-file"),
        (("--api-key=a-secret",), "--api-key-file"),
        (("--served-model-name", "x"), "--name"),
        (("--uds", "/tmp/s"), "serve.port"),
    ],
)
def test_what_would_be_obeyed_by_vllm_alone(rest: tuple[str, ...], how: str) -> None:
    with pytest.raises(ServerError, match=how) as caught:
        serve_serving.refuse_reserved(rest)
    assert "a-secret" not in str(caught.value)


def test_other_options_are_handed_on() -> None:
    serve_serving.refuse_reserved(
        ("--seed", "1", "--enforce-eager", "--max-model-len", "512", "-tp", "2", "--hf-overrides", "{}")
    )


# --- the door -----------------------------------------------------------------------------------------------------------


class Asking:
    """An application behind the door that answers when it is told to."""

    def __init__(self, **limits: Any):
        self.go = asyncio.Event()
        self.door = Admission(self.app, Limits(**limits))
        self.sent: list[MutableMapping[str, Any]] = []

    async def app(self, scope: Any, receive: Any, send: Any) -> None:
        await self.go.wait()

    async def ask(self, kind: str = "http", path: str = "/v1/realtime", headers: Any = ()) -> None:
        async def receive() -> MutableMapping[str, Any]:
            return {}

        async def send(message: MutableMapping[str, Any]) -> None:
            self.sent.append(message)

        await self.door({"type": kind, "path": path, "method": "POST", "headers": list(headers)}, receive, send)


@pytest.mark.parametrize(
    ("sent", "handed_on"),
    [
        ({"tools": [], "stop": []}, {"stop": []}),
        ({"tools": [], "tool_choice": "auto"}, {}),
        ({"tools": [], "tool_choice": "required"}, {"tool_choice": "required"}),
        ({"messages": [{"role": "user", "name": None}]}, {"messages": [{"role": "user"}]}),
        ({"messages": [{"role": "user", "name": "é"}], "tools": []}, {"messages": [{"role": "user", "name": "é"}]}),
    ],
)
def test_what_says_nothing_is_taken_out(sent: dict[str, Any], handed_on: dict[str, Any]) -> None:
    assert json.loads(absence.remove_empty(json.dumps(sent).encode())) == handed_on


@pytest.mark.parametrize(
    "body",
    [
        b'{"messages": [{"content": "\\"tools\\": []"}]}',
        b'{"tools": [{"name": "f"}], "a": 1e999}',
        b'{"tools": [], ',
        b'[{"tools": []}]',
        b'{"metadata": {"tools": []},  "tools": null}',
        b'{"tools": [], "a": 1e999}',
        b"\xff",
        b"",
    ],
)
def test_other_bodies_are_handed_on_to_the_byte(body: bytes) -> None:
    assert absence.remove_empty(body) == body


def test_a_body_in_pieces_is_one_request_and_a_client_that_goes_is_heard_of() -> None:
    events = [
        {"type": "http.request", "body": b'{"tools"', "more_body": True},
        {"type": "http.request", "body": b": []}", "more_body": False},
        {"type": "http.disconnect"},
    ]

    async def asked(events: list[Any]) -> list[Any]:
        async def receive() -> Any:
            return events.pop(0)

        again = await absence.receive_cleaned(receive)
        return [await again() for _ in range(1 + len(events))]

    assert asyncio.run(asked(list(events))) == [
        {"type": "http.request", "body": b"{}", "more_body": False},
        {"type": "http.disconnect"},
    ]
    assert asyncio.run(asked([events[0], events[2]])) == [{"type": "http.disconnect"}]


@pytest.mark.parametrize(
    "headers", [[(b"transfer-encoding", b"chunked")], [(b"transfer-encoding", b"chunked"), (b"content-length", b"2")]]
)
def test_a_body_without_a_length_that_counts(headers: Any) -> None:
    async def asked() -> Asking:
        asking = Asking(max_body_bytes=10)
        await asking.ask(headers=headers)
        return asking

    assert asyncio.run(asked()).sent[0]["status"] == 411


def test_a_websocket_counts_and_is_refused_as_a_request_is(tmp_path: Path) -> None:
    async def asked() -> None:
        asking = Asking(max_requests=1, drain_file=str(tmp_path / "drain"))
        open_one = asyncio.create_task(asking.ask("websocket"))
        await asyncio.sleep(0)
        assert asking.door.in_flight == 1
        await asking.ask("websocket")
        assert [message["type"] for message in asking.sent] == ["websocket.close"]
        asking.go.set()
        await open_one
        assert asking.door.in_flight == 0
        (tmp_path / "drain").touch()
        await asking.ask("websocket")
        assert [message["type"] for message in asking.sent] == ["websocket.close"] * 2
        keyed = Asking(key="a-key")
        await keyed.ask("websocket")
        assert keyed.sent[0]["code"] == admission.POLICY_VIOLATION

    asyncio.run(asked())


@pytest.mark.slow
def test_a_server_too_busy_to_answer_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It listens and says nothing for a while, as one does whose event loop is at work; and a proxy is not asked in its place."""
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    told = iter((2.5, 0.0))

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            time.sleep(next(told))
            self.send_error(503)

    busy = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=busy.serve_forever, daemon=True)
    thread.start()
    url = f"http://127.0.0.1:{busy.server_port}"
    assert admission.drain(url, tmp_path / "drain", 0.0) == 1
    busy.shutdown()
    busy.server_close()
    assert admission.drain(url, tmp_path / "drain", 5.0) == 0  # nobody listens any more


def test_a_run_that_cannot_be_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from helpers.sample import a_run

    run = a_run(tmp_path, vllm="passed")
    asked = request.ServeOptions(name="sql")
    assert serve_serving.of_run(run, asked).log == run.root / "logs" / f"serve-{run.recipe.serve.port}.log"
    monkeypatch.setenv("QKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != run.root)
    made = serve_serving.of_run(run, asked)
    assert made.log.parent == tmp_path / "cache" / "logs" and made.names == ["sql"]
    assert (
        lifecycle.argv(replace(made, model="m"), 1)[lifecycle.argv(made, 1).index("--served-model-name") + 1] == "sql"
    )
