"""The tests' own place: fixtures of every scope, and the processes they start, see it, and nobody's own cache is written to."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.paths import ROOT
from qkit.core.device import detect
from qkit.core.sources import cache_dir
from qkit.run.directory import Run

SEEN = ("QKIT_CACHE", "QKIT_DEVICE", "HF_HUB_OFFLINE")
# What a fixture of the session sees, and a process that it starts: the file is run by a pytest of its own.
PROBE = """
import os, subprocess, sys
import pytest

@pytest.fixture(scope="session")
def place():
    from qkit.core.sources import cache_dir
    (cache_dir() / "touched").parent.mkdir(parents=True, exist_ok=True)
    (cache_dir() / "touched").touch()
    code = "from qkit.core.sources import cache_dir; print(cache_dir())"
    return str(cache_dir()), subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()

def test_it(place):
    assert place[0] == place[1] == os.environ["QKIT_CACHE"]
    assert os.environ["QKIT_DEVICE"] == "cpu" and os.environ["HF_HUB_OFFLINE"] == "1"
    assert os.environ.get("QKIT_DRAIN_FILE") is None and os.environ.get("HF_TOKEN") is None
"""


@pytest.fixture(scope="session")
def seen_by_the_session() -> dict[str, str | None]:
    return {name: os.environ.get(name) for name in SEEN}


def test_a_session_fixture_sees_what_a_test_sees(seen_by_the_session: dict[str, str | None]) -> None:
    assert seen_by_the_session == {name: os.environ.get(name) for name in SEEN}
    assert (seen_by_the_session["QKIT_DEVICE"], seen_by_the_session["HF_HUB_OFFLINE"]) == ("cpu", "1")
    assert detect().kind == "cpu"


def test_the_hub_is_off_for_the_libraries_too() -> None:
    """They read the setting when they are imported, which test modules do before any fixture."""
    from huggingface_hub import constants

    assert constants.HF_HUB_OFFLINE


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_nothing_is_written_to_the_users_cache(tmp_path: Path, workers: int) -> None:
    """With settings of the user's own, and a home of the test's; in xdist's workers as well."""
    home, folder = tmp_path / "home", tmp_path / "probe"
    for made in (home, folder):
        made.mkdir()
    (folder / "test_probe.py").write_text(PROBE, encoding="utf-8")
    own = {"HOME": str(home), "QKIT_CACHE": str(home / "mine"), "QKIT_DEVICE": "cuda", "HF_HUB_OFFLINE": "0"}
    own |= {"QKIT_DRAIN_FILE": "x", "HF_TOKEN": "hf_mine", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "conftest", "-n", str(workers)]
    command += ["--rootdir", str(folder), "--override-ini", "testpaths=", str(folder / "test_probe.py")]
    done = subprocess.run(command, cwd=folder, env={**os.environ, **own}, capture_output=True, text=True)
    assert done.returncode == 0 and "1 passed" in done.stdout, done.stdout + done.stderr
    assert not list(home.iterdir())


@pytest.mark.slow
def test_a_run_of_the_session_leaves_its_speed_here(trained_run: Run) -> None:
    """Training notes how fast this machine is: a plan that is made later for a real model must not take a tiny one's figure."""
    assert trained_run.folder("merge").exists()
    assert (cache_dir() / "speed.json").exists() and cache_dir() == Path(os.environ["QKIT_CACHE"])
    assert not cache_dir().is_relative_to(Path.home() / ".cache")
