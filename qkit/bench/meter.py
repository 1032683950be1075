"""Memory over time and energy while a bench runs.

Memory is sampled: the resident set of a process and all that it started, and on an NVIDIA card what the driver says is in use.
Energy is read from counters that the hardware keeps, RAPL's of the processor packages or NVML's of the first card: all that runs there
is in it, not ours alone.
"""

from __future__ import annotations

import ctypes
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qkit.core.device import detect
from qkit.core.memory_meter import tree_rss_bytes

EVERY_SECONDS = 1.0
POINTS = 600  # kept of a series: a long one is thinned to every second point, again and again
POWERCAP = Path("/sys/class/powercap")


@dataclass(frozen=True)
class Sample:
    """Seconds since the meter was made; bytes."""

    seconds: float
    rss_bytes: int
    device_bytes: int | None


class Meter:
    """Watches the tree of `pid` (None: nothing to see, as with a server elsewhere) until `stop`."""

    def __init__(self, pid: int | None, every_seconds: float = EVERY_SECONDS):
        self.pid = pid
        self.samples: list[Sample] = []
        self._every = every_seconds
        self._begin = time.perf_counter()
        self._nvml = Nvml.open()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while True:
            self.sample()
            if self._ended.wait(self._every):
                return

    def sample(self) -> None:
        """Take one now."""
        if self.pid is None:
            return
        device = self._nvml.memory_bytes() if self._nvml else None
        self.samples.append(Sample(time.perf_counter() - self._begin, tree_rss_bytes(self.pid), device))
        if len(self.samples) > POINTS:
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
        """Peaks, and the series as [seconds, bytes] pairs."""
        device = [(s.seconds, s.device_bytes) for s in self.samples if s.device_bytes is not None]
        return {
            "rss_tree_peak_bytes": max((s.rss_bytes for s in self.samples), default=None),
            "device_peak_bytes": max((count for _, count in device), default=None),
            "rss_tree": [[round(s.seconds, 1), s.rss_bytes] for s in self.samples],
            "device": [[round(seconds, 1), count] for seconds, count in device],
        }


def driver() -> str | None:
    """Version of the NVIDIA driver; None without a card."""
    nvml = Nvml.open()
    return nvml.driver() if nvml else None


# --- energy -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Counter:
    """Energy counters that can be read, one for each package or card: `joules` so far, and where each wraps to 0 (empty: never)."""

    source: str
    joules: tuple[float, ...]
    wrap_at: tuple[float, ...] = ()


def energy() -> Counter | str:
    """The counters of this machine as they stand, or why there are none. RAPL's `psys` is the whole board, packages and all."""
    if nvml := Nvml.open():
        joules = nvml.energy_joules()
        return Counter("nvml", (joules,)) if joules is not None else "the card keeps no energy counter"
    try:
        zones = sorted(POWERCAP.glob("intel-rapl:*"))
        packages = [zone for zone in zones if (zone / "name").read_text().startswith("package")]
        if not packages:
            return "no NVML, and no RAPL below /sys/class/powercap"
        spent_so_far, wrap_at = (
            tuple(int((package / name).read_text()) / 1e6 for package in packages)
            for name in ("energy_uj", "max_energy_range_uj")
        )
    except OSError as error:
        return f"RAPL cannot be read here: {error.strerror}"
    return Counter("rapl", spent_so_far, wrap_at)


def spent(before: Counter | str, after: Counter | str, tokens: int) -> dict[str, Any]:
    """Joules between two readings, in all and for each output token; nulls with the reason where nothing can be told."""
    if isinstance(before, str) or isinstance(after, str):
        why = before if isinstance(before, str) else str(after)
        return {"joules": None, "joules_per_output_token": None, "source": None, "why": why}
    wraps = before.wrap_at or (0.0,) * len(before.joules)
    apart = zip(before.joules, after.joules, wraps, strict=True)
    joules = sum(now - then + (wrap if now < then else 0) for then, now, wrap in apart)
    return {"joules": joules, "joules_per_output_token": joules / tokens, "source": before.source, "why": None}


class Nvml:
    """The first NVIDIA card by the driver's own library; nothing is installed for it."""

    def __init__(self, library: ctypes.CDLL, card: ctypes.c_void_p):
        self._library = library
        self._card = card

    @classmethod
    def open(cls) -> Nvml | None:
        """None where there is no driver or no card, or where qkit was told to leave it alone."""
        if not detect().has_gpu:
            return None
        with suppress(OSError):
            library = ctypes.CDLL("libnvidia-ml.so.1")
            card = ctypes.c_void_p()
            if not (library.nvmlInit_v2() or library.nvmlDeviceGetHandleByIndex_v2(0, ctypes.byref(card))):
                return cls(library, card)
        return None

    def memory_bytes(self) -> int | None:
        """In use on the card, by whomever."""
        found = (ctypes.c_ulonglong * 3)()  # total, free, used
        return None if self._library.nvmlDeviceGetMemoryInfo(self._card, found) else int(found[2])

    def energy_joules(self) -> float | None:
        """Since the driver was loaded."""
        millijoules = ctypes.c_ulonglong()
        failed = self._library.nvmlDeviceGetTotalEnergyConsumption(self._card, ctypes.byref(millijoules))
        return None if failed else millijoules.value / 1000

    def driver(self) -> str | None:
        """Version of the driver."""
        text = ctypes.create_string_buffer(96)
        return None if self._library.nvmlSystemGetDriverVersion(text, 96) else text.value.decode()
