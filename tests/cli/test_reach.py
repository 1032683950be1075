"""Hubs and servers that are not there, hang up, or answer with something else: one message each time, whoever asks."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from helpers.hub import FAULTS, failing
from helpers.sample import open_sample
from helpers.sse import serving
from qkit.bench import any_server
from qkit.bench.tool import COMPLETIONS
from qkit.commands import compare
from qkit.commands.talk import targets
from qkit.commands.talk.job import Job
from qkit.core.errors import ModelError, ServerError, UserError
from qkit.core.files import write_json
from qkit.core.network import reaching
from qkit.core.progress import Progress
from qkit.measure import endpoint
from qkit.run.directory import Run
from qkit.server import adapters, admission
from qkit.server.client import Client, bearer, model_entries, root_url, running_server

# --- servers ----------------------------------------------------------------------------------------------------------


def bench(url: str, run: Run) -> Any:
    return any_server.run(any_server.BenchTarget(url, None, "t"), run.root, Progress())


def bench_of_a_name(url: str, run: Run) -> Any:
    return any_server.accepted_parameters(url, COMPLETIONS, "m")


def verify(url: str, run: Run) -> Any:
    return endpoint.ServerSubject(url, None)


def stop_tokens(url: str, run: Run) -> Any:
    """A server that goes wrong once it has been found."""
    asked = object.__new__(endpoint.ServerSubject)
    asked.model, asked.client, asked.described = "m", Client(url, timeout=2.0), {"id": "m"}
    return asked.stops_at([1], 2)


def compared(url: str, run: Run) -> Any:
    return compare.served_name(url)


def compared_later(url: str, run: Run) -> Any:
    from qkit.plugins.runtime import open_runtime

    running = {"url": url, "model": "m", "pid": 1, "startup_seconds": 0.0}
    with open_runtime("vllm", Path(), None, running=running) as opened:  # type: ignore[arg-type]
        return opened.generate([[1]], 1, frozenset())


def listed(url: str, run: Run) -> Any:
    return adapters.Endpoint(url).list()


def talked_to(url: str, run: Run) -> Any:
    return targets.opened(Job(url))


ASKING = (bench, bench_of_a_name, verify, stop_tokens, compared, compared_later, listed, talked_to)


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("ask", ASKING, ids=lambda ask: ask.__name__)
def test_a_server_that_fails_is_one_message(ask: Callable[[str, Run], Any], fault: str, tmp_path: Path) -> None:
    run = open_sample(tmp_path)
    with failing(fault) as url:
        if ask is bench_of_a_name and fault not in ("refused", "reset", "no HTTP"):
            assert ask(url, run)  # 200 is all that it asks for; the load finds out the rest
            return
        with pytest.raises(ServerError) as caught:
            ask(url, run)
    assert caught.value.url == url and url in str(caught.value)
    assert caught.value.reason and caught.value.status is None
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "http://[", "ftp://127.0.0.1:1", "http://127.0.0.1:99999"])
@pytest.mark.parametrize("ask", [bench, verify, listed], ids=lambda ask: ask.__name__)
def test_an_address_that_is_none_is_one_message(ask: Callable[[str, Run], Any], url: str, tmp_path: Path) -> None:
    with pytest.raises(ServerError) as caught:
        ask(url, open_sample(tmp_path))
    assert caught.value.url == url and caught.value.reason


def test_a_server_that_says_nothing_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(any_server, "PROBE_SECONDS", 0.3)
    monkeypatch.setattr(endpoint, "REQUEST_SECONDS", 0.3)
    for ask in (bench_of_a_name, verify):
        with failing("silent") as url, pytest.raises(ServerError, match="ReadTimeout"):
            ask(url, open_sample(tmp_path / ask.__name__))


@pytest.mark.parametrize("fault", FAULTS)
def test_health_is_asked_of_anybody(fault: str, tmp_path: Path) -> None:
    """What is not healthy is no error: a port may have become somebody else's."""
    import os

    run = open_sample(tmp_path)
    (run.root / ".work" / "serve").mkdir(parents=True)
    with failing(fault) as url, Client(url, timeout=2.0) as client:
        write_json(run.root / ".work" / "serve" / "server.json", {"url": url, "pid": os.getpid()})
        answers = fault not in ("refused", "reset", "no HTTP")
        assert client.is_healthy() is answers
        assert bool(running_server(run)) is answers


@pytest.mark.parametrize(("fault", "left"), [("refused", 0), ("reset", 0), ("no HTTP", 0), ("page", 1)])
def test_a_drain_ends_whoever_answers(fault: str, left: int, tmp_path: Path) -> None:
    """A port that has become somebody else's; one that answers 200 is a server that has not heard of it yet."""
    with failing(fault) as url:
        assert admission.drain(url, tmp_path / "drain", 0.0) == left


