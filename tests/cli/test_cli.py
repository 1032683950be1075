from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from qkit.run.stages import STAGES

VERBS = ["init", "doctor", "plan", "inspect", "run", "show", "chat", "ls", "rm", "gc", *STAGES]


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_with_an_example(verb: str) -> None:
    done = subprocess.run([sys.executable, "-m", "qkit", verb, "--help"], capture_output=True, text=True, check=True)
    assert f"Example: qkit {verb}" in done.stdout


def test_version() -> None:
    from qkit import __version__

    done = subprocess.run([sys.executable, "-m", "qkit", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == __version__


def test_plan_and_help_do_not_load_the_world(tmp_path: Path) -> None:
    """Not a timed test: memory tells whether torch came along, whatever else the machine does."""
    for arguments in (["--help"], ["plan", "recipes/llama-3.1-8b-24gb.yaml", "--memory", "24GiB"]):
        code = (
            "import resource, subprocess, sys\n"
            f"subprocess.run([sys.executable, '-m', 'qkit', *{arguments!r}], check=True, stdout=subprocess.DEVNULL)\n"
            "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert int(done.stdout) * (1 if sys.platform == "darwin" else 1024) < 120e6


def test_plan_refuses_what_does_not_fit() -> None:
    arguments = [sys.executable, "-m", "qkit", "plan", "recipes/llama-3.1-8b-24gb.yaml", "--memory", "4GiB", "--json"]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and json.loads(done.stdout)["fits"] is False


@pytest.mark.parametrize(("system", "serves"), [("Linux", True), ("Darwin", False)])
def test_the_quickstart_of_each_system(system: str, serves: bool) -> None:
    """What `make quickstart` would run, as far as its recipe: without vLLM there is nothing to serve."""
    from qkit.recipe.load import load
    from qkit.run.stages import stages_of

    done = subprocess.run(
        ["make", "--no-print-directory", "-n", "quickstart", f"SYSTEM={system}"],
        capture_output=True,
        text=True,
        check=True,
    )
    words = shlex.split(done.stdout.splitlines()[-1])
    recipe = load(Path(words[2]), [words[i + 1] for i, word in enumerate(words) if word == "--set"])
    assert ("serve" in {stage.name for stage in stages_of(recipe)}) is serves


def test_out_is_refused_where_it_would_do_nothing(tiny_recipe: Path, tmp_path: Path) -> None:
    """A run's stages write into the run; a folder that is asked for and never made would be looked for in vain."""
    from qkit.recipe.load import load
    from qkit.run.directory import Run

    Run.create(tmp_path / "run", load(tiny_recipe))
    command = [sys.executable, "-m", "qkit", "merge", str(tmp_path / "run"), "--out", str(tmp_path / "elsewhere")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and f"its merged model is {tmp_path / 'run' / 'merge'}" in done.stderr.replace("\n", "")
