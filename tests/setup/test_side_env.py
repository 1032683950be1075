"""Side environments: their commands, and that an interrupted one does not count as complete."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from qkit.core.errors import RecipeError, StageFailed
from qkit.setup import bootstrap, side_environments

NAME = "llmcompressor"


def test_the_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bootstrap, "detect_kind", lambda: "cpu")
    monkeypatch.setattr(bootstrap, "torch_offered", lambda target: sys.platform == "linux")
    target = side_environments.target_of(side_environments.folder(NAME))
    plain = [" ".join(step.argv[1:]) for step in side_environments.install_steps(target, NAME)]
    torch = "torch==2.13.0+cpu " if sys.platform == "linux" else ""
    assert plain == [f"-I -m pip install --quiet {torch}llmcompressor==0.14.0", "-I -c import llmcompressor"]
    monkeypatch.setattr(bootstrap, "torch_offered", lambda target: False)
    first = next(iter(side_environments.install_steps(target, NAME))).argv
    assert bootstrap.CPU_INDEX in first or sys.platform != "linux"


def test_a_failed_step_leaves_no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    step = bootstrap.SetupStep("breaking", [sys.executable, "-c", "import sys; sys.exit('no such package')"])
    monkeypatch.setattr(bootstrap, "plan_venv", lambda target: [step])
    messages: list[str] = []
    with pytest.raises(StageFailed, match="no such package"):
        side_environments.make(NAME, messages.append)
    assert messages == ["breaking ..."] and side_environments.python_of(NAME) is None


def test_an_environment_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    home = side_environments.folder(NAME)
    step = bootstrap.SetupStep("making", [sys.executable, "-c", f"import os; os.makedirs({str(home)!r})"])
    monkeypatch.setattr(bootstrap, "plan_venv", lambda target: [step])
    monkeypatch.setattr(side_environments, "install_steps", lambda target, name: [])
    messages: list[str] = []
    assert side_environments.make(NAME, messages.append) == side_environments.make(NAME, messages.append) == home
    assert messages == ["making ..."] and side_environments.python_of(NAME) is not None
    (home / side_environments.DONE).unlink()
    assert side_environments.python_of(NAME) is None


def test_an_unknown_one() -> None:
    with pytest.raises(RecipeError, match="the environments are llmcompressor"):
        side_environments.make("nothing")


def test_the_cache_is_where_it_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QKIT_CACHE", str(tmp_path))
    assert side_environments.folder(NAME) == tmp_path / "environments" / "llmcompressor-0.14.0"
