"""Finds out what this machine and environment can do, by running it: `examine` returns a report, which screen.py formats.

Each trial is a process of its own, so that a package that crashes the interpreter is reported too. All run at the same time.
"""

from __future__ import annotations

import importlib.util
import platform
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from typing import Literal

from qkit.core.device import Device, detect
from qkit.core.sources import cache_dir
from qkit.setup import bootstrap

Status = Literal["ok", "missing", "broken"]


PACKAGES = {  # package: the extra that installs it
    "torch": "train",
    "transformers": "train",
    "peft": "train",
    "bitsandbytes": "train",
    "trl": "train",
    "datasets": "train",
    "accelerate": "train",
    "onnx": "onnx",
    "onnxruntime": "onnx",
    "onnxruntime-genai": "onnx",
    "httpx": "bench",
}
TRIAL_SECONDS = 120.0
NF4_ERROR = (
    0.12  # mean |error| / mean |weight|; on normally distributed weights NF4 has 0.09, and a wrong layout more than 1
)


@dataclass(frozen=True)
class DoctorCheck:
    """The result of one trial. `remedy` is the command that fixes the problem; empty if there is no problem, or no such command."""

    name: str
    status: Status
    detail: str
    remedy: str = ""


@dataclass(frozen=True)
class Package:
    """A package: `version` is None if it is not installed; `extra` is the extra of qkit that lists it."""

    name: str
    version: str | None
    extra: str


@dataclass(frozen=True)
class Report:
    """What `qkit doctor` reports. `memory_free_bytes` is of the machine's main memory, even if there is a GPU."""

    python: str
    executable: str
    platform: str
    device: Device
    memory_free_bytes: int
    disk: str
    disk_free_bytes: int
    packages: tuple[Package, ...]
    checks: tuple[DoctorCheck, ...]

    @property
    def broken(self) -> bool:
        """Whether something is installed that does not work, which is worse than something missing."""
        return any(check.status == "broken" for check in self.checks)


def examine() -> Report:
    """Examine machine and environment. Takes a few seconds, mostly to import torch."""
    import psutil

    device = detect()
    disk = next(folder for folder in (cache_dir(), *cache_dir().parents) if folder.exists())
    return Report(
        python=platform.python_version(),
        executable=sys.executable,
        platform=platform.platform(),
        device=device,
        memory_free_bytes=int(psutil.virtual_memory().available),
        disk=str(disk),
        disk_free_bytes=shutil.disk_usage(disk).free,
        packages=tuple(Package(name, version_of(name), extra) for name, extra in packages(device).items()),
        checks=(*try_all(), check_vllm(device)),
    )


def packages(device: Device) -> dict[str, str]:
    """Return the packages to report on this device, each with its extra."""
    vllm = bootstrap.VLLM[device.kind]
    return {**PACKAGES, vllm: vllm}


