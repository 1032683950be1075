"""A graph in memory, with its weights, whose nodes are replaced."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qkit.export._onnx.matmul_nbits import DATA, GRAPH

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Array = NDArray[Any]
    Matrix = NDArray[np.float32]


FILE_LIMIT = 2**31 - 2**20  # bytes of weights: a protobuf file holds less than 2 GiB
RESHAPES = ("Reshape",)
MICROSOFT = "com.microsoft"


@dataclass(frozen=True)
class Projection:
    """states @ weight + bias, as names of the graph."""

    states: str
    weight: str
    bias: str


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

    def is_constant(self, name: str) -> bool:
        return name in self.tensors

    def array(self, name: str) -> Array:
        """Return the values of an initializer."""
        import onnx

        values: Array = onnx.numpy_helper.to_array(self.tensors[name])
        return values

    def add(self, name: str, values: Array) -> str:
        """Add an initializer, and return its name; one that exists stays as it is."""
        import numpy as np
        import onnx

        if name not in self.tensors:
            self.model.graph.initializer.append(onnx.numpy_helper.from_array(np.ascontiguousarray(values), name))
            self.tensors[name] = self.model.graph.initializer[-1]
        return name

    def replace(self, change: Callable[[Any], Iterable[Any] | None]) -> None:
        """Put the nodes that `change` returns in the place of each node; None leaves it as it is."""
        nodes = []
        for node in list(self.model.graph.node):
            changed = change(node)
            nodes.extend([node] if changed is None else changed)
        del self.model.graph.node[:]
        self.model.graph.node.extend(nodes)

    def join_projections(self) -> None:
        """Compute query, key and value of a layer in one product where they are three of the same states."""
        makers = {name: node for node in self.model.graph.node for name in node.output}

        def joined(node: Any) -> Iterable[Any] | None:
            parts = [self._projection(makers, name) for name in node.input[:3]] if _attends(node) else []
            found = [part for part in parts if part is not None]
            if len(found) < 3 or len({part.states for part in found}) > 1:
                return None
            return [self._joined(node, found)]

        self.replace(joined)

    def _projection(self, makers: Mapping[str, Any], name: str) -> Projection | None:
        """Return the projection whose result `name` is, but for its shape."""
        node = makers.get(name)
        while node is not None and node.op_type in RESHAPES:
            node = makers.get(node.input[0])
        if node is None or node.op_type != "Add":
            return None
        for product, bias in (node.input, reversed(node.input)):
            maker = makers.get(product)
            if maker is not None and maker.op_type == "MatMul" and self.is_constant(bias):
                weight = maker.input[1]
                return Projection(maker.input[0], weight, bias) if self.is_constant(weight) else None
        return None

    def _joined(self, node: Any, parts: list[Projection]) -> Any:
        """Return an Attention node, which computes the products itself."""
        import numpy as np
        import onnx

        weights = [self.array(part.weight) for part in parts]
        weight = self.add(f"{node.name}.weight", np.concatenate(weights, axis=1))
        bias = self.add(f"{node.name}.bias", np.concatenate([self.array(part.bias) for part in parts]))
        kept = {attribute.name: attribute for attribute in node.attribute}
        padding, added = (*node.input[3:], "", "", "")[1:3]
        return onnx.helper.make_node(
            "Attention",
            [parts[0].states, weight, bias, padding, "", added],
            list(node.output),
            node.name,
            domain=MICROSOFT,
            num_heads=kept["num_heads"].i,
            scale=kept["scale"].f,
            qkv_hidden_sizes=[part.shape[1] for part in weights],
        )

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
    yield from node.input
    for attribute in node.attribute:
        for inner in attribute.g.node:
            yield from _reads(inner)


def _attends(node: Any) -> bool:
    return node.op_type == "MultiHeadAttention" and not any(node.input[3:4])
