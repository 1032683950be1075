"""serve/nginx.conf and serve/envoy.yaml by the programs themselves, in front of two servers that have qkit's door.

Envoy comes as a Python package; nginx is asked where it is installed. What the files are changed in here is addresses and folders.
"""

from __future__ import annotations

import asyncio
import getpass
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from helpers.command import tool
from helpers.paths import SERVE
from qkit.recipe.schema import Serve
from qkit.server.admission import KEEP_ALIVE_SECONDS, Admission, Limits
from qkit.server.process import free_port

pytestmark = pytest.mark.slow

TOKENS, GAP = 5, 0.25  # of an answer, and seconds between two of them
BURST, STREAMS = 20, 16  # what both files let one client send at once; nginx.conf: and hold open
CHAT = "/v1/chat/completions"


@dataclass
class Backend:
    """An application behind the door that `qkit serve` puts before vLLM: it answers with a stream and remembers what reached it."""

    port: int
    drain: Path
    paths: list[str] = field(default_factory=list)
    sent: list[float] = field(default_factory=list)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] == "/health":
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body"})
            return
        self.paths.append(scope["path"])
        while (await receive()).get("more_body"):
            pass
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
        for number in range(TOKENS):
            self.sent.append(time.monotonic())
            await send({"type": "http.response.body", "body": b"data: %d\n\n" % number, "more_body": True})
            await asyncio.sleep(GAP)
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})


@dataclass
class Proxy:
    """One of the two programs, and what is behind it."""

    name: str
    client: Callable[[], httpx.Client]
    backends: tuple[Backend, Backend]

    def reached(self) -> list[str]:
        return [path for backend in self.backends for path in backend.paths]


