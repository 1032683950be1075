"""The device that work runs on. This is the only module that tells CUDA from CPU: everything else asks a property of `Device`.

Detection does not import torch, so `qkit plan` and `qkit doctor` can use it before anything heavy is loaded.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import platform
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Device:
    """The device that work runs on.

    `kind`: "cuda" or "cpu", as torch names it. `memory_bytes`: the memory of the card on a GPU, of the machine on a CPU. `cores`: logical
    cores of the machine. `features`: the compute capability of a card (`sm_90`), or the vector extensions of a CPU.
    """

    kind: str
    name: str
    memory_bytes: int
    cores: int
    features: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def has_gpu(self) -> bool:
        """Whether the device is a GPU with memory of its own."""
        return self.kind == "cuda"

    @property
    def meter(self) -> str:
        """The figure that `PeakMeter` reads here: bytes allocated by torch on the GPU, or the resident set of the process, imports included."""
        return "cuda_allocated" if self.has_gpu else "rss"

    @property
    def server_can_share_memory(self) -> bool:
        """Whether a vLLM server and a model loaded in another process can share the memory: on a GPU vLLM reserves most of it."""
        return not self.has_gpu

    @property
    def uses_labelled_head(self) -> bool:
        """Whether training uses qkit's head, which computes labelled positions only; on a GPU, TRL's fused Triton head is better."""
        return not self.has_gpu

    @property
    def frees_through_malloc(self) -> bool:
        """Whether tensors are allocated by the C library, so that training saves memory by trimming the heap."""
        return not self.has_gpu

    @property
    def offloads(self) -> bool:
        """Whether activations can wait in another memory for the backward pass."""
        return self.has_gpu

    @property
    def trainer_arguments(self) -> dict[str, Any]:
        """Arguments of SFTConfig that depend on the device."""
        return {"use_cpu": not self.has_gpu, "bf16": True, "dataloader_pin_memory": self.has_gpu}

    @property
    def torch_device(self) -> str:
        """The device as torch names it, for `device=` arguments."""
        return self.kind

    @property
    def busy_matrix_side(self) -> int:
        """The side of square matrices whose product is large enough to keep the device busy."""
        return 8192 if self.has_gpu else 2048

    @property
    def device_map(self) -> dict[str, int | str]:
        """`device_map` for from_pretrained: the whole model on this device, even if torch sees others."""
        return {"": 0 if self.has_gpu else "cpu"}

    @property
    def onnx_providers(self) -> tuple[str, ...]:
        """ONNX Runtime's execution providers for this device, in order of preference."""
        return ("CUDAExecutionProvider", "CPUExecutionProvider") if self.has_gpu else ("CPUExecutionProvider",)

    @property
    def sums_int8_exactly(self) -> bool:
        """Whether a CPU adds products of unsigned and signed 8-bit integers in 32 bits (VNNI); others add pairs in 16, which overflow."""
        return "avx512_vnni" in self.features

    @property
    def server_environment(self) -> dict[str, str]:
        """Environment variables that vLLM needs on this device.

        On a CPU, vLLM 0.32 caches the compiled model in a form that it then fails to read ("no attribute 'finalize_loading'"), and so compiles
        at each start: 76 s for a 135M model. With torch's cache instead, a start takes 38 s.
        """
        if self.has_gpu:
            return {}
        return {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_USE_AOT_COMPILE": "0"}

    @property
    def server_arguments(self) -> tuple[str, ...]:
        """The memory options of vLLM that have an effect on this device, as named in the recipe's serve section."""
        return ("gpu_memory_utilization",) if self.has_gpu else ()


@functools.cache
def detect() -> Device:
    """Return the first visible NVIDIA GPU if the installed torch can use it, else the CPU. QKIT_DEVICE=cpu forces the CPU."""
    if os.environ.get("QKIT_DEVICE") != "cpu" and (gpu := _visible_gpu()):
        return gpu
    return Device("cpu", _cpu_name(), _machine_memory(), os.cpu_count() or 1, _cpu_features())


def _visible_gpu() -> Device | None:
    """Read the card from the driver. The check for nvidia-smi, which comes with every driver, spares other machines the import."""
    if not shutil.which("nvidia-smi") or not _torch_has_cuda():
        return None
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:  # the driver is not loaded, or is of another version than its library
        return None
    try:
        cards = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
        uuids = [pynvml.nvmlDeviceGetUUID(card) for card in cards]
        index = _first_visible(uuids, os.environ.get("CUDA_VISIBLE_DEVICES"))
        return None if index is None else _gpu(cards[index])
    except pynvml.NVMLError:
        return None
    finally:
        pynvml.nvmlShutdown()


def _gpu(card: Any) -> Device:
    """Describe a card, given its NVML handle."""
    import pynvml

    try:
        memory_bytes = int(pynvml.nvmlDeviceGetMemoryInfo(card).total) // 2**20 * 2**20
    except pynvml.NVMLError_NotSupported:  # the card uses the memory of the machine
        memory_bytes = _machine_memory()
    major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(card)
    return Device("cuda", pynvml.nvmlDeviceGetName(card), memory_bytes, os.cpu_count() or 1, (f"sm_{major}{minor}",))


def _torch_has_cuda() -> bool:
    """Whether the installed torch is built for CUDA, read from its version file without an import; True if torch is not installed."""
    spec = importlib.util.find_spec("torch")
    file = Path(spec.origin).with_name("version.py") if spec and spec.origin else None
    text = file.read_text(encoding="utf-8") if file and file.is_file() else ""
    return re.search(r"^cuda\b.*= *None", text, re.MULTILINE) is None


def _first_visible(uuids: Sequence[str], visible: str | None) -> int | None:
    """Return the index of the first card that CUDA_VISIBLE_DEVICES (`visible`) lets programs see; None if it hides all of them."""
    first = None if visible is None else visible.partition(",")[0].strip()
    if first is None or first.startswith("MIG"):  # a MIG device is a part of a card, and the driver lists whole cards
        return 0 if uuids else None
    matches = (index for index, uuid in enumerate(uuids) if first and (str(index) == first or uuid.startswith(first)))
    return next(matches, None)


def _machine_memory() -> int:
    """Return the memory of this machine, or the limit of its container if that is lower, in bytes."""
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
    """Return the instruction sets that decide how fast bf16 and int8 arithmetic is."""
    info = Path("/proc/cpuinfo")
    flags = set(info.read_text().split()) if info.exists() else set()
    return tuple(
        name for name in ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "amx_int8") if name in flags
    )