def version_of(name: str) -> str | None:
    """Return the installed version of a distribution without importing it; None if it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


# --- trials: each returns a line of detail if it succeeds, and raises if not -----------------------------------------


def try_bf16() -> str:
    """Multiply matrices in bf16, forward and backward."""
    import torch

    device = detect()
    left = torch.ones(64, 64, dtype=torch.bfloat16, device=device.kind, requires_grad=True)
    (left @ left).sum().backward()
    if left.grad is None or float(left.grad[0, 0]) != 128.0:
        raise ArithmeticError("the gradient of a product of ones is wrong")
    hardware = [feature for feature in device.features if "bf16" in feature]
    return f"torch {torch.__version__} on {device.kind}" + (
        f", in hardware ({', '.join(hardware)})" if hardware else ""
    )


def try_4bit() -> str:
    """Quantize weights to NF4 with double quantization, and dequantize them."""
    import torch
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    torch.manual_seed(0)
    weight = torch.randn(64, 256, device=detect().kind)
    packed, state = quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    error = float((dequantize_4bit(packed, state) - weight).abs().mean() / weight.abs().mean())
    if not error < NF4_ERROR:
        raise ArithmeticError(f"dequantized weights differ by {error:.0%}; NF4 should differ by 9%")
    return f"NF4 quantized and dequantized: {error:.1%} mean error, as expected"


def try_onnxruntime() -> str:
    """Make and run a model of one addition."""
    import numpy as np
    import onnxruntime
    from onnx import TensorProto, checker, helper

    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Add", ["x", "x"], ["y"])], "double", value[:1], value[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    checker.check_model(model)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (result,) = session.run(None, {"x": np.ones(2, np.float32)})
    if result.tolist() != [2.0, 2.0]:
        raise ArithmeticError(f"1 + 1 gave {result.tolist()}")
    names = [name.removesuffix("ExecutionProvider") for name in onnxruntime.get_available_providers()]
    return f"ran a model; providers: {', '.join(names)}"


def try_onnx_builder() -> str:
    """Import the program that the ONNX export starts."""
    import onnx_ir
    import onnxruntime_genai

    if importlib.util.find_spec("onnxruntime_genai.models.builder") is None:
        raise ImportError("onnxruntime_genai.models.builder is missing")
    return f"onnxruntime_genai {onnxruntime_genai.__version__} with onnx_ir {onnx_ir.__version__}"


@dataclass(frozen=True)
class Trial:
    """A function to run, the modules that it needs, and the extra that installs them."""

    name: str
    attempt: Callable[[], str]
    modules: tuple[str, ...]
    extra: str


TRIALS = (
    Trial("bf16", try_bf16, ("torch",), "train"),
    Trial("4-bit", try_4bit, ("torch", "bitsandbytes"), "train"),
    Trial("ONNX Runtime", try_onnxruntime, ("numpy", "onnx", "onnxruntime"), "onnx"),
    Trial("ONNX builder", try_onnx_builder, ("onnx_ir", "onnxruntime_genai"), "onnx"),
)


def try_all() -> list[DoctorCheck]:
    """Run all trials whose packages are installed, at the same time."""
    started = [(trial, start(trial)) for trial in TRIALS]
    return [result_of(trial, process) for trial, process in started]


def start(trial: Trial) -> subprocess.Popen[str] | None:
    """Start a trial, whose last line on stdout is its answer; return None if a package is missing."""
    if any(importlib.util.find_spec(module) is None for module in trial.modules):
        return None
    attempt = trial.attempt.__name__
    code = (
        f"import sys; from {__name__} import {attempt}; answer = {attempt}(); sys.stdout.write('\\n' + answer + '\\n')"
    )
    argv = [sys.executable, "-c", code]
    return subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def result_of(trial: Trial, process: subprocess.Popen[str] | None) -> DoctorCheck:
    """Wait for a trial and return its result; `process` is None if a package is missing."""
    if process is None:
        absent = [module for module in trial.modules if importlib.util.find_spec(module) is None]
        return DoctorCheck(trial.name, "missing", f"not installed: {', '.join(absent)}", bootstrap.remedy(trial.extra))
    try:
        answer, errors = process.communicate(timeout=TRIAL_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return DoctorCheck(
            trial.name, "broken", f"no answer within {TRIAL_SECONDS:.0f} s", bootstrap.remedy(trial.extra)
        )
    if process.returncode:
        return DoctorCheck(trial.name, "broken", _reason(process.returncode, errors), bootstrap.remedy(trial.extra))
    return DoctorCheck(trial.name, "ok", answer.splitlines()[-1])


def _reason(status: int, errors: str) -> str:
    """Return why a trial failed: the last line of its traceback, or the signal that ended it."""
    if status < 0:
        return f"the interpreter was killed by {signal.Signals(-status).name}"
    lines = [line.strip() for line in errors.splitlines() if line.strip()]
    return lines[-1] if lines else f"exit status {status}"


# --- vLLM, which is started as a program and never imported ----------------------------------------------------------


def check_vllm(device: Device) -> DoctorCheck:
    """Check that the build of vLLM for this device is installed, and say how it is started."""
    package = bootstrap.VLLM[device.kind]
    if sys.platform != "linux":
        return DoctorCheck("vLLM", "missing", bootstrap.limitations(sys.platform, platform.machine()))
    others = [name for name in bootstrap.VLLM.values() if name != package and version_of(name)]
    if others:
        return DoctorCheck(
            "vLLM", "broken", f"{others[0]} is installed; this device needs {package}", bootstrap.remedy(package)
        )
    version = version_of(package)
    if version is None:
        return DoctorCheck("vLLM", "missing", f"{package} is not installed", bootstrap.remedy(package))
    if cuda_builds := unusable_cuda_builds():
        detail = f"{package} {version} does not start with the CUDA builds of {', '.join(cuda_builds)}"
        return DoctorCheck("vLLM", "broken", detail, f"{sys.executable} -m pip uninstall -y {' '.join(cuda_builds)}")
    from qkit.runtimes import vllm as runtimes_vllm

    return DoctorCheck(
        "vLLM", "ok", f"{package} {version}, started as python -m {runtimes_vllm.server_module(version)}"
    )


def unusable_cuda_builds() -> list[str]:
    """Return companions of torch that are built for CUDA while torch itself is not; they fail when vLLM imports them."""
    if not (version_of("torch") or "").endswith("+cpu"):
        return []
    versions = {name: version_of(name) for name in bootstrap.CUDA_BUILDS}
    return [name for name, version in versions.items() if version and not version.endswith("+cpu")]
