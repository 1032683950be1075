"""Which device is found: by a stand-in for nvidia-smi and for torch, in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the stand-in for nvidia-smi is a shell script")

FOUND = "import json, sys; from qkit.core.device import detect; json.dump(detect().to_dict(), sys.stdout); assert 'torch' not in sys.modules"
CUDA_TORCH, CPU_TORCH = ("cuda: Optional[str] = '13.0'", "cuda: Optional[str] = None")
CARDS = ("0, GPU-aa11, NVIDIA L4, 23034, 8.9", "1, GPU-bb22, NVIDIA H100 80GB HBM3, 81559, 9.0")
SHARED = "0, GPU-cc33, NVIDIA GB10, [N/A], 12.1"


def found(folder: Path, *cards: str, torch: str = CUDA_TORCH, visible: str | None = None) -> dict[str, Any]:
    """What `detect` says on a machine with these cards and this torch."""
    (folder / "nvidia-smi").write_text("#!/bin/sh\n" + "".join(f"echo '{card}'\n" for card in cards))
    (folder / "nvidia-smi").chmod(0o755)
    (folder / "torch").mkdir()
    (folder / "torch" / "__init__.py").write_text("raise AssertionError")
    (folder / "torch" / "version.py").write_text(f"__version__ = '2.13.0'\n{torch}\n")
    env = {name: value for name, value in os.environ.items() if name not in ("QKIT_DEVICE", "CUDA_VISIBLE_DEVICES")}
    env |= {"PATH": f"{folder}:/bin:/usr/bin", "PYTHONPATH": f"{folder}{os.pathsep}{Path.cwd()}"}
    env |= {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    done = subprocess.run([sys.executable, "-c", FOUND], env=env, capture_output=True, text=True, check=True)
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
        ("", None),
        ("-1", None),
        ("7", None),
    ],
)
def test_the_first_card_that_is_visible(tmp_path: Path, visible: str | None, name: str | None) -> None:
    device = found(tmp_path, *CARDS, visible=visible)
    assert device["kind"] == ("cuda" if name else "cpu")
    assert name is None or device["name"] == name


def test_what_is_read_of_a_card(tmp_path: Path) -> None:
    device = found(tmp_path, CARDS[0])
    assert device["memory_bytes"] == 23034 * 2**20 and device["features"] == ["sm_89"]


def test_a_torch_without_cuda_computes_on_the_cpu(tmp_path: Path) -> None:
    assert found(tmp_path, *CARDS, torch=CPU_TORCH)["kind"] == "cpu"


def test_a_card_without_memory_of_its_own_has_that_of_the_machine(tmp_path: Path) -> None:
    device = found(tmp_path, SHARED)
    assert device["kind"] == "cuda" and device["memory_bytes"] > 2**28
