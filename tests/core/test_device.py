"""Which device is detected: with a stand-in for the driver's library and for torch, in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the stand-in for nvidia-smi is a shell script")

ROOT = Path(__file__).parents[2]
DETECT = "import json, sys; from qkit.core.device import detect; json.dump(detect().to_dict(), sys.stdout); assert 'torch' not in sys.modules"
CUDA_TORCH, CPU_TORCH = ("cuda: Optional[str] = '13.0'", "cuda: Optional[str] = None")
NVML = """
from types import SimpleNamespace

CARDS = {cards!r}


class NVMLError(Exception):
    pass


class NVMLError_NotSupported(NVMLError):
    pass


def nvmlInit():
    if CARDS is None:
        raise NVMLError("Driver Not Loaded")


def nvmlShutdown():
    pass


def nvmlDeviceGetCount():
    return len(CARDS)


def nvmlDeviceGetHandleByIndex(index):
    return index


def nvmlDeviceGetUUID(card):
    return CARDS[card][0]


def nvmlDeviceGetName(card):
    return CARDS[card][1]


def nvmlDeviceGetMemoryInfo(card):
    if CARDS[card][2] is None:
        raise NVMLError_NotSupported
    return SimpleNamespace(total=CARDS[card][2])


def nvmlDeviceGetCudaComputeCapability(card):
    return CARDS[card][3]
"""


class Card(NamedTuple):
    """A card as the driver describes it; `memory_bytes` is None where it has no memory of its own."""

    uuid: str
    name: str
    memory_bytes: int | None
    capability: tuple[int, int]


L4 = Card("GPU-aa11", "NVIDIA L4", 23034 * 2**20, (8, 9))
H100 = Card("GPU-bb22", "NVIDIA H100 80GB HBM3", 81559 * 2**20, (9, 0))
GB10 = Card("GPU-cc33", "NVIDIA GB10", None, (12, 1))


def detected(
    folder: Path, *cards: Card, torch: str = CUDA_TORCH, visible: str | None = None, driver: bool = True
) -> dict[str, Any]:
    """The device that `detect` returns on a machine with these cards and this torch."""
    (folder / "nvidia-smi").write_text("#!/bin/sh\n")
    (folder / "nvidia-smi").chmod(0o755)
    listed = [tuple(card) for card in cards] if driver else None
    (folder / "pynvml.py").write_text(NVML.replace("{cards!r}", repr(listed)))
    (folder / "torch").mkdir()
    (folder / "torch" / "__init__.py").write_text("raise AssertionError")
    (folder / "torch" / "version.py").write_text(f"__version__ = '2.13.0'\n{torch}\n")
    env = {name: value for name, value in os.environ.items() if name not in ("QKIT_DEVICE", "CUDA_VISIBLE_DEVICES")}
    env |= {"PATH": f"{folder}:/bin:/usr/bin", "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"}
    env |= {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    done = subprocess.run([sys.executable, "-c", DETECT], env=env, capture_output=True, text=True, check=True)
    device: dict[str, Any] = json.loads(done.stdout)
    return device


@pytest.mark.parametrize(
    ("visible", "name"),
    [
        (None, "NVIDIA L4"),
        ("0,1", "NVIDIA L4"),
        ("1", "NVIDIA H100 80GB HBM3"),
        ("1,0", "NVIDIA H100 80GB HBM3"),
        ("GPU-bb22", "NVIDIA H100 80GB HBM3"),
        ("GPU-b", "NVIDIA H100 80GB HBM3"),
        ("MIG-bb22/1/0", "NVIDIA L4"),
        ("", None),
        ("-1", None),
        ("7", None),
    ],
)
def test_the_first_visible_card_is_taken(tmp_path: Path, visible: str | None, name: str | None) -> None:
    device = detected(tmp_path, L4, H100, visible=visible)
    assert device["kind"] == ("cuda" if name else "cpu")
    assert name is None or device["name"] == name


def test_memory_and_compute_capability_of_a_card(tmp_path: Path) -> None:
    device = detected(tmp_path, L4)
    assert device["memory_bytes"] == 23034 * 2**20 and device["features"] == ["sm_89"]


def test_a_torch_without_cuda_computes_on_the_cpu(tmp_path: Path) -> None:
    assert detected(tmp_path, L4, H100, torch=CPU_TORCH)["kind"] == "cpu"


def test_without_a_loaded_driver_the_cpu_is_taken(tmp_path: Path) -> None:
    assert detected(tmp_path, driver=False)["kind"] == "cpu"


def test_a_card_without_memory_of_its_own_has_that_of_the_machine(tmp_path: Path) -> None:
    device = detected(tmp_path, GB10)
    assert device["kind"] == "cuda" and device["memory_bytes"] > 2**28