@pytest.mark.parametrize(
    ("answer", "left"), [(b'{"in_flight": 3}', 3), (b"", 0), (b"<html>", 0), (b"[1]", 0), (b'{"in_flight": null}', 0)]
)
def test_what_a_draining_server_says(answer: bytes, left: int, tmp_path: Path) -> None:
    class Draining(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(503)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Draining) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        assert admission.drain(url, tmp_path / "drain", 0.0) == left
        server.shutdown()


# --- the hub ----------------------------------------------------------------------------------------------------------

# Asked in a process of its own, as the hub's client reads its address when it is imported.
HUB = """
import sys
from pathlib import Path
from qkit.core.errors import UserError
from qkit.data import read
from qkit.model import config, source, tokenizer
from qkit.recipe import schema
from qkit.report import push
for ask in (
    lambda: push.push(push.Upload(Path(sys.argv[1]), "me/model", False, {})),
    lambda: source._from_hub("org/none", None, ["*.json"]),
    lambda: tokenizer.tokenizer_of(schema.Model(source="org/none")),
    lambda: config._hub_config("org/none", None),
    lambda: list(read._from_hub("org/none", schema.Source(source="org/none"))),
    lambda: list(read._from_hub("org/none", schema.Source(source="org/none", streaming=True))),
):
    try:
        ask()
    except UserError as error:
        print(type(error).__name__, len(str(error).splitlines()), len(str(error)))
"""
KINDS = ["UserError", "ModelError", "ModelError", "ModelError", "DataError", "DataError"]


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["offline", "reset", "list"])
def test_a_hub_that_fails_is_one_message(fault: str, tmp_path: Path) -> None:
    import os

    (tmp_path / "model").mkdir()
    with failing("refused" if fault == "offline" else fault) as url:
        told = {"HF_ENDPOINT": url, "HF_HUB_OFFLINE": str(int(fault == "offline")), "HF_HOME": str(tmp_path / "hf")}
        argv = [sys.executable, "-c", HUB, str(tmp_path / "model")]
        done = subprocess.run(argv, capture_output=True, text=True, env={**os.environ, **told, "HF_TOKEN": "x"})
    assert done.returncode == 0, done.stderr
    found = [line.split() for line in done.stdout.splitlines()]
    assert [kind for kind, *_ in found] == KINDS
    assert all(int(lines) == 1 and int(length) < 700 for _, lines, length in found)


@pytest.mark.slow
def test_a_hub_that_says_nothing_is_given_up(tmp_path: Path) -> None:
    import os

    with failing("silent") as url:
        told = {"HF_ENDPOINT": url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path), "HF_TOKEN": "x"}
        code = f"from qkit.core import network; network.HUB_SECONDS = 0.5\n{HUB.partition('lambda: source')[0]}):{HUB.partition('):')[2]}"
        argv = [sys.executable, "-c", code, str(tmp_path)]
        done = subprocess.run(argv, capture_output=True, text=True, env={**os.environ, **told}, timeout=60)
    assert done.stdout.startswith("UserError 1 "), done.stderr


# --- by itself --------------------------------------------------------------------------------------------------------


def test_our_own_errors_stay_what_they_are() -> None:
    with pytest.raises(ModelError, match=r"^mine$"), reaching(ServerError, "a", "b"):
        raise ModelError("mine")


def test_an_error_without_words_is_named() -> None:
    with pytest.raises(UserError, match=r"^asked \(TimeoutError\); wait$"), reaching(UserError, "asked", "wait"):
        raise TimeoutError


@pytest.mark.parametrize("document", [None, [], {}, {"data": None}, {"data": [1]}, {"data": [{"id": 3}]}, {"data": {}}])
def test_what_is_no_list_of_models(document: Any) -> None:
    with pytest.raises(ValueError, match=r"is missing|not a list of models"):
        model_entries(document)


@pytest.mark.parametrize("url", ["http://h:1", "http://h:1/", "http://h:1/v1", "http://h:1/v1/"])
def test_every_spelling_of_an_address_is_one_server(url: str) -> None:
    assert root_url(url) == "http://h:1"
    with Client(url, bearer("a-key")) as client:
        assert client.url == "http://h:1"


def test_a_refused_request_tells_its_status_and_the_answer() -> None:
    with serving() as fake, Client(fake.url) as client:
        with pytest.raises(ServerError) as caught:
            client.request("POST", "/no/such/path", {})
        assert caught.value.url == fake.url and caught.value.status == client.send("POST", "/no/such/path").status_code
