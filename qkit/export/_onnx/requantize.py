"""The matrices of a built ONNX graph, rounded anew from the merged model: to 8 bits, or to 4 with the run's own rows.

The head, and a table of embeddings that is tied to it, keep 8 bits: every token that is said goes through them.
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
CALIBRATION_TOKENS = 4096  # on the 135M, twice as many changed nothing that could be told from chance
MOST_OFF = 0.5  # of a matrix's norm: 4 bits are off by a tenth of it, another matrix by more than all of it


class Unmatched(Exception):
    """There is nothing to round anew by: no training rows, or the graph's matrices are not those of the merged model."""


@dataclass(frozen=True)
class Source:
    """Where a matrix of the graph comes from: the layer (None for the head) and its linear modules, one under the other."""

    layer: int | None
    modules: tuple[str, ...]

    def tensors(self, names: frozenset[str]) -> list[str]:
        """The names of the weights in the folder's files; a tied head is in some of them only as the embeddings."""
        if self.layer is None:
            return ["lm_head.weight" if "lm_head.weight" in names else EMBEDDINGS]
        return [f"model.layers.{self.layer}.{module}.weight" for module in self.modules]


def refit(job: Job, built: Path, out: Path, bits: int) -> None:
    """Write the graph of the folder `built` to `out` with every matrix rounded anew; peak memory is a layer's in fp32.

    Raises:
        Unmatched: the graph does not hold the merged model's matrices as they are, or there are no training rows.
    """
    import torch

    from qkit.export._onnx.gptq import nearest

    with torch.no_grad(), Graph(built, out) as graph:
        sources = matched(graph, job.merged)
        if bits < 8:
            _layer_by_layer(graph, sources, job)
        for matrix in graph.matrices:
            if matrix.name not in graph.replaced:
                weight = _checked(graph, matrix, _weight(job.merged, sources[matrix.name]))
                graph.replace(matrix, nearest(weight, HEAD_BITS, matrix.block))
        graph.save()


def matched(graph: Graph, folder: Path) -> Mapping[str, Source]:
    """The source of each matrix, by its name.

    Raises:
        Unmatched: the folder has no tensors of that name and shape.
    """
    specs = {name: spec for shard in shards(folder) for name, spec in tensor_specs(shard).items()}
    sources = {matrix.name: source(matrix.name) for matrix in graph.matrices}
    for matrix in graph.matrices:
        names = sources[matrix.name].tensors(frozenset(specs))
        shapes = [tuple(specs[name]["shape"]) if name in specs else (0, 0) for name in names]
        if {inputs for _, inputs in shapes} != {matrix.inputs} or sum(rows for rows, _ in shapes) != matrix.outputs:
            raise Unmatched(f"{matrix.name} [{matrix.outputs}, {matrix.inputs}] is not {' and '.join(names)}")
    return sources


def source(name: str) -> Source:
    """Of a node: `/model/layers.3/attn/qkv_proj` is layer 3's self_attn.q_proj, k_proj and v_proj.

    Raises:
        Unmatched: nodes of that name are not known.
    """
    if name == HEAD:
        return Source(None, ("lm_head",))
    found = re.fullmatch(r"/model/layers\.(\d+)/(attn|mlp)/(\w+_proj)", name)
    if not found:
        raise Unmatched(f"{name} is no linear module of a decoder layer")
    layer, folder, module = found.groups()
    return Source(int(layer), tuple(f"{FOLDERS[folder]}.{part}" for part in FUSED.get(module, (module,))))


def _layer_by_layer(graph: Graph, sources: Mapping[str, Source], job: Job) -> None:
    """Round the layers' matrices to 4 bits, each layer on what the rounded ones before it make of the rows."""
    from qkit.export._onnx.layers import Layers, walkable

    if not job.rows.is_file():
        raise Unmatched(f"{job.rows}: no training rows")
    if not walkable(job.merged):
        raise Unmatched("the model is not made of `model.layers` alone")
    for layer in Layers(job.merged, calibration_rows(job.rows)).walk():
        matrices = [matrix for matrix in graph.matrices if sources[matrix.name].layer == layer.index]
        grams = layer.grams([sources[matrix.name].modules[0] for matrix in matrices])
        for matrix in matrices:
            modules = [layer.module.get_submodule(name) for name in sources[matrix.name].modules]
            _round(graph, matrix, modules, grams[sources[matrix.name].modules[0]])


def _round(graph: Graph, matrix: Matrix, modules: Sequence[Any], gram: Tensor) -> None:
    """Round a matrix in the graph, and the layer's modules alike."""
    import torch

    from qkit.export._onnx.gptq import compensated

    weight = _checked(graph, matrix, torch.cat([module.weight for module in modules]))
    rounded = compensated(weight, gram, matrix.bits, matrix.block)
    graph.replace(matrix, rounded)
    for module, part in zip(modules, rounded.weight().split([len(module.weight) for module in modules]), strict=True):
        module.weight = torch.nn.Parameter(part, requires_grad=False)


def _weight(folder: Path, source: Source) -> Tensor:
    """From the folder's files, as they have it."""
    import torch

    names = frozenset(name for shard in shards(folder) for name in tensor_specs(shard))
    parts = [tensor for _, tensor in read(folder, source.tensors(names))]
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def _checked(graph: Graph, matrix: Matrix, weight: Tensor) -> Tensor:
    """`weight`, when it is what the builder rounded: it turns some matrices, or folds a factor into them.

    Raises:
        Unmatched: it is not.
    """
    import torch

    off = torch.from_numpy(graph.weight(matrix)).sub_(weight).norm() / weight.float().norm()
    if not off < MOST_OFF:
        raise Unmatched(f"{matrix.name}: the builder's matrix is off by {float(off):.2f} of its norm")
    return weight


def calibration_rows(file: Path) -> list[list[int]]:
    """Rows from all over the training data, CALIBRATION_TOKENS of them or the whole."""
    import pyarrow.compute
    import pyarrow.parquet

    rows = pyarrow.parquet.read_table(file, columns=["input_ids"])["input_ids"]
    lengths = pyarrow.compute.list_value_length(rows)
    share = CALIBRATION_TOKENS / max(pyarrow.compute.sum(lengths).as_py(), 1)
    step = max(int(1 / share), 1)
    chosen: list[list[int]] = rows.take(list(range(0, len(rows), step))).to_pylist()
    return chosen
