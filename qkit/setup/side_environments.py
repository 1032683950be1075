"""Environments of their own for programs that pin other versions than qkit's: made by `qkit doctor --make NAME`, kept in the cache folder."""

from __future__ import annotations

import itertools
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qkit.core.errors import RecipeError, StageFailed
from qkit.core.sources import cache_dir

if TYPE_CHECKING:
    from qkit.setup import bootstrap


DONE = "qkit-made"  # written last: an environment that was interrupted is made anew


@dataclass(frozen=True)
class Environment:
    """What is installed into it, and the module that shows that it works."""

    name: str
    requirements: tuple[str, ...]
    module: str


# llmcompressor 0.14 takes torch 2.10 to 2.14 and transformers 5.15 to 5.17: 1.5 GB with a CPU build of torch, 5.9 GB without.
ENVIRONMENTS = {
    made.name: made for made in (Environment("llmcompressor", ("llmcompressor==0.14.0",), "llmcompressor"),)
}


def folder(name: str) -> Path:
    """Where it is, or would be: another set of requirements is another folder."""
    wanted = ENVIRONMENTS[name].requirements
    return cache_dir() / "environments" / "+".join(wanted).replace("==", "-")


def python_of(name: str) -> Path | None:
    """The interpreter of an environment that was made; None where there is none."""
    home = folder(name)
    return _target(home).venv_python if (home / DONE).is_file() else None


def command(name: str) -> str:
    """What makes it, for a message."""
    return shlex.join(["qkit", "doctor", "--make", name])


def make(name: str, say: Callable[[str], None] = lambda _: None) -> Path:
    """Make the environment; returns its folder. One that is there already is left as it is.

    Raises:
        RecipeError: there is no such environment.
        StageFailed: a step failed; its output is in the log beside the folder.
    """
    if name not in ENVIRONMENTS:
        raise RecipeError(f"--make {name}: there is {', '.join(ENVIRONMENTS)}")
    from qkit.setup import bootstrap

    home = folder(name)
    if python_of(name) is None:
        shutil.rmtree(home, ignore_errors=True)
        home.parent.mkdir(parents=True, exist_ok=True)
        target = _target(home)
        for step in itertools.chain(bootstrap.plan_venv(target), _install(target, name)):
            say(f"{step.what} ...")
            _run(step.argv, home)
        (home / DONE).touch()
    return home


def _target(home: Path) -> bootstrap.Target:
    from qkit.setup import bootstrap

    return bootstrap.Target(sys.platform, bootstrap.detect_kind(), home, sys.executable)


def _install(target: bootstrap.Target, name: str) -> Iterator[bootstrap.Step]:
    """The steps after the empty environment: torch in the build that suits the device, the rest, and whether it can be imported."""
    from qkit.setup import bootstrap

    made, pip = ENVIRONMENTS[name], [*target.pip, "install", "--quiet"]
    if target.cpu_torch and not bootstrap.torch_offered(target):
        index = ["--index-url", bootstrap.CPU_INDEX]
        yield bootstrap.Step(f"installing {target.cpu_torch}", [*pip, *index, "--no-deps", target.cpu_torch])
    torch = (
        [target.cpu_torch] if target.cpu_torch else []
    )  # named beside the rest, or pip takes a CUDA build for a newer one
    yield bootstrap.Step(f"installing {', '.join(made.requirements)}", [*pip, *torch, *made.requirements])
    yield bootstrap.Step("looking whether it can be used", [*target.pip[:2], "-c", f"import {made.module}"])


def _run(argv: Sequence[str], home: Path) -> None:
    log = home.with_name(f"{home.name}.log")
    with log.open("ab") as sink:
        done = subprocess.run(argv, stdin=subprocess.DEVNULL, stdout=sink, stderr=sink, check=False)
    if done.returncode:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-5:])
        raise StageFailed("doctor", home, log, f"`{shlex.join(argv)}` ended with status {done.returncode}:\n{tail}")