def out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory ran out: of the GPU, of torch on the CPU, of Python, or of the system."""
    # An ImportError may say "cannot allocate memory in static TLS block", which has another cause.
    if isinstance(error, MemoryError | ImportError):
        return isinstance(error, MemoryError)
    text = str(error).lower()
    return any(phrase in text for phrase in ("out of memory", "allocate memory", "bad_alloc", "alloc_failed"))


def trim_heap() -> None:
    """Return freed pages of the heap to the system if the C library can do that (glibc); takes about 10 ms."""
    import ctypes

    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):
        trim(0)


KERNEL_CACHE_SIZE = "128"
# Of oneDNN, and of torch's layer over it
KERNEL_CACHE_VARIABLES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")


def limit_kernel_cache() -> None:
    """Limit how many compiled kernels oneDNN keeps. Has no effect once torch is imported.

    On a CPU, oneDNN compiles kernels for each shape of batch and keeps 1024 of them; training meets new shapes throughout an epoch.
    """
    for name in KERNEL_CACHE_VARIABLES:
        os.environ.setdefault(name, KERNEL_CACHE_SIZE)


@contextmanager
def released() -> Iterator[None]:
    """Return cached device memory on leaving the block, so that the next model finds it free."""
    try:
        yield
    finally:
        import gc

        import torch

        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
