"""Uploading: what would go, what is refused, and the upload itself to a hub that runs here."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from qkit.core.errors import MissingArtifact, ParityFailed, UserError
from qkit.report import push


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An export of a run whose gates held."""
    made = tmp_path / "run" / "export" / "vllm-w8a8"
    made.mkdir(parents=True)
    (made / "qkit.json").write_text("{}")
    (made / "config.json").write_text('{"a": 1}')
    (made / ".partial").write_text("not for others")
    judged(tmp_path, vllm="failed")
    return made


def judged(tmp_path: Path, **statuses: str) -> None:
    (tmp_path / "run" / "verify").mkdir(exist_ok=True)
    failed = [{"gate": "kl_mean", "figure": 0.2, "limit": 0.1}]
    entries = {
        name.replace("_", "-"): {"status": status, "failed": failed if status == "failed" else []}
        for name, status in statuses.items()
    }
    (tmp_path / "run" / "verify" / "parity.json").write_text(json.dumps({"parity": entries}))


def test_what_would_be_uploaded(folder: Path) -> None:
    upload = push.planned(folder, "me/model", private=True)
    assert upload.files == {"config.json": 8, "qkit.json": 2} and upload.total_bytes == 10
    assert "2 files to me/model (private)" in push.screen(upload)


@pytest.mark.parametrize("repo", ["model", "a/b/c", "../x", "me/"])
def test_a_repository_has_an_owner(folder: Path, repo: str) -> None:
    with pytest.raises(UserError, match="must be owner/name"):
        push.planned(folder, repo, private=False)


def test_without_provenance_it_is_refused(folder: Path) -> None:
    (folder / "qkit.json").unlink()
    with pytest.raises(MissingArtifact, match=r"qkit\.json is missing"):
        push.planned(folder, "me/model", private=False)
    assert push.planned(folder, "me/model", private=False, force=True).files == {"config.json": 8}
    with pytest.raises(MissingArtifact, match="no such folder"):
        push.planned(folder / "nothing", "me/model", private=False, force=True)


def test_answers_to_held_out_rows_stay_here(folder: Path) -> None:
    (folder / "candidates.json").write_text('{"texts": ["private"]}')
    assert set(push.planned(folder, "me/model", private=False).files) == {"config.json", "qkit.json"}


def test_a_gate_that_failed_with_other_weights_is_not_held_against_these(folder: Path, tmp_path: Path) -> None:
    judged(tmp_path, vllm_w8a8="failed")
    read, made = {"export/vllm-w8a8/config.json": "old"}, {"export/vllm-w8a8/config.json": {"sha256": "new"}}
    stages = {"verify": {"inputs": read, "outputs": {}}, "export": {"inputs": {}, "outputs": made}}
    (tmp_path / "run" / "run.json").write_text(json.dumps({"stages": stages}))
    assert push.planned(folder, "me/model", private=False).files
    made["export/vllm-w8a8/config.json"]["sha256"] = "old"
    (tmp_path / "run" / "run.json").write_text(json.dumps({"stages": stages}))
    with pytest.raises(ParityFailed, match="failed its gate"):
        push.planned(folder, "me/model", private=False)


def test_a_failed_gate_is_refused(folder: Path, tmp_path: Path) -> None:
    judged(tmp_path, vllm_w8a8="failed")
    with pytest.raises(ParityFailed, match="vllm-w8a8 failed its gate: mean KL") as caught:
        push.planned(folder, "me/model", private=False)
    assert (caught.value.artifact, caught.value.gate) == ("vllm-w8a8", "kl_mean")
    assert push.planned(folder, "me/model", private=False, force=True).files
    merge = tmp_path / "run" / "merge"
    merge.mkdir()
    (merge / "qkit.json").write_text("{}")
    assert push.planned(merge, "me/model", private=False).files
    judged(tmp_path, merged="failed")
    with pytest.raises(ParityFailed, match="merged failed its gate"):
        push.planned(merge, "me/model", private=False)


def test_a_dry_run_needs_no_network(folder: Path) -> None:
    argv = [sys.executable, "-m", "qkit", "push", str(folder), "me/model", "--private", "--dry-run", "--json"]
    done = subprocess.run(argv, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert (found["repo"], found["private"], found["url"], found["total_bytes"]) == ("me/model", True, None, 10)


# --- a hub that runs here ---------------------------------------------------------------------------------------------


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's API as small files need: everything comes in one commit."""

    @property
    def here(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}/me/model"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.seen.append((self.path, body.decode()))  # type: ignore[attr-defined]
        if "/preupload/" in self.path:
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]
            ]
            return self._answer({"files": files})
        if "/commit/" in self.path:
            return self._answer({"commitUrl": f"{self.here}/commit/{'0123' * 10}", "commitOid": "0123" * 10})
        return self._answer({"url": self.here, "name": "me/model", "id": "me/model"})

    def do_GET(self) -> None:
        self._answer({"name": "me", "type": "user", "sha": "0" * 40, "siblings": []})

    def _answer(self, value: Any) -> None:
        text = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[HTTPServer]:
    server = HTTPServer(("127.0.0.1", 0), Hub)
    server.seen = []  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_it_is_uploaded(folder: Path, hub: HTTPServer) -> None:
    """In a process of its own: huggingface_hub reads its endpoint when it is imported."""
    import os

    address = f"http://127.0.0.1:{hub.server_port}"
    env = {**os.environ, "HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0", "HF_TOKEN": "hf_not_a_token"}
    argv = [sys.executable, "-m", "qkit", "push", str(folder), "me/model", "--private"]
    done = subprocess.run(argv, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    seen: list[tuple[str, str]] = hub.seen  # type: ignore[attr-defined]
    created = json.loads(next(body for path, body in seen if path == "/api/repos/create"))
    assert created["name"] == "model" and (created.get("private") or created.get("visibility") == "private")
    commit = next(body for path, body in seen if "/commit/" in path)
    lines = [json.loads(line) for line in commit.splitlines()]
    assert sorted(line["value"]["path"] for line in lines if line["key"] == "file") == ["config.json", "qkit.json"]


def test_a_hub_that_is_not_there(folder: Path) -> None:
    import os

    env = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "1"}
    argv = [sys.executable, "-m", "qkit", "push", str(folder), "me/model"]
    done = subprocess.run(argv, capture_output=True, text=True, env=env)
    assert done.returncode == 2 and "hf auth login" in done.stderr and "Traceback" not in done.stderr