@contextmanager
def backend(folder: Path) -> Iterator[Backend]:
    uvicorn = pytest.importorskip("uvicorn")
    made = Backend(free_port(Serve(port=0)), folder / "drain")
    door = Admission(made, Limits(drain_file=str(made.drain), max_requests=256))
    server = uvicorn.Server(uvicorn.Config(door, host="127.0.0.1", port=made.port, log_level="error", lifespan="off"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        yield made
    finally:
        server.should_exit = True
        thread.join()


def changed(text: str, **replacements: str) -> str:
    for old, new in replacements.items():
        assert old in text, old
        text = text.replace(old, new)
    return text


def nginx_command(folder: Path, port: int, ports: tuple[int, int]) -> list[str]:
    program = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
    if program is None:
        pytest.skip("nginx is not installed")
    paths = "".join(
        f"    {kind}_temp_path {folder}/{kind};\n" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    text = changed(
        (SERVE / "nginx.conf").read_text(encoding="utf-8"),
        **{
            "http {\n": f"http {{\n    access_log off;\n{paths}",
            "listen 8443": f"listen 127.0.0.1:{port}",
            "/etc/nginx/tls": str(folder),
            "127.0.0.1:8000": f"127.0.0.1:{ports[0]}",
            "# server 127.0.0.1:8001": f"server 127.0.0.1:{ports[1]}",
        },
    )
    head = f"daemon off;\nuser {getpass.getuser()};\npid {folder}/pid;\nerror_log {folder}/error.log;\n"
    (folder / "nginx.conf").write_text(head + text, encoding="utf-8")
    return [program, "-p", str(folder), "-e", str(folder / "error.log"), "-c", str(folder / "nginx.conf")]


def envoy_command(folder: Path, port: int, ports: tuple[int, int]) -> list[str]:
    program = tool("envoy")
    text = changed(
        (SERVE / "envoy.yaml").read_text(encoding="utf-8"),
        **{
            "address: 0.0.0.0, port_value: 8443": f"address: 127.0.0.1, port_value: {port}",
            "/etc/envoy/tls": str(folder),
            "port_value: 8000": f"port_value: {ports[0]}",
            "        # - endpoint:\n        #     address:\n        #       ": "        - endpoint:\n            address:\n              ",
            "port_value: 8001": f"port_value: {ports[1]}",
        },
    )
    (folder / "envoy.yaml").write_text(text, encoding="utf-8")
    return [program, "-c", str(folder / "envoy.yaml"), "--use-dynamic-base-id", "--concurrency", "2", "-l", "warning"]


PROGRAMS = {"nginx": nginx_command, "envoy": envoy_command}


@pytest.fixture(scope="module", params=PROGRAMS)
def running(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    port, name = free_port(Serve(port=0)), request.param
    folder = tmp_path_factory.mktemp(name)
    (folder / "a").mkdir()
    (folder / "b").mkdir()
    with backend(folder / "a") as one, backend(folder / "b") as two:
        command = PROGRAMS[name](folder, port, (one.port, two.port))
        certificate(folder)
        with (folder / "log").open("wb") as log:
            process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        try:
            found = Proxy(
                name, lambda: httpx.Client(base_url=f"https://127.0.0.1:{port}", verify=False, timeout=30), (one, two)
            )
            wait_until_ready(found, process, folder / "log")
            yield found
        finally:
            process.terminate()
            process.wait(timeout=30)


@pytest.fixture
def proxy(running: Proxy) -> Proxy:
    """With nothing in its servers' memory, and nothing held against this client."""
    time.sleep(BURST / 10)
    for backend in running.backends:
        backend.paths.clear()
        backend.sent.clear()
    return running


def certificate(folder: Path) -> None:
    pair = ("-keyout", folder / "server.key", "-out", folder / "server.crt")
    command = [
        tool("openssl"),
        "req",
        "-x509",
        "-newkey",
        "rsa:2048",
        "-nodes",
        *pair,
        "-days",
        "1",
        "-subj",
        "/CN=localhost",
    ]
    subprocess.run(command, check=True, capture_output=True)


def wait_until_ready(proxy: Proxy, process: subprocess.Popen[bytes], log: Path) -> None:
    """Both servers are taken for healthy once each has been reached."""
    deadline = time.monotonic() + 30
    while not all(backend.paths for backend in proxy.backends):
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.3)
        try:
            with proxy.client() as client:
                client.post(CHAT, json={})
        except httpx.TransportError:
            continue


def test_tokens_go_out_as_they_come(proxy: Proxy) -> None:
    with proxy.client() as client, client.stream("POST", CHAT, json={"stream": True}) as answer:
        assert answer.status_code == 200
        came = [(time.monotonic(), line) for line in answer.iter_lines() if line]
    assert [line for _, line in came] == [*(f"data: {number}" for number in range(TOKENS)), "data: [DONE]"]
    sent = [at for backend in proxy.backends for at in backend.sent]
    for (at, _), was_sent, next_one in zip(came[: TOKENS - 1], sent, sent[1:], strict=False):
        assert was_sent <= at < next_one  # before the server had another one


def test_a_body_beyond_the_limit_does_not_reach_the_server(proxy: Proxy) -> None:
    with proxy.client() as client:
        assert client.post(CHAT, content=b"x" * (3 << 20)).status_code == 200
        assert client.post(CHAT, content=b"x" * (5 << 20)).status_code == 413
    assert proxy.reached() == [CHAT]


def test_what_is_for_inside_only(proxy: Proxy) -> None:
    adapters = (
        "load_lora_adapter",
        "unload_lora_adapter",
        "%6coad_lora_adapter",
        "/load_lora_adapter",
        "x/../load_lora_adapter",
    )
    with proxy.client() as client:
        for name in adapters:
            url = httpx.URL(str(client.base_url).rstrip("/")).copy_with(raw_path=f"/v1/{name}".encode())
            assert client.post(url, json={}).status_code == 403, name
        for path in ("/metrics", "/tokenize", "/invocations", "/", "/v2/models"):
            assert client.get(path).status_code == 404, path
        escaped = httpx.URL(str(client.base_url).rstrip("/")).copy_with(raw_path=b"/v1%2Fload_lora_adapter")
        assert client.post(escaped, json={}).status_code in (400, 403)
    assert proxy.reached() == []


def test_a_draining_server_is_left_alone(proxy: Proxy) -> None:
    drains, other = proxy.backends
    drains.drain.touch()
    try:
        with proxy.client() as client:
            answers = [client.post(CHAT, json={}) for _ in range(4)]
    finally:
        drains.drain.unlink()
    assert [answer.status_code for answer in answers] == [200] * 4
    assert (len(drains.paths), len(other.paths)) == (0, 4)


async def statuses(proxy: Proxy, number: int) -> list[int]:
    with proxy.client() as client:
        base = client.base_url
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=base, verify=False, limits=limits, timeout=30) as client:
        answers = await asyncio.gather(*(client.post(CHAT, json={}) for _ in range(number)))
    return [answer.status_code for answer in answers]


def test_one_client_has_limits(proxy: Proxy) -> None:
    found = asyncio.run(statuses(proxy, 3 * BURST))
    assert set(found) == {200, 429}
    most = STREAMS if proxy.name == "nginx" else BURST + 10  # what the bucket is filled with meanwhile
    assert STREAMS <= found.count(200) <= most


@pytest.mark.parametrize(
    ("name", "idle"), [("nginx.conf", r"keepalive_timeout (\d+)s;"), ("envoy.yaml", r"options: {idle_timeout: (\d+)s}")]
)
def test_the_proxy_lets_go_of_a_connection_before_the_server_does(name: str, idle: str) -> None:
    (seconds,) = re.findall(idle, (SERVE / name).read_text(encoding="utf-8"))
    assert int(seconds) + 10 <= KEEP_ALIVE_SECONDS
