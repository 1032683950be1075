"""Rounds the matrices of a built ONNX graph again, from the merged model: to 8 bits, or to 4 bits by GPTQ on the run's own rows.

The head, and an embedding that is tied to it, keep 8 bits, since every token passes through them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qkit.export._onnx.matmul_nbits import Graph, Matrix
from qkit.plugins.exporter import Job
from qkit.tensors.shards import read, shards, tensor_specs

if TYPE_CHECKING:
    from torch import Tensor


HEAD = "/lm_head"
HEAD_BITS = 8
EMBEDDINGS = "model.embed_tokens.weight"
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj")}
FOLDERS = {"attn": "self_attn", "mlp": "mlp"}
CALIBRATION_TOKENS = 4096  # on the 135M model, twice as many made no significant difference
MAX_DIFFERENCE = 0.5  # of a matrix's norm: rounding to 4 bits differs by about 0.1, another matrix by more than 1


class Unmatched(Exception):
    """The matrices cannot be rounded again: there are no training rows, or the graph's matrices are not those of the merged model."""


@dataclass(frozen=True)
class MatrixSource:
    """The origin of a matrix of the graph: the layer (None for the head), and its linear modules, concatenated by outputs."""

    layer: int | None
    modules: tuple[str, ...]

    def tensors(self, names: frozenset[str]) -> list[str]:
        """Return the names of the weights in the folder's files; some folders hold a tied head only as the embedding."""
        if self.layer is None:
            return ["lm_head.weight" if "lm_head.weight" in names else EMBEDDINGS]
        return [f"model.layers.{self.layer}.{module}.weight" for module in self.modules]


def requantize(job: Job, built: Path, out: Path, bits: int) -> None:
    """Write the graph of the folder `built` to `out` with every matrix rounded again; peak memory is one layer in fp32.

    Raises:
        Unmatched: the graph does not hold the merged model's matrices unchanged, or there are no training rows.
    """
    import torch

    from qkit.export._onnx.gptq import nearest

    with torch.no_grad(), Graph(built, out) as graph:
        sources = matched(graph, job.merged)
        if bits < 8:
            _layer_by_layer(graph, sources, job)
        for matrix in graph.matrices:
            if matrix.name not in graph.replaced:
                weight = checked(graph, matrix, _weight(job.merged, sources[matrix.name]))
                graph.replace(matrix, nearest(weight, HEAD_BITS, matrix.block))
        graph.save()


def matched(graph: Graph, folder: Path) -> Mapping[str, MatrixSource]:
    """Return the source of each matrix, by the matrix's name.

    Raises:
        Unmatched: the folder has no tensors of the expected name and shape.
    """
    specs = {name: spec for shard in shards(folder) for name, spec in tensor_specs(shard).items()}
    sources = {matrix.name: source(matrix.name) for matrix in graph.matrices}
    for matrix in graph.matrices:
        names = sources[matrix.name].tensors(frozenset(specs))
        shapes = [tuple(specs[name]["shape"]) if name in specs else (0, 0) for name in names]
        if {inputs for _, inputs in shapes} != {matrix.inputs} or sum(rows for rows, _ in shapes) != matrix.outputs:
            raise Unmatched(f"{matrix.name} [{matrix.outputs}, {matrix.inputs}] is not {' and '.join(names)}")
    return sources


def source(name: str) -> MatrixSource:
    """Return the source of a matrix, given its name: `/model/layers.3/attn/qkv_proj` is layer 3's self_attn.q_proj, k_proj and v_proj.

    Raises:
        Unmatched: the name is not that of a linear module.
    """
    if name == HEAD:
        return MatrixSource(None, ("lm_head",))
    match = re.fullmatch(r"/model/layers\.(\d+)/(attn|mlp)/(\w+_proj)", name)
    if not match:
        raise Unmatched(f"{name} is not a linear module of a decoder layer")
    layer, folder, module = match.groups()
    return MatrixSource(int(layer), tuple(f"{FOLDERS[folder]}.{part}" for part in FUSED.get(module, (module,))))


def _layer_by_layer(graph: Graph, sources: Mapping[str, MatrixSource], job: Job) -> None:
    """Round the layers' matrices to 4 bits, each on the output of the rounded layers before it."""
    from qkit.export._onnx.layers import Layers, walkable

    if not job.rows.is_file():
        raise Unmatched(f"{job.rows}: no training rows")
    if not walkable(job.merged):
        raise Unmatched("the model does not consist of `model.layers` only")
    for layer in Layers(job.merged, calibration_rows(job.rows)).walk():
        matrices = [matrix for matrix in graph.matrices if sources[matrix.name].layer == layer.index]
        grams = layer.grams([sources[matrix.name].modules[0] for matrix in matrices])
        for matrix in matrices:
            modules = [layer.module.get_submodule(name) for name in sources[matrix.name].modules]
            _round(graph, matrix, modules, grams[sources[matrix.name].modules[0]])


def _round(graph: Graph, matrix: Matrix, modules: Sequence[Any], gram: Tensor) -> None:
    """Round a matrix in the graph, and put the rounded weights into the layer's modules."""
    import torch

    from qkit.export._onnx.gptq import gptq

    weight = checked(graph, matrix, torch.cat([module.weight for module in modules]))
    rounded = gptq(weight, gram, matrix.bits, matrix.block)
    graph.replace(matrix, rounded)
    for module, part in zip(modules, rounded.weight().split([len(module.weight) for module in modules]), strict=True):
        module.weight = torch.nn.Parameter(part, requires_grad=False)


def _weight(folder: Path, source: MatrixSource) -> Tensor:
    """Read a matrix from the folder's files."""
    import torch

    names = frozenset(name for shard in shards(folder) for name in tensor_specs(shard))
    parts = [tensor for _, tensor in read(folder, source.tensors(names))]
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def checked(graph: Graph, matrix: Matrix, weight: Tensor) -> Tensor:
    """Return `weight` if it is what the builder rounded: the builder rotates some matrices, or folds a factor into them.

    Raises:
        Unmatched: it is another matrix.
    """
    import torch

    difference = torch.from_numpy(graph.weight(matrix)).sub_(weight).norm() / weight.float().norm()
    if not difference < MAX_DIFFERENCE:
        raise Unmatched(
            f"{matrix.name}: the builder's matrix differs from the model's by {float(difference):.2f} of its norm"
        )
    return weight


def calibration_rows(file: Path) -> list[list[int]]:
    """Return rows from all parts of the training data, about CALIBRATION_TOKENS tokens in all."""
    import pyarrow.compute
    import pyarrow.parquet

    rows = pyarrow.parquet.read_table(file, columns=["input_ids"])["input_ids"]
    lengths = pyarrow.compute.list_value_length(rows)
    share = CALIBRATION_TOKENS / max(pyarrow.compute.sum(lengths).as_py(), 1)
    step = max(int(1 / share), 1)
    chosen: list[list[int]] = rows.take(list(range(0, len(rows), step))).to_pylist()
    return chosen
