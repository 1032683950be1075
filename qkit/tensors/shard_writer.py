"""A model's safetensors files and their index, written tensor by tensor whatever the model's size."""

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
    """dtype and shape of every tensor of a model folder, in the order of its shards.

    Raises:
        ModelError: it holds no safetensors files.
    """
    return {name: spec for shard in shards(folder) for name, spec in tensor_specs(shard).items()}


def write_model(
    out: Path, specs: Mapping[str, Spec], tensors: Iterable[tuple[str, Iterable[torch.Tensor]]], limit_bytes: int
) -> None:
    """Write `tensors`, which come in the order of `specs`, into files of at most `limit_bytes`; an index where there are several.

    A tensor comes in parts, some of its rows after the others, or as one.
    """
    groups = _grouped({name: spec_bytes(spec) for name, spec in specs.items()}, limit_bytes)
    coming = iter(tensors)
    for number, group in enumerate(groups):
        file = TensorFile(out / _file_name(number, len(groups)), {name: specs[name] for name in group})
        with closing(file):
            for expected in group:
                name, parts = next(coming)
                assert name == expected, f"{name} came where {expected} was due"
                file.write_parts(name, parts)
    if len(groups) > 1:
        _write_index(out, groups, sum(map(spec_bytes, specs.values())))


def _grouped(sizes: Mapping[str, int], limit_bytes: int) -> list[list[str]]:
    """Names in order, as many to a group as stay within `limit_bytes`; a larger tensor has a group of its own."""
    groups: list[list[str]] = [[]]
    held = 0
    for name, size in sizes.items():
        if groups[-1] and held + size > limit_bytes:
            groups.append([])
            held = 0
        groups[-1].append(name)
        held += size
    return groups


def _file_name(number: int, count: int) -> str:
    """One file is model.safetensors; several are numbered, as from_pretrained expects."""
    return "model.safetensors" if count == 1 else f"model-{number + 1:05d}-of-{count:05d}.safetensors"


def _write_index(out: Path, groups: list[list[str]], total_bytes: int) -> None:
    weight_map = {name: _file_name(number, len(groups)) for number, names in enumerate(groups) for name in names}
    text = json.dumps({"metadata": {"total_size": total_bytes}, "weight_map": weight_map}, indent=1)
    (out / "model.safetensors.index.json").write_text(text, encoding="utf-8")
