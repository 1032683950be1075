"""A graph in memory, with its weights, whose nodes are replaced."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qkit.export._onnx.matmul_nbits import DATA, GRAPH

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]


FILE_LIMIT = 2**31 - 2**24  # bytes of weights: a protobuf file holds less than 2 GiB, and the nodes need some of it
MICROSOFT = "com.microsoft"


class EditedGraph:
    """A model of `onnx`, with what its initializers hold by name."""

    def __init__(self, model: Any):
        self.model = model
        self.tensors = {tensor.name: tensor for tensor in model.graph.initializer}

    @classmethod
    def read(cls, file: Path) -> EditedGraph:
        """Read a file with its external data."""
        import onnx

        return cls(onnx.load(str(file)))

    @property
    def nodes(self) -> list[Any]:
        return list(self.model.graph.node)

    def is_constant(self, name: str) -> bool:
        return name in self.tensors

    def is_matrix(self, name: str) -> bool:
        return name in self.tensors and len(self.tensors[name].dims) == 2

    def array(self, name: str) -> Array:
        """Return the values of an initializer."""
        import onnx

        values: Array = onnx.numpy_helper.to_array(self.tensors[name])
        return values

    def add(self, name: str, values: Any) -> str:
        """Add an initializer, and return its name; one that exists stays as it is."""
        import numpy as np
        import onnx

        if name not in self.tensors:
            # Not ascontiguousarray, which makes a list of one of a scalar
            self.model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(values, order="C"), name))
            self.tensors[name] = self.model.graph.initializer[-1]
        return name

    def replace(self, change: Callable[[Any], Iterable[Any] | None]) -> None:
        """Put the nodes that `change` returns in the place of each node; None leaves it as it is."""
        nodes: list[Any] = []
        for node in self.nodes:
            changed = change(node)
            nodes.extend([node] if changed is None else changed)
        del self.model.graph.node[:]
        self.model.graph.node.extend(nodes)

    def readers(self) -> Mapping[str, list[Any]]:
        """Return the nodes that read each name; a graph's output counts as read by None."""
        readers: dict[str, list[Any]] = {output.name: [None] for output in self.model.graph.output}
        for node in self.nodes:
            for name in _reads(node):
                readers.setdefault(name, []).append(node)
        return readers

    def describe(self, values: Mapping[str, str]) -> None:
        """Set the file's metadata."""
        import onnx

        onnx.helper.set_model_props(self.model, dict(values))

    def save(self, out: Path) -> Path:
        """Write `model.onnx` to the folder `out`, without what nothing uses; the weights apart if they are too many for one file."""
        import onnx

        self._drop_unused()
        large = sum(len(tensor.raw_data) for tensor in self.model.graph.initializer) > FILE_LIMIT
        (out / DATA).unlink(missing_ok=True)  # onnx appends to a file that exists
        onnx.save(self.model, str(out / GRAPH), save_as_external_data=large, location=DATA)
        return out / GRAPH

    def _drop_unused(self) -> None:
        """Remove nodes and initializers that no output depends on, shapes that may no longer hold, and operator sets of no node."""
        graph = self.model.graph
        used, kept = {output.name for output in graph.output}, []
        for node in reversed(graph.node):
            if used.intersection(node.output):
                kept.append(node)
                used.update(_reads(node))
        for field, values in (
            (graph.node, kept[::-1]),
            (graph.initializer, [tensor for tensor in graph.initializer if tensor.name in used]),
            (graph.value_info, []),
            (self.model.opset_import, [one for one in self.model.opset_import if one.domain in ("", MICROSOFT)]),
        ):
            rest = list(values)
            del field[:]
            field.extend(rest)


def _reads(node: Any) -> Iterator[str]:
    """Yield the names that a node reads, those of its branches included."""
    yield from filter(None, node.input)
    for attribute in node.attribute:
        for inner in attribute.g.node:
            yield from _reads(inner)
