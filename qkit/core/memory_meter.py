"""The peak memory of a piece of work: allocated on a GPU, resident on a CPU."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from qkit.core.device import Device


class PeakMeter:
    """Peak bytes since it was made: torch's CUDA allocator on a GPU, the process's resident set on a CPU."""

    def __init__(self, device: Device):
        self.device = device
        self.meter = device.meter
        if device.kind == "cpu":
            _reset_rss_peak()
        elif torch := _cuda():
            torch.cuda.reset_peak_memory_stats()

    def peak_bytes(self) -> int:
        if self.device.kind == "cuda":
            return self.readings()["cuda_allocated"]
        return max(_rss_peak(), _children_rss_peak())

    def readings(self) -> dict[str, int]:
        """Every peak that this device keeps, by meter: what was allocated and what the allocator had reserved, or RSS."""
        if self.device.kind == "cpu":
            return {"rss": self.peak_bytes()}
        torch = _cuda()
        return {
            "cuda_allocated": int(torch.cuda.max_memory_allocated()) if torch else 0,
            "cuda_reserved": int(torch.cuda.max_memory_reserved()) if torch else 0,
        }


def _cuda() -> Any:
    """torch, if this process has used CUDA; nothing is imported or initialized to find out."""
    torch = sys.modules.get("torch")
    return torch if torch and torch.cuda.is_initialized() else None


def _reset_rss_peak() -> None:
    """Linux lets a process forget its high-water mark; elsewhere the mark is that of the whole process."""
    clear = Path("/proc/self/clear_refs")
    if clear.exists() and os.access(clear, os.W_OK):
        clear.write_text("5")


def _rss_peak() -> int:
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
    """The largest resident set of any program that this process has started and waited for."""
    if sys.platform == "win32":
        return 0
    import resource

    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def tree_rss_bytes(pid: int) -> int:
    """Resident bytes of a process and all its descendants, shared pages counted once per process."""
    import psutil

    try:
        root = psutil.Process(pid)
        return sum(p.memory_info().rss for p in [root, *root.children(recursive=True)] if p.is_running())
    except psutil.NoSuchProcess:
        return 0
