"""The peak memory of a piece of work: bytes allocated on a GPU, or the resident set on a CPU."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from qkit.core.device import Device


class PeakMeter:
    """Measures peak bytes since its creation: of torch's CUDA allocator on a GPU, of the process's resident set on a CPU."""

    def __init__(self, device: Device):
        self.device = device
        self.meter = device.meter
        if not device.has_gpu:
            _reset_rss_peak()
        elif torch := _torch_on_cuda():
            torch.cuda.reset_peak_memory_stats()

    def peak_bytes(self) -> int:
        """Return the peak in bytes, by the meter that `Device.meter` names."""
        if self.device.has_gpu:
            return self.readings()["cuda_allocated"]
        return max(_rss_peak(), _children_rss_peak())

    def readings(self) -> dict[str, int]:
        """Return each peak of this device in bytes: allocated and reserved by torch's allocator, or RSS."""
        if not self.device.has_gpu:
            return {"rss": self.peak_bytes()}
        torch = _torch_on_cuda()
        return {
            "cuda_allocated": int(torch.cuda.max_memory_allocated()) if torch else 0,
            "cuda_reserved": int(torch.cuda.max_memory_reserved()) if torch else 0,
        }


def _torch_on_cuda() -> Any:
    """Return torch if this process has used CUDA, else None; does not import torch or initialize CUDA."""
    torch = sys.modules.get("torch")
    return torch if torch and torch.cuda.is_initialized() else None


def _reset_rss_peak() -> None:
    """Reset the high-water mark. Only Linux can; elsewhere the peak is that of the process's whole life."""
    clear = Path("/proc/self/clear_refs")
    if clear.exists() and os.access(clear, os.W_OK):
        clear.write_text("5")


def _rss_peak() -> int:
    """Return the high-water mark of this process's resident set, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _children_rss_peak() -> int:
    """Return the largest resident set of any child process that has ended and been waited for, in bytes."""
    if sys.platform == "win32":
        return 0
    import resource

    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def tree_rss_bytes(pid: int) -> int:
    """Return the resident bytes of a process and all its descendants; shared pages count once for each process."""
    import psutil

    try:
        root = psutil.Process(pid)
        return sum(p.memory_info().rss for p in [root, *root.children(recursive=True)] if p.is_running())
    except psutil.NoSuchProcess:
        return 0
