"""Writes a model's safetensors files and their index tensor by tensor, so that memory does not limit the model's size."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from qkit.tensors.shards import Spec, TensorFile, shards, spec_bytes, tensor_specs

if TYPE_CHECKING:
    import torch


def model_specs(folder: Path) -> dict[str, Spec]:
    """dtype and shape of every tensor of a model folder, by name, in the order of its shards.

    Raises:
        ModelError: the folder contains no safetensors files.
    """
    return {name: spec for shard in shards(folder) for name, spec in tensor_specs(shard).items()}


def write_model(
    out: Path, specs: Mapping[str, Spec], tensors: Iterable[tuple[str, Iterable[torch.Tensor]]], limit_bytes: int
) -> None:
    """Write `tensors` to `out` in files of at most `limit_bytes`, with an index if there are several files.

    `tensors`: name and parts of each tensor, in the order of `specs`. A part is a range of rows; a tensor may have a single part.
    """
    groups = _grouped({name: spec_bytes(spec) for name, spec in specs.items()}, limit_bytes)
    remaining = iter(tensors)
    for number, group in enumerate(groups):
        file = TensorFile(out / _file_name(number, len(groups)), {name: specs[name] for name in group})
        with closing(file):
            for expected in group:
                name, parts = next(remaining)
                assert name == expected, f"expected the tensor {expected}, got {name}"
                file.write_parts(name, parts)
    if len(groups) > 1:
        _write_index(out, groups, sum(map(spec_bytes, specs.values())))


def _grouped(sizes: Mapping[str, int], limit_bytes: int) -> list[list[str]]:
    """Group names in order so that each group stays within `limit_bytes`. A larger tensor gets a group to itself."""
    groups: list[list[str]] = [[]]
    group_bytes = 0
    for name, size in sizes.items():
        if groups[-1] and group_bytes + size > limit_bytes:
            groups.append([])
            group_bytes = 0
        groups[-1].append(name)
        group_bytes += size
    return groups


def _file_name(number: int, count: int) -> str:
    """The name that from_pretrained expects: model.safetensors for one file, numbered names for several."""
    return "model.safetensors" if count == 1 else f"model-{number + 1:05d}-of-{count:05d}.safetensors"


def _write_index(out: Path, groups: list[list[str]], total_bytes: int) -> None:
    weight_map = {name: _file_name(number, len(groups)) for number, names in enumerate(groups) for name in names}
    text = json.dumps({"metadata": {"total_size": total_bytes}, "weight_map": weight_map}, indent=1)
    (out / "model.safetensors.index.json").write_text(text, encoding="utf-8")
