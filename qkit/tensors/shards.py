"""The safetensors files of a model folder: their headers, and their tensors read and written one at a time."""

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


Spec = Mapping[str, Any]  # dtype (as the format names it) and shape of a tensor


ALIGNMENT = 8  # bytes; what the safetensors library pads its header to
SAMPLED_BYTES = 4096
SHARDS = "model*.safetensors"  # Mistral's repositories hold them once more as consolidated.safetensors
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
    """The safetensors files of a model, in order.

    Raises:
        ModelError: there are none.
    """
    files = sorted(folder.glob(SHARDS))
    if not files:
        raise ModelError(f"{folder}: holds no {SHARDS}; save the model with `save_pretrained` once")
    return files


def tensor_specs(shard: Path) -> dict[str, Any]:
    """dtype and shape of every tensor of a safetensors file, by name, from its header alone."""
    return {name: spec for name, spec in _header(shard)[0].items() if name != "__metadata__"}


def spec_bytes(spec: Spec) -> int:
    """What a tensor of that dtype and shape takes in a file."""
    return prod(spec["shape"]) * ITEM_BYTES[spec["dtype"]]


def read(folder: Path, order: Sequence[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """A model's tensors in memory of their own, the next one read while the last one is worked on: two of them are held at a time.

    Not mapped: pages of a mapped file stay resident for as long as the system likes.
    """
    tensors = _tensors(folder, order)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(next, tensors, None)
        while (found := waiting.result()) is not None:
            waiting = pool.submit(next, tensors, None)
            name, tensor = found
            del found
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
    """Read one tensor; `begin` is where the file's data begin."""
    import torch

    if spec["dtype"] not in TORCH_NAMES:
        raise ModelError(f"{file.name}: {name} is held as {spec['dtype']}; known are {', '.join(TORCH_NAMES)}")
    first, end = spec["data_offsets"]
    held = torch.empty(end - first, dtype=torch.uint8)
    room = memoryview(held.numpy())
    file.seek(begin + first)
    while room:
        count = file.readinto(room)
        if not count:
            raise ModelError(f"{file.name}: ends within {name}: the file is not whole")
        room = room[count:]
    return held.view(getattr(torch, TORCH_NAMES[spec["dtype"]])).reshape(spec["shape"])


def fingerprint(folder: Path) -> str:
    """Hash of the names, shapes and dtypes of all tensors of a model, and of the first and last bytes of each shard."""
    digest = hashlib.sha256()
    for shard in shards(folder):
        names = {name: [spec["dtype"], spec["shape"]] for name, spec in tensor_specs(shard).items()}
        digest.update(json.dumps(names, sort_keys=True).encode())
        for sample in _samples(shard, _header(shard)[1]):
            digest.update(sample)
    return digest.hexdigest()


def _header(shard: Path) -> tuple[dict[str, Any], int]:
    """The JSON header of a safetensors file and where its data begin."""
    with shard.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        return json.loads(file.read(length)), 8 + length


def _samples(shard: Path, begin: int) -> Iterator[bytes]:
    """64 short pieces spread evenly over a shard's data: enough to tell two sets of weights apart."""
    end = shard.stat().st_size
    with shard.open("rb") as file:
        for index in range(64):
            file.seek(begin + (end - begin - SAMPLED_BYTES if end - begin > SAMPLED_BYTES else 0) * index // 63)
            yield file.read(SAMPLED_BYTES)


class TensorFile:
    """A safetensors file in the making. The format has its header first, so all of `specs` is known before the first tensor is."""

    def __init__(self, path: Path, specs: Mapping[str, Spec]):
        self.specs = specs
        self.file = path.open("wb")
        self._write_header()

    def _write_header(self) -> None:
        """8 bytes of header length, then the header, padded so that the data are aligned."""
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
        """The next tensor of `specs`, rounded to its dtype."""
        self.write_parts(name, [tensor])

    def write_parts(self, name: str, parts: Iterable[torch.Tensor]) -> None:
        """The next tensor in parts, some of its rows after the others."""
        import torch

        dtype = getattr(torch, TORCH_NAMES[self.specs[name]["dtype"]])
        for part in parts:
            self.file.write(part.to(dtype).contiguous().reshape(-1).view(torch.uint8).numpy().data)

    def close(self) -> None:
        self.file.close()
