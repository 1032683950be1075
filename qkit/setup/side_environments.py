"""Separate environments for programs that pin other versions than qkit does: `qkit doctor --make NAME` creates them, in the cache folder."""

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


DONE = "qkit-made"  # written last; an environment without it is recreated


@dataclass(frozen=True)
class Environment:
    """An environment: the requirements to install, and a module whose import shows that it works."""

    name: str
    requirements: tuple[str, ...]
    module: str


# llmcompressor 0.14 requires torch 2.10 to 2.14 and transformers 5.15 to 5.17: 1.5 GB with a CPU build of torch, 5.9 GB without.
ENVIRONMENTS = {
    environment.name: environment
    for environment in (Environment("llmcompressor", ("llmcompressor==0.14.0",), "llmcompressor"),)
}


def folder(name: str) -> Path:
    """Return the folder of an environment, whether it exists or not; other requirements mean another folder."""
    requirements = ENVIRONMENTS[name].requirements
    return cache_dir() / "environments" / "+".join(requirements).replace("==", "-")


def python_of(name: str) -> Path | None:
    """Return the interpreter of an environment; None if it has not been created."""
    home = folder(name)
    return target_of(home).venv_python if (home / DONE).is_file() else None


def command(name: str) -> str:
    """Return the command that creates an environment, for a message."""
    return shlex.join(["qkit", "doctor", "--make", name])


def make(name: str, notify: Callable[[str], None] = lambda _: None) -> Path:
    """Create an environment unless it exists; return its folder.

    Raises:
        RecipeError: there is no such environment.
        StageFailed: a step failed; its output is in the log file next to the folder.
    """
    if name not in ENVIRONMENTS:
        raise RecipeError(f"--make {name}: unknown environment; the environments are {', '.join(ENVIRONMENTS)}")
    from qkit.setup import bootstrap

    home = folder(name)
    if python_of(name) is None:
        shutil.rmtree(home, ignore_errors=True)
        home.parent.mkdir(parents=True, exist_ok=True)
        target = target_of(home)
        for step in itertools.chain(bootstrap.plan_venv(target), install_steps(target, name)):
            notify(f"{step.description} ...")
            _run(step.argv, home)
        (home / DONE).touch()
    return home


def target_of(home: Path) -> bootstrap.Target:
    """Describe the environment in the folder `home` for bootstrap."""
    from qkit.setup import bootstrap

    return bootstrap.Target(sys.platform, bootstrap.detect_kind(), home, sys.executable)


def install_steps(target: bootstrap.Target, name: str) -> Iterator[bootstrap.SetupStep]:
    """Yield the steps that fill an empty environment: torch in the build for the device, the requirements, and a test import."""
    from qkit.setup import bootstrap

    environment, pip = ENVIRONMENTS[name], [*target.pip, "install", "--quiet"]
    if target.cpu_torch and not bootstrap.torch_offered(target):
        index = ["--index-url", bootstrap.CPU_INDEX]
        yield bootstrap.SetupStep(f"installing {target.cpu_torch}", [*pip, *index, "--no-deps", target.cpu_torch])
    torch = [target.cpu_torch] if target.cpu_torch else []  # repeated here, or pip would upgrade to a CUDA build
    yield bootstrap.SetupStep(
        f"installing {', '.join(environment.requirements)}", [*pip, *torch, *environment.requirements]
    )
    yield bootstrap.SetupStep("testing the import", [*target.pip[:2], "-c", f"import {environment.module}"])


def _run(argv: Sequence[str], home: Path) -> None:
    log = home.with_name(f"{home.name}.log")
    with log.open("ab") as sink:
        done = subprocess.run(argv, stdin=subprocess.DEVNULL, stdout=sink, stderr=sink, check=False)
    if done.returncode:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-5:])
        raise StageFailed("doctor", home, log, f"`{shlex.join(argv)}` ended with status {done.returncode}:\n{tail}")
