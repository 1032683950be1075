"""Processes that should be gone."""

from __future__ import annotations

import psutil


def living(processes: list[psutil.Process], seconds: float) -> list[psutil.Process]:
    """Those that are still there after so long; one that has ended and that nobody has waited for is not."""
    _, left = psutil.wait_procs(processes, timeout=seconds)
    return [process for process in left if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]
