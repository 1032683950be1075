"""What this machine and this environment can do, tried rather than guessed: `examine` looks, `screen` lays it out.

Each trial runs in a process of its own, all at once, so that a package which crashes the interpreter is a finding too.
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


PACKAGES = {  # what is worth a line, and the extra that brings it
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
NF4_ERROR = 0.12  # mean |error| over mean |weight| of NF4 on normal weights is 0.09; a wrong layout gives more than 1


@dataclass(frozen=True)
class Check:
    """One thing that was tried. `remedy` is the command that puts it right; empty when none is needed or none helps."""

    name: str
    status: Status
    detail: str
    remedy: str = ""


@dataclass(frozen=True)
class Package:
    """A package that matters; `version` is None when it is not installed, `extra` the extra of qkit's that lists it."""

    name: str
    version: str | None
    extra: str


@dataclass(frozen=True)
class Report:
    """All that `qkit doctor` found. `memory_free_bytes` is the machine's own memory, also where there is a GPU."""

    python: str
    executable: str
    platform: str
    device: Device
    memory_free_bytes: int
    disk: str
    disk_free_bytes: int
    packages: tuple[Package, ...]
    checks: tuple[Check, ...]

    @property
    def broken(self) -> bool:
        """Whether something is installed that does not work: worse than something left out."""
        return any(check.status == "broken" for check in self.checks)


def examine() -> Report:
    """Look at everything. Takes some seconds, nearly all of them torch's import."""
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
    """The packages that matter on this device, each with its extra."""
    vllm = bootstrap.VLLM[device.kind]
    return {**PACKAGES, vllm: vllm}


def version_of(name: str) -> str | None:
    """The installed version of a distribution, read without importing it."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


# --- trials: each returns what to say when all is well, and raises when it is not ------------------------------------


def try_bf16() -> str:
    """A product in bf16, forward and backward."""
    import torch

    device = detect()
    left = torch.ones(64, 64, dtype=torch.bfloat16, device=device.kind, requires_grad=True)
    (left @ left).sum().backward()
    if left.grad is None or float(left.grad[0, 0]) != 128.0:
        raise ArithmeticError("a product of ones has a wrong gradient")
    hardware = [feature for feature in device.features if "bf16" in feature]
    return f"torch {torch.__version__} on {device.kind}" + (
        f", in hardware ({', '.join(hardware)})" if hardware else ""
    )


def try_4bit() -> str:
    """NF4 weights there and back, with double quantization."""
    import torch
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    torch.manual_seed(0)
    weight = torch.randn(64, 256, device=detect().kind)
    packed, state = quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    error = float((dequantize_4bit(packed, state) - weight).abs().mean() / weight.abs().mean())
    if not error < NF4_ERROR:
        raise ArithmeticError(f"weights come back {error:.0%} off, where NF4 loses 9%")
    return f"NF4 there and back: {error:.1%} mean error, as it should be"


def try_onnxruntime() -> str:
    """A model of one addition, made and run."""
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
    return f"a model was run; providers: {', '.join(names)}"


def try_onnx_builder() -> str:
    """The program that the ONNX export starts."""
    import onnx_ir
    import onnxruntime_genai

    if importlib.util.find_spec("onnxruntime_genai.models.builder") is None:
        raise ImportError("onnxruntime_genai has no models.builder")
    return f"onnxruntime_genai {onnxruntime_genai.__version__} with onnx_ir {onnx_ir.__version__}"


@dataclass(frozen=True)
class Trial:
    """Something to try: the modules it needs, and the extra that brings them."""

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


def try_all() -> list[Check]:
    """Run every trial whose packages are installed, at once."""
    started = [(trial, _start(trial)) for trial in TRIALS]
    return [_finish(trial, process) for trial, process in started]


def _start(trial: Trial) -> subprocess.Popen[str] | None:
    """The trial's process, its last line on stdout the answer; None when a package is missing."""
    if any(importlib.util.find_spec(module) is None for module in trial.modules):
        return None
    attempt = trial.attempt.__name__
    code = (
        f"import sys; from {__name__} import {attempt}; answer = {attempt}(); sys.stdout.write('\\n' + answer + '\\n')"
    )
    argv = [sys.executable, "-c", code]
    return subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def _finish(trial: Trial, process: subprocess.Popen[str] | None) -> Check:
    if process is None:
        absent = [module for module in trial.modules if importlib.util.find_spec(module) is None]
        return Check(trial.name, "missing", f"not installed: {', '.join(absent)}", bootstrap.remedy(trial.extra))
    try:
        answer, errors = process.communicate(timeout=TRIAL_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return Check(trial.name, "broken", f"no answer in {TRIAL_SECONDS:.0f} s", bootstrap.remedy(trial.extra))
    if process.returncode:
        return Check(trial.name, "broken", _reason(process.returncode, errors), bootstrap.remedy(trial.extra))
    return Check(trial.name, "ok", answer.splitlines()[-1])


def _reason(status: int, errors: str) -> str:
    """Why a trial failed: the last line of its traceback, or the signal that ended it."""
    if status < 0:
        return f"the interpreter was ended by {signal.Signals(-status).name}"
    lines = [line.strip() for line in errors.splitlines() if line.strip()]
    return lines[-1] if lines else f"exit status {status}"


# --- vLLM: a program that is started, never an import ----------------------------------------------------------------


def check_vllm(device: Device) -> Check:
    """Whether the vLLM that suits this device is installed, and how it is started."""
    wanted = bootstrap.VLLM[device.kind]
    if sys.platform != "linux":
        return Check("vLLM", "missing", bootstrap.word_on(sys.platform, platform.machine()))
    others = [name for name in bootstrap.VLLM.values() if name != wanted and version_of(name)]
    if others:
        return Check(
            "vLLM", "broken", f"{others[0]} is installed; this device needs {wanted}", bootstrap.remedy(wanted)
        )
    version = version_of(wanted)
    if version is None:
        return Check("vLLM", "missing", f"{wanted} is not installed", bootstrap.remedy(wanted))
    if unfit := unfit_builds():
        detail = f"{wanted} {version} will not start beside the CUDA builds of {', '.join(unfit)}"
        return Check("vLLM", "broken", detail, f"{sys.executable} -m pip uninstall -y {' '.join(unfit)}")
    from qkit.runtimes import vllm as runtimes_vllm

    return Check("vLLM", "ok", f"{wanted} {version}, started as python -m {runtimes_vllm.server_module(version)}")


def unfit_builds() -> list[str]:
    """Companions of torch that were built for CUDA where torch itself was not: they fail when vLLM imports them."""
    if not (version_of("torch") or "").endswith("+cpu"):
        return []
    found = {name: version_of(name) for name in bootstrap.CUDA_BUILDS}
    return [name for name, version in found.items() if version and not version.endswith("+cpu")]
