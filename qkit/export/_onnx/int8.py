"""Quantizes the matrices and the embedding of a traced encoder to 8 bits, for integer products on a CPU.

A weight is a signed integer of 8 bits times the scale of its column. The states that it is multiplied by are rounded to unsigned 8 bits with
one scale for the whole tensor, since no kernel is quick with more:

- with rows to calibrate on, the scale is fixed when the file is made. A row's outputs then do not depend on the batch that it is in. Where it
  brings the products closer, states are divided by a factor for each channel first, and the weights multiplied by it: a few channels with
  large values no longer decide the precision of all others (the method is called SmoothQuant; here each matrix chooses the strength itself).
- without rows, the scale is taken from each batch as it comes.

Heads stay in fp32: a head is small, and nothing after it evens out its errors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qkit.export._onnx.graph import MICROSOFT, EditedGraph
from qkit.export._onnx.matmul_nbits import GRAPH
from qkit.export._onnx.observed import Observed, observe

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Array = NDArray[np.float32]


TOP = 127  # of a weight's code; -128 is not used
STRENGTHS = (0.0, 0.5, 0.6, 0.7, 0.8, 0.9)  # that a matrix chooses from: 0 leaves the states as they are
WORTH = 0.9  # a strength above 0 costs a product for each state: it must bring the error below this part
PRODUCTS = ("MatMul", "Gemm")
TABLE_ROWS = 1024  # of the smallest embedding that is quantized


@dataclass(frozen=True)
class Group:
    """The products of the same states with several matrices. `nodes` and `weights` belong together."""

    states: str
    nodes: tuple[Any, ...]
    weights: tuple[str, ...]


@dataclass(frozen=True)
class Codes:
    """A matrix as codes [inputs, outputs], int8, and a scale for each output."""

    codes: NDArray[np.int8]
    scales: Array

    def weight(self) -> Array:
        return self.codes * self.scales


@dataclass(frozen=True)
class Grid:
    """Unsigned codes of states: state = (code - zero) * scale * factor of its channel. `factors`: None for ones."""

    scale: np.float32
    zero: np.uint8
    factors: Array | None

    def rounded(self, states: Array) -> Array:
        """Return the states that the codes of `states` [tokens, channels] stand for, without the factors."""
        import numpy as np

        codes = np.rint(states * self._inverse() / self.scale) + np.float32(self.zero)
        rounded: Array = (codes.clip(0, 255) - np.float32(self.zero)) * self.scale
        return rounded

    def _inverse(self) -> Any:
        return 1.0 if self.factors is None else 1 / self.factors


def quantize_int8(
    fp32: Path,
    out: Path,
    calibration: Sequence[Mapping[str, Sequence[int]]] | None = None,
    *,
    per_channel: bool = True,
    strengths: Sequence[float] = STRENGTHS,
) -> Path:
    """Write `out/model.onnx`, the quantized graph of the folder `fp32` that `export_encoder` made; return the file.

    Args:
        calibration: rows as `EncoderSession.logits` takes them, of the kind that will be asked; some hundred are enough.
        per_channel: one scale for each column of a matrix; False is for comparisons: slightly faster, and several times as far from fp32.
        strengths: of the factors that divide states, to choose from.
    """
    graph = EditedGraph.read(fp32 / GRAPH)
    groups = list(_groups(graph))
    observed = observe(fp32, [group.states for group in groups], calibration) if calibration else {}
    changed: dict[str, list[Any]] = {}  # by the output of the node that is replaced
    for group in groups:
        changed.update(_quantized(graph, group, observed.get(group.states), per_channel, strengths))
    for node in graph.nodes:
        changed.update(_table(graph, node))
    graph.replace(lambda node: changed.get(node.output[0]))
    out.mkdir(exist_ok=True)
    return graph.save(out)


def _groups(graph: EditedGraph) -> Iterator[Group]:
    """Yield the products with constant matrices, except heads."""
    heads, found = _heads(graph), dict[str, list[Any]]()
    for node in graph.nodes:
        if node.op_type == "MatMul" and node.output[0] not in heads and graph.is_matrix(node.input[1]):
            found.setdefault(node.input[0], []).append(node)
    for states, nodes in found.items():
        yield Group(states, tuple(nodes), tuple(node.input[1] for node in nodes))


def _heads(graph: EditedGraph) -> set[str]:
    """Return the results of the last product on each way to an output."""
    makers = {name: node for node in graph.nodes for name in node.output}
    heads, names = set(), [output.name for output in graph.model.graph.output]
    while names:
        node = makers.get(names.pop())
        if node is not None and node.op_type in PRODUCTS:
            heads.add(node.output[0])
        elif node is not None:
            names.extend(node.input)
    return heads


# --- products ---------------------------------------------------------------------------------------------------------


def _quantized(
    graph: EditedGraph, group: Group, observed: Observed | None, per_channel: bool, strengths: Sequence[float]
) -> Iterator[tuple[str, list[Any]]]:
    """Yield the nodes in the place of each node of the group, and of the additions of a bias that they also do."""
    weights = [graph.array(name) for name in group.weights]
    grid = None if observed is None else _best(observed, weights, per_channel, strengths)
    before, states = _rounding(graph, group, grid)
    readers = graph.readers()
    for node, weight in zip(group.nodes, weights, strict=True):
        factors = None if grid is None else grid.factors
        codes = encode(weight if factors is None else weight * factors[:, None], per_channel)
        addition, bias = _bias(graph, readers[node.output[0]], node.output[0], weight.shape[1])
        result = node.output[0] if addition is None else addition.output[0]
        yield node.output[0], [*before, _product(graph, node, codes, states, bias, result)]
        if addition is not None:
            yield addition.output[0], []
        before = []


def _rounding(graph: EditedGraph, group: Group, grid: Grid | None) -> tuple[list[Any], list[str]]:
    """Return the nodes that round the states, and the names of their codes, scale and zero point."""
    import onnx

    make, name = onnx.helper.make_node, group.states
    names = [f"{name}.{part}" for part in ("codes", "scale", "zero")]
    if grid is None:
        return [make("DynamicQuantizeLinear", [name], names)], names
    graph.add(names[1], grid.scale), graph.add(names[2], grid.zero)
    if grid.factors is None:
        return [make("QuantizeLinear", [name, *names[1:]], names[:1])], names
    graph.add(f"{name}.factors", 1 / grid.factors)
    divided = make("Mul", [name, f"{name}.factors"], [f"{name}.divided"])
    return [divided, make("QuantizeLinear", [f"{name}.divided", *names[1:]], names[:1])], names


def _product(graph: EditedGraph, node: Any, codes: Codes, states: list[str], bias: str, result: str) -> Any:
    """Return the node that multiplies codes, adds the bias, and gives fp32."""
    import numpy as np
    import onnx

    name, (of_states, scale, zero) = node.output[0], states
    weight = graph.add(f"{name}.weight_codes", codes.codes)
    scales = graph.add(f"{name}.weight_scales", codes.scales)
    zeros = graph.add(f"{name}.weight_zeros", np.zeros_like(codes.scales, np.int8))
    inputs = [of_states, weight, scale, scales, zero, zeros, bias]
    return onnx.helper.make_node("MatMulIntegerToFloat", inputs, [result], node.name, domain=MICROSOFT)


def _bias(graph: EditedGraph, readers: Sequence[Any], product: str, outputs: int) -> tuple[Any, str]:
    """Return the node that adds a bias to a product which nothing else reads, and the bias; (None, "") if there is none."""
    if len(readers) == 1 and readers[0] is not None and readers[0].op_type == "Add":
        for name in readers[0].input:
            if name != product and graph.is_constant(name) and list(graph.tensors[name].dims) == [outputs]:
                return readers[0], name
    return None, ""


def encode(weight: Array, per_channel: bool = True) -> Codes:
    """Round a matrix [inputs, outputs] to 8 bits."""
    import numpy as np

    largest = np.abs(weight).max(axis=0 if per_channel else None)
    scales = np.maximum(largest / TOP, np.float32(1e-12)).astype(np.float32)
    return Codes(np.rint(weight / scales).clip(-TOP, TOP).astype(np.int8), scales)


def _best(observed: Observed, weights: Sequence[Array], per_channel: bool, strengths: Sequence[float]) -> Grid:
    """Return the grid whose products with the sampled states are closest to those in fp32."""
    import numpy as np

    weight = np.concatenate(weights, axis=1)
    exact = observed.sample @ weight
    best, least = None, np.inf
    for strength in strengths:
        grid = _grid(observed, weight, strength)
        factors = 1 if grid.factors is None else grid.factors[:, None]
        products = grid.rounded(observed.sample) @ encode(weight * factors, per_channel).weight()
        error = float(np.square(products - exact).sum())
        if best is None or error < least * (WORTH if best.factors is None else 1):
            best, least = grid, error
    assert best is not None
    return best


def _grid(observed: Observed, weight: Array, strength: float) -> Grid:
    """Return the grid that holds all states that were observed, after division by factors of this strength."""
    import numpy as np

    factors = None
    if strength:
        largest = np.maximum(np.abs(observed.low), np.abs(observed.high)).clip(min=1e-5)
        factors = (largest**strength / np.abs(weight).max(axis=1).clip(min=1e-5) ** (1 - strength)).astype(np.float32)
    divisor = 1 if factors is None else factors
    high, low = max(float((observed.high / divisor).max()), 0.0), min(float((observed.low / divisor).min()), 0.0)
    scale = np.float32(max((high - low) / 255, 1e-12))
    return Grid(scale, np.uint8(np.clip(np.rint(-low / scale), 0, 255)), factors)


# --- embeddings -------------------------------------------------------------------------------------------------------


def _table(graph: EditedGraph, node: Any) -> Iterator[tuple[str, list[Any]]]:
    """Yield the nodes in the place of a look-up in a large table: each of its rows has a scale."""
    import numpy as np
    import onnx

    if node.op_type != "Gather" or not graph.is_constant(node.input[0]):
        return
    table = graph.array(node.input[0])
    if table.dtype != np.float32 or table.ndim != 2 or len(table) < TABLE_ROWS:
        return
    make, name, ids = onnx.helper.make_node, node.output[0], node.input[1]
    codes = encode(table.T)
    graph.add(f"{name}.table_codes", codes.codes.T), graph.add(f"{name}.table_scales", codes.scales[:, None])
    row, scale, numbers = (f"{name}.table_{part}" for part in ("row", "scale", "numbers"))
    changed = [
        make("Gather", [f"{name}.table_codes", ids], [row]),
        make("Gather", [f"{name}.table_scales", ids], [scale]),
        make("Cast", [row], [numbers], to=onnx.TensorProto.FLOAT),
        make("Mul", [numbers, scale], [name]),
    ]
    yield name, changed
