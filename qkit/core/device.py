"""The device that work runs on: the only file that knows cuda from cpu.

Detection needs no torch: `qkit plan` and `qkit doctor` ask it before anything heavy is imported.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Device:
    """What we run on. `memory_bytes` is the card's memory on a GPU, the machine's on a CPU."""

    kind: str
    name: str
    memory_bytes: int
    cores: int
    features: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def has_gpu(self) -> bool:
        return self.kind == "cuda"

    @property
    def meter(self) -> str:
        """What `PeakMeter` reads here: CUDA's allocator, or the resident set of the process, imports included."""
        return "cuda_allocated" if self.kind == "cuda" else "rss"

    @property
    def server_beside_model(self) -> bool:
        """Whether a vLLM server and a loaded model share the memory without one starving the other."""
        return self.kind == "cpu"

    @property
    def uses_labelled_head(self) -> bool:
        """Whether qkit's head (labelled positions only) is used; on a GPU TRL's fused Triton head is the better one."""
        return self.kind == "cpu"

    @property
    def gives_back(self) -> bool:
        """Whether tensors live in the C library's heap, where training does well to hand freed pages back."""
        return self.kind == "cpu"

    @property
    def offloads(self) -> bool:
        """Whether activations can wait somewhere else for the backward pass."""
        return self.kind == "cuda"

    @property
    def trainer_arguments(self) -> dict[str, Any]:
        """What SFTConfig must be told about the device."""
        return {"use_cpu": self.kind == "cpu", "bf16": True, "dataloader_pin_memory": self.kind == "cuda"}

    @property
    def device_map(self) -> dict[str, int | str]:
        """`device_map` for from_pretrained: the whole model on this one device, also where torch sees another."""
        return {"": 0 if self.kind == "cuda" else "cpu"}

    @property
    def onnx_providers(self) -> tuple[str, ...]:
        """ONNX Runtime's execution providers for this device, the preferred one first."""
        return ("CUDAExecutionProvider", "CPUExecutionProvider") if self.kind == "cuda" else ("CPUExecutionProvider",)

    @property
    def server_environment(self) -> dict[str, str]:
        """Environment that vLLM needs here.

        On a CPU vLLM 0.32 keeps the compiled model in a form that it then fails to read ("no attribute 'finalize_loading'"), and compiles
        again at each start: 76 s for a 135M model, where torch's own cache takes 38 s.
        """
        if self.kind == "cuda":
            return {}
        return {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_USE_AOT_COMPILE": "0"}

    @property
    def server_arguments(self) -> tuple[str, ...]:
        """Which of vLLM's memory options mean something here."""
        return ("gpu_memory_utilization",) if self.kind == "cuda" else ()


@functools.cache
def detect() -> Device:
    """The first NVIDIA GPU that is visible and that torch can use, else this machine's CPU. QKIT_DEVICE=cpu forces the CPU."""
    if os.environ.get("QKIT_DEVICE") != "cpu" and (gpu := _nvidia()):
        return gpu
    return Device("cpu", _cpu_name(), _machine_memory(), os.cpu_count() or 1, _cpu_features())


def _nvidia() -> Device | None:
    if not shutil.which("nvidia-smi") or not _torch_has_cuda():
        return None
    query = ["nvidia-smi", "--query-gpu=index,uuid,name,memory.total,compute_cap", "--format=csv,noheader,nounits"]
    done = subprocess.run(query, capture_output=True, text=True, check=False)
    listed = [[part.strip() for part in line.split(",")] for line in done.stdout.splitlines() if line.strip()]
    card = _first_visible(listed, os.environ.get("CUDA_VISIBLE_DEVICES"))
    if done.returncode or card is None:
        return None
    _, _, name, mebibytes, capability = card
    # A card that shares the machine's memory has none of its own to tell of: [N/A].
    memory = int(mebibytes) * 2**20 if mebibytes.isdigit() else _machine_memory()
    return Device("cuda", name, memory, os.cpu_count() or 1, (f"sm_{capability.replace('.', '')}",))


def _torch_has_cuda() -> bool:
    """Whether the torch that is installed can use a card, read without importing it; where there is none, one to come may."""
    found = importlib.util.find_spec("torch")
    file = Path(found.origin).with_name("version.py") if found and found.origin else None
    text = file.read_text(encoding="utf-8") if file and file.is_file() else ""
    return re.search(r"^cuda\b.*= *None", text, re.MULTILINE) is None


def _first_visible(listed: Sequence[list[str]], visible: str | None) -> list[str] | None:
    """Of cards by index and UUID, the first that CUDA_VISIBLE_DEVICES lets programs see; None: it lets them see none."""
    if visible is None:
        return next(iter(listed), None)
    first = visible.partition(",")[0].strip()
    if first.startswith("MIG"):  # part of a card, and only whole ones are listed
        return next(iter(listed), None)
    return next((card for card in listed if first and (card[0] == first or card[1].startswith(first))), None)


def _machine_memory() -> int:
    """Memory of this machine in bytes, or of the container when that is less."""
    if sys.platform == "win32":
        import psutil

        return int(psutil.virtual_memory().total)
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.exists() and (text := limit.read_text().strip()).isdigit():
        return min(total, int(text))
    return total


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _cpu_features() -> tuple[str, ...]:
    """The instruction sets that decide how fast bf16 and int8 are here."""
    info = Path("/proc/cpuinfo")
    flags = set(info.read_text().split()) if info.exists() else set()
    return tuple(
        name for name in ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "amx_int8") if name in flags
    )


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that there was no memory left: CUDA's own, torch's on the CPU, Python's, the system's."""
    if isinstance(error, MemoryError | ImportError):  # of a library there may be no room for among the static ones
        return isinstance(error, MemoryError)
    text = str(error).lower()
    return any(words in text for words in ("out of memory", "allocate memory", "bad_alloc", "alloc_failed"))


def give_back_freed() -> None:
    """Hand the pages that lie freed in the heap back to the system, where the C library can (glibc); takes some 10 ms."""
    import ctypes

    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):
        trim(0)


KERNELS_KEPT = "128"
# oneDNN's cache, and that of torch's own layer over it.
KERNEL_CACHES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")


def keep_few_kernels() -> None:
    """Have oneDNN, which torch computes with on a CPU, forget kernels that were not used lately; of no effect once torch is imported.

    It makes some for every shape of batch, keeps a thousand, and training meets new shapes for as long as an epoch lasts.
    """
    for name in KERNEL_CACHES:
        os.environ.setdefault(name, KERNELS_KEPT)


@contextmanager
def released() -> Iterator[None]:
    """Give cached device memory back on leaving, so that the next model finds it free."""
    try:
        yield
    finally:
        import gc

        import torch

        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
