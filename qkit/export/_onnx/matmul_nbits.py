"""ONNX Runtime's low-bit matrices (MatMulNBits): their byte layout, and how to replace those of a built graph.

The nodes, names and shapes of the builder's graph stay; the contents of the matrices change, and possibly their number of bits. An embedding
that is tied to the head reads the head's tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from qkit.export._onnx.gptq import Rounded

    Bytes = NDArray[np.uint8]


GRAPH = "model.onnx"
DATA = "model.onnx.data"
ALIGNMENT = 64  # of a tensor in the data file, in bytes


@dataclass(frozen=True)
class Matrix:
    """A matrix of the graph; a name is for example `/model/layers.0/attn/o_proj`."""

    name: str
    inputs: int
    outputs: int
    bits: int
    block: int


def pack(codes: Bytes, bits: int) -> Bytes:
    """Pack codes [..., n] into bytes [..., n * bits / 8 rounded up]; the first code of a byte is in its lowest bits."""
    import numpy as np

    each = 8 // bits
    padded = np.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, -codes.shape[-1] % each)])
    packed: Bytes = padded[..., ::each].copy()
    for place in range(1, each):
        packed |= padded[..., place::each] << (place * bits)
    return packed


def unpack(packed: Bytes, bits: int, count: int) -> Bytes:
    """Return the first `count` codes along the last axis; the inverse of `pack`."""
    import numpy as np

    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    codes: Bytes = (packed[..., None] >> shifts) & (2**bits - 1)
    return codes.reshape(*packed.shape[:-1], -1)[..., :count]


def tensors(rounded: Rounded) -> tuple[Bytes, NDArray[np.float32], Bytes]:
    """Return the inputs of a node: codes [outputs, blocks, bytes of a block], scales [outputs, blocks], and packed zero points."""
    import numpy as np

    bits, block = rounded.grid.bits, rounded.grid.block
    outputs, blocks = rounded.grid.scales.shape
    codes = np.zeros((outputs, blocks * block), np.uint8)
    codes[:, : rounded.codes.shape[1]] = rounded.codes.numpy()
    zeros = rounded.grid.zeros.numpy().astype(np.uint8)
    return pack(codes.reshape(outputs, blocks, block), bits), rounded.grid.scales.numpy(), pack(zeros, bits)


class Graph:
    """The graph in the folder `built`, whose matrices can be replaced; `save` writes it to `out`.

    New tensors are written to the data file at once, and the others are copied after them, so only one matrix is in memory at a time.
    """

    def __init__(self, built: Path, out: Path):
        import onnx

        self.built, self.out = built, out
        self.model = onnx.load(str(built / GRAPH), load_external_data=False)
        self.tensors = {tensor.name: tensor for tensor in self.model.graph.initializer}
        self.nodes = {_name(node): node for node in self.model.graph.node if node.op_type == "MatMulNBits"}
        self.matrices = [_matrix(name, node) for name, node in self.nodes.items()]
        self.data = (out / DATA).open("wb")
        self.written: set[str] = set()  # names of tensors
        self.replaced: set[str] = set()  # and of matrices

    def __enter__(self) -> Graph:
        return self

    def __exit__(self, *_: Any) -> None:
        self.data.close()

    def weight(self, matrix: Matrix) -> NDArray[np.float32]:
        """Return the dequantized matrix of the builder's graph, [outputs, inputs]."""
        import numpy as np

        packed, scales, *zeros = (self._read(name) for name in self.nodes[matrix.name].input[1:4])
        codes = unpack(packed, matrix.bits, matrix.block).astype(np.float32)
        zero: Any = 2.0 ** (matrix.bits - 1)  # the default of a node without zero points
        if zeros:
            zero = unpack(zeros[0].reshape(matrix.outputs, -1), matrix.bits, packed.shape[1])[..., None]
        cut = (codes - zero) * scales.reshape(*packed.shape[:2], 1)
        whole: NDArray[np.float32] = cut.reshape(matrix.outputs, -1)[:, : matrix.inputs]
        return whole

    def replace(self, matrix: Matrix, rounded: Rounded) -> None:
        """Replace a matrix by `rounded`, which has the same shape and blocks."""
        node, bits = self.nodes[matrix.name], rounded.grid.bits
        self.replaced.add(matrix.name)
        if len(node.input) < 4:
            self._add_zeros(node.input[2])
        arrays: tuple[NDArray[Any], ...] = tensors(rounded)
        for name, array in zip(node.input[1:4], arrays, strict=True):
            self.tensors[name].dims[:] = array.shape
            self._write(name, array.data)
        next(attribute for attribute in node.attribute if attribute.name == "bits").i = bits
        node.name = f"{matrix.name}/MatMul_Q{bits}"

    def _add_zeros(self, scales: str) -> None:
        """Add a tensor of zero points to the nodes that read these scales: a matrix, and an embedding if one is tied to it."""
        import onnx

        zeros = f"{scales}_zeros"
        external = onnx.TensorProto.EXTERNAL
        self.model.graph.initializer.add(name=zeros, data_type=onnx.TensorProto.UINT8, data_location=external)
        self.tensors[zeros] = self.model.graph.initializer[-1]
        for node in self.model.graph.node:
            if len(node.input) == 3 and node.input[2] == scales:
                node.input.append(zeros)

    def save(self) -> None:
        """Write the tensors that were not replaced, and the graph."""
        for name, tensor in self.tensors.items():
            if name not in self.written and tensor.external_data:
                self._write(name, self._bytes(name))
        self.data.flush()
        (self.out / GRAPH).write_bytes(self.model.SerializeToString())

    def _write(self, name: str, content: Any) -> None:
        self.data.write(bytes(-self.data.tell() % ALIGNMENT))
        begin = self.data.tell()
        self.data.write(content)
        _set_location(self.tensors[name], begin, self.data.tell() - begin)
        self.written.add(name)

    def _read(self, name: str) -> NDArray[Any]:
        import numpy as np
        import onnx

        tensor = self.tensors[name]
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
        return np.frombuffer(self._bytes(name), dtype).reshape(tuple(tensor.dims))

    def _bytes(self, name: str) -> bytes:
        location = _location(self.tensors[name])
        with (self.built / location["location"]).open("rb") as file:
            file.seek(int(location.get("offset", 0)))
            return file.read(int(location["length"]))


def _name(node: Any) -> str:
    """Return the name of a node's matrix: `/model/layers.0/attn/o_proj` for `/model/layers.0/attn/o_proj/MatMul_Q4`."""
    name: str = node.name.rpartition("/MatMul")[0]
    return name


def _matrix(name: str, node: Any) -> Matrix:
    values = {attribute.name: attribute.i for attribute in node.attribute}
    return Matrix(name, values["K"], values["N"], values["bits"], values["block_size"])


def _location(tensor: Any) -> Mapping[str, str]:
    return {entry.key: entry.value for entry in tensor.external_data}


def _set_location(tensor: Any, begin: int, length: int) -> None:
    tensor.ClearField("external_data")
    for key, value in (("location", DATA), ("offset", begin), ("length", length)):
        tensor.external_data.add(key=key, value=str(value))
