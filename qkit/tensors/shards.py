"""Reads the headers of a model folder's safetensors files, and reads and writes their tensors one at a time."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from io import FileIO
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qkit.core.errors import ModelError

if TYPE_CHECKING:
    import torch


Spec = Mapping[str, Any]  # dtype (by its safetensors name) and shape of a tensor


ALIGNMENT = 8  # bytes; the safetensors library pads its header to a multiple of this
SAMPLED_BYTES = 4096  # size of each sample of a fingerprint
SHARDS = (
    "model*.safetensors"  # excludes consolidated.safetensors, a second copy of the weights in Mistral's repositories
)
TORCH_NAMES = {
    "BF16": "bfloat16",
    "F16": "float16",
    "F32": "float32",
    "I64": "int64",
    "I32": "int32",
    "I8": "int8",
    "U8": "uint8",
    "F8_E4M3": "float8_e4m3fn",
    "BOOL": "bool",
}
ITEM_BYTES = {"BF16": 2, "F16": 2, "F32": 4, "I64": 8, "I32": 4, "I8": 1, "U8": 1, "F8_E4M3": 1, "BOOL": 1}


def shards(folder: Path) -> list[Path]:
    """The safetensors files of a model folder, sorted by name.

    Raises:
        ModelError: the folder contains none.
    """
    files = sorted(folder.glob(SHARDS))
    if not files:
        raise ModelError(f"{folder}: contains no {SHARDS}; save the model with `save_pretrained` once", source=folder)
    return files


def tensor_specs(shard: Path) -> dict[str, Any]:
    """dtype, shape and data offsets of every tensor of a safetensors file, by name. Reads only the header."""
    return {name: spec for name, spec in _header(shard)[0].items() if name != "__metadata__"}


def spec_bytes(spec: Spec) -> int:
    """Bytes that a tensor of this dtype and shape takes in a file."""
    return prod(spec["shape"]) * ITEM_BYTES[spec["dtype"]]


def read(folder: Path, order: Sequence[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors named in `order`, on the CPU. The next tensor is read in the background, so that at most two are in memory.

    The files are not memory-mapped, because the system may keep pages of a mapped file resident.

    Raises:
        ModelError: a tensor has an unsupported dtype, or a file is truncated.
    """
    tensors = _tensors(folder, order)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(next, tensors, None)
        while (entry := waiting.result()) is not None:
            waiting = pool.submit(next, tensors, None)
            name, tensor = entry
            del entry
            yield name, tensor
            del tensor


def _tensors(folder: Path, order: Sequence[str]) -> Iterator[tuple[str, torch.Tensor]]:
    headers = {shard: _header(shard) for shard in shards(folder)}
    files = {name: shard for shard, (names, _) in headers.items() for name in names}
    with ExitStack() as stack:
        opened = {
            shard: stack.enter_context(shard.open("rb", buffering=0)) for shard in {files[name] for name in order}
        }
        for name in order:
            header, begin = headers[files[name]]
            yield name, _tensor(opened[files[name]], header[name], begin, name)


def _tensor(file: FileIO, spec: Spec, begin: int, name: str) -> torch.Tensor:
    """Read one tensor. `begin`: offset of the file's data section in bytes."""
    import torch

    if spec["dtype"] not in TORCH_NAMES:
        raise ModelError(
            f"{file.name}: {name} has the unsupported dtype {spec['dtype']}; supported: {', '.join(TORCH_NAMES)}"
        )
    first, end = spec["data_offsets"]
    data = torch.empty(end - first, dtype=torch.uint8)
    unread = memoryview(data.numpy())
    file.seek(begin + first)
    while unread:
        count = file.readinto(unread)
        if not count:
            raise ModelError(f"{file.name}: the file is truncated: it ends within {name}")
        unread = unread[count:]
    return data.view(getattr(torch, TORCH_NAMES[spec["dtype"]])).reshape(spec["shape"])


def fingerprint(folder: Path) -> str:
    """Hash of the names, shapes and dtypes of all tensors of a model, and of samples of each shard's data."""
    digest = hashlib.sha256()
    for shard in shards(folder):
        names = {name: [spec["dtype"], spec["shape"]] for name, spec in tensor_specs(shard).items()}
        digest.update(json.dumps(names, sort_keys=True).encode())
        for sample in _samples(shard, _header(shard)[1]):
            digest.update(sample)
    return digest.hexdigest()


def _header(shard: Path) -> tuple[dict[str, Any], int]:
    """The JSON header of a safetensors file, and the offset of its data section in bytes."""
    with shard.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        return json.loads(file.read(length)), 8 + length


def _samples(shard: Path, begin: int) -> Iterator[bytes]:
    """64 samples spread evenly over a shard's data, enough to distinguish two sets of weights."""
    end = shard.stat().st_size
    with shard.open("rb") as file:
        for index in range(64):
            file.seek(begin + (end - begin - SAMPLED_BYTES if end - begin > SAMPLED_BYTES else 0) * index // 63)
            yield file.read(SAMPLED_BYTES)


class TensorFile:
    """Writes a safetensors file tensor by tensor. The header comes first, so `specs` must list every tensor in advance."""

    def __init__(self, path: Path, specs: Mapping[str, Spec]):
        self.specs = specs
        self.file = path.open("wb")
        self._write_header()

    def _write_header(self) -> None:
        """Write 8 bytes of header length, then the header, padded so that the data is aligned."""
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        begin = 0
        for name, spec in self.specs.items():
            end = begin + spec_bytes(spec)
            header[name] = {"dtype": spec["dtype"], "shape": list(spec["shape"]), "data_offsets": [begin, end]}
            begin = end
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % ALIGNMENT)
        self.file.write(len(text).to_bytes(8, "little") + text)

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write the next tensor of `specs`, rounded to its dtype."""
        self.write_parts(name, [tensor])

    def write_parts(self, name: str, parts: Iterable[torch.Tensor]) -> None:
        """Write the next tensor of `specs` in parts, each a range of its rows, in order."""
        import torch

        dtype = getattr(torch, TORCH_NAMES[self.specs[name]["dtype"]])
        for part in parts:
            self.file.write(part.to(dtype).contiguous().reshape(-1).view(torch.uint8).numpy().data)

    def close(self) -> None:
        self.file.close()
