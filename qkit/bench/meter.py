"""Memory over time and energy while a bench runs.

Memory is sampled: the resident set of a process and its children, and on an NVIDIA card the memory that the driver reports as used. Energy
is read from hardware counters (RAPL's for the CPU packages, NVML's for the first card), so it includes other programs on the machine.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qkit.core.device import detect
from qkit.core.memory_meter import tree_rss_bytes

SAMPLE_SECONDS = 1.0
MAX_SAMPLES = 600  # a longer series drops every second sample, and samples half as often from then on
POWERCAP = Path("/sys/class/powercap")


@dataclass(frozen=True)
class Sample:
    """Memory at one time. `seconds`: since the meter was started."""

    seconds: float
    rss_bytes: int
    device_bytes: int | None


class Meter:
    """Samples the memory of the process tree of `pid` until `stop`. With None, for a server on another machine, it samples nothing."""

    def __init__(self, pid: int | None, every_seconds: float = SAMPLE_SECONDS):
        self.pid = pid
        self.samples: list[Sample] = []
        self._every = every_seconds
        self._begin = time.perf_counter()
        self._card = GpuCard.open()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while True:
            self.sample()
            if self._ended.wait(self._every):
                return

    def sample(self) -> None:
        """Take a sample now."""
        if self.pid is None:
            return
        device = self._card.memory_bytes() if self._card else None
        self.samples.append(Sample(time.perf_counter() - self._begin, tree_rss_bytes(self.pid), device))
        if len(self.samples) > MAX_SAMPLES:
            del self.samples[1::2]
            self._every *= 2

    def stop(self) -> None:
        self._ended.set()
        self._thread.join()

    def __enter__(self) -> Meter:
        return self

    def __exit__(self, *_: Any) -> None:
        self.stop()

    def to_dict(self) -> dict[str, Any]:
        """The peaks in bytes, None without samples, and the series as [seconds, bytes] pairs."""
        device = [(s.seconds, s.device_bytes) for s in self.samples if s.device_bytes is not None]
        return {
            "rss_tree_peak_bytes": max((s.rss_bytes for s in self.samples), default=None),
            "device_peak_bytes": max((count for _, count in device), default=None),
            "rss_tree": [[round(s.seconds, 1), s.rss_bytes] for s in self.samples],
            "device": [[round(seconds, 1), count] for seconds, count in device],
        }


def driver_version() -> str | None:
    """The version of the NVIDIA driver, None without a card."""
    card = GpuCard.open()
    return card.driver_version() if card else None


# --- energy -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EnergyReading:
    """Energy counters, one per CPU package or card. `joules`: the counts so far; `wrap_at`: where each wraps to 0, empty if never."""

    source: str
    joules: tuple[float, ...]
    wrap_at: tuple[float, ...] = ()


def energy() -> EnergyReading | str:
    """Read this machine's energy counters; returns the reason if there are none. RAPL's `psys` is ignored because it includes the packages."""
    if card := GpuCard.open():
        joules = card.energy_joules()
        return EnergyReading("nvml", (joules,)) if joules is not None else "the card has no energy counter"
    try:
        zones = sorted(POWERCAP.glob("intel-rapl:*"))
        packages = [zone for zone in zones if (zone / "name").read_text().startswith("package")]
        if not packages:
            return "no NVML, and no RAPL below /sys/class/powercap"
        counts, wrap_at = (
            tuple(int((package / name).read_text()) / 1e6 for package in packages)
            for name in ("energy_uj", "max_energy_range_uj")
        )
    except OSError as error:
        return f"RAPL counters are not readable: {error.strerror}"
    return EnergyReading("rapl", counts, wrap_at)


def energy_spent(before: EnergyReading | str, after: EnergyReading | str, tokens: int) -> dict[str, Any]:
    """Joules between two readings, in total and per output token; None with the reason in `why` if there is no counter."""
    if isinstance(before, str) or isinstance(after, str):
        why = before if isinstance(before, str) else str(after)
        return {"joules": None, "joules_per_output_token": None, "source": None, "why": why}
    wraps = before.wrap_at or (0.0,) * len(before.joules)
    readings = zip(before.joules, after.joules, wraps, strict=True)
    joules = sum(now - then + (wrap if now < then else 0) for then, now, wrap in readings)
    return {"joules": joules, "joules_per_output_token": joules / tokens, "source": before.source, "why": None}


class GpuCard:
    """The first NVIDIA card, read through NVML."""

    def __init__(self, handle: Any):
        self._handle = handle

    @classmethod
    def open(cls) -> GpuCard | None:
        """The card, or None if there is no driver or no card, or if qkit runs on the CPU."""
        if not detect().has_gpu:
            return None
        import pynvml

        try:
            pynvml.nvmlInit()
            return cls(pynvml.nvmlDeviceGetHandleByIndex(0))
        except pynvml.NVMLError:
            return None

    def memory_bytes(self) -> int | None:
        """Bytes in use on the card by all processes, None if the driver does not report them."""
        import pynvml

        try:
            return int(pynvml.nvmlDeviceGetMemoryInfo(self._handle).used)
        except pynvml.NVMLError:
            return None

    def energy_joules(self) -> float | None:
        """Energy used since the driver was loaded, None if the card has no counter."""
        import pynvml

        try:
            return int(pynvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)) / 1000
        except pynvml.NVMLError:
            return None

    def driver_version(self) -> str | None:
        """The version of the driver, None if it is not reported."""
        import pynvml

        try:
            return str(pynvml.nvmlSystemGetDriverVersion())
        except pynvml.NVMLError:
            return None
