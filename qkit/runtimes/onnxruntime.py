"""ONNX Runtime, in this process, on folders made by onnxruntime-genai's model builder; `_onnx_traced.py` opens traced graphs.

Two things make it fast. The cache is shared: each key and value tensor is both input and output of the model, so a step writes one
position and copies nothing. And logits are computed only for the positions that are needed: when the model is opened, its graph gets a
further input, `picked`, which selects hidden states before the head. The file is not changed.

The rows of a batch may differ in length. The builder's attention (GroupQueryAttention) takes a row's length from the sum of its attention
mask, so rows are padded on the right, and a row's next token overwrites its first padded position.

The int4 kernels round activations to 8 bits, which magnifies differences in the last bit of a sum. Logits of a text that is read at once
(`score`) and token by token (`steps`) therefore differ slightly, and near ties may be decided either way. In fp32 both agree.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qkit.core.device import Device
from qkit.core.errors import MissingArtifact, MissingExtra, NotDeployable
from qkit.core.files import read_json
from qkit.core.memory_meter import PeakMeter
from qkit.plugins.runtime import Encodes, RowScores, Runtime, TextRow, TokenRow
from qkit.plugins.task import ModelHead
from qkit.runtimes._onnx_graph import PICKED, batches, predicting_positions, scores_of
from qkit.tasks._encoder.tagging import transitions

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Ids = NDArray[np.int64]


HEADS = ("MatMul", "MatMulNBits", "Gemm")
DTYPES = {"tensor(float)": "float32", "tensor(float16)": "float16"}


def open(artifact: Path, device: Device, **options: Any) -> Runtime | OnnxEncoder:
    """Open a folder with `model.onnx`. Options: `threads` (default: one per physical core); `head`: its `ModelHead`.

    Raises:
        MissingArtifact: the folder was not made by qkit's ONNX export.
        MissingExtra: onnxruntime is not installed.
        NotDeployable: the graph is not one that the builder makes for decoders.
    """
    from qkit.model.provenance import is_traced
    from qkit.runtimes._onnx_traced import TracedRuntime

    head: ModelHead | None = options.get("head")
    if head is not None and not head.generates:
        _need(artifact, ("model.onnx",))
        return OnnxEncoder(artifact, device, PeakMeter(device))
    traced = is_traced(artifact)
    _need(artifact, ("model.onnx",) if traced else ("model.onnx", "genai_config.json"))
    meter = PeakMeter(device)
    session = _session(artifact, device, options.get("threads", 0))
    if traced:
        return TracedRuntime(session, meter)
    return OnnxRuntime(_Model(session, _head_size(artifact)), meter)


def _need(artifact: Path, files: Sequence[str]) -> None:
    if missing := [name for name in ("onnx", "onnxruntime") if find_spec(name) is None]:
        raise MissingExtra(
            f"{artifact}: opening it requires {', '.join(missing)}: pip install 'qkit[onnx]'", package=missing[0]
        )
    if absent := [name for name in files if not (artifact / name).is_file()]:
        message = f"{artifact}: not a folder made by qkit's ONNX export; missing: {', '.join(absent)}"
        raise MissingArtifact(message, path=artifact / absent[0])


def _head_size(artifact: Path) -> int:
    """Return the width of a key; the graph leaves that axis open, since a quantized cache would have another width."""
    return int(read_json(artifact / "genai_config.json")["model"]["decoder"]["head_size"])


class OnnxEncoder(Encodes):
    """The logits of a model with a head on whole texts."""

    def __init__(self, folder: Path, device: Device, meter: PeakMeter):
        from qkit.runtimes._onnx_encoder import EncoderSession

        self.session = EncoderSession(folder, device)
        self.folder = folder
        self.meter = meter

    def logits(self, rows: Sequence[TextRow]) -> Iterator[NDArray[np.float32]]:
        inputs = [
            {name: ids for name in ("input_ids", "token_type_ids") if (ids := getattr(row, name))} for row in rows
        ]
        return (outputs["logits"] for outputs in self.session.logits(inputs))

    def transitions(self) -> Mapping[str, NDArray[np.float32]] | None:
        return transitions.read(self.folder)

    def memory_bytes(self) -> int:
        return self.meter.peak_bytes()

    def close(self) -> None:
        self.session.close()


class OnnxRuntime(Runtime):
    """Greedy decoding and scoring with a graph of the builder."""

    def __init__(self, model: _Model, meter: PeakMeter):
        self.model = model
        self.meter = meter

    def steps(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, stop: frozenset[int]
    ) -> Iterator[dict[int, int]]:
        """Prompts are read in small batches, and the first tokens of each batch are a step; then all prompts advance together."""
        if not prompts:
            return
        batch = _Batch(self.model, prompts, max_new_tokens)
        for begin, end in batches(batch.prompts):
            yield batch.read(begin, end)
        for _ in range(max_new_tokens - 1):
            batch.drop(stop)
            if not batch.order:
                return
            yield batch.step()

    def score(self, rows: Sequence[TokenRow]) -> Iterator[RowScores]:
        for begin, end in batches([row.input_ids for row in rows]):
            yield from _score(self.model, rows[begin:end])

    def memory_bytes(self) -> int:
        return self.meter.peak_bytes()

    def close(self) -> None:
        del self.model


# --- the session ----------------------------------------------------------------------------------------------------


def _session(artifact: Path, device: Device, threads: int) -> Any:
    """Return an InferenceSession on the graph with the input `picked`; weights stay in their file next to model.onnx.

    Idle threads sleep instead of spinning: equally fast on an idle machine, and several times faster next to another busy process.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(artifact.resolve()))
    available = onnxruntime.get_available_providers()
    providers = [name for name in device.onnx_providers if name in available]
    return onnxruntime.InferenceSession(_with_picked(artifact / "model.onnx"), options, providers=providers)


def _with_picked(file: Path) -> bytes:
    """Return the graph of `file` with the input `picked` [n, 2]: row and position of the states that the head is applied to.

    `logits` become [n, vocabulary]. Nodes after the head work on each token separately and need no change.
    """
    import onnx

    model = onnx.load(str(file), load_external_data=False)
    graph = model.graph
    head = _head(graph, file)
    pick = onnx.helper.make_node("GatherND", [head.input[0], PICKED], [f"{PICKED}_states"], name=PICKED)
    head.input[0] = pick.output[0]
    graph.node.insert(list(graph.node).index(head), pick)
    graph.input.append(onnx.helper.make_tensor_value_info(PICKED, onnx.TensorProto.INT64, ["n", 2]))
    logits = next(output for output in graph.output if output.name == "logits").type.tensor_type
    logits.shape.dim[0].Clear()
    del logits.shape.dim[1]
    del graph.value_info[:]  # the shapes between head and logits no longer hold; ONNX Runtime infers them again
    serialized: bytes = model.SerializeToString()
    return serialized


def _head(graph: Any, file: Path) -> Any:
    """Return the matrix product that computes `logits`, possibly followed by a scale or a cast."""
    makers = {name: node for node in graph.node for name in node.output}
    node = makers.get("logits")
    while node is not None and node.op_type not in HEADS:
        node = makers.get(node.input[0])
    if node is None:
        raise NotDeployable(
            f"{file}: `logits` are not the result of a matrix product; was this file made by qkit's export?"
        )
    return node


class _Model:
    """A session and its named inputs: takes token ids and their positions, returns logits."""

    def __init__(self, session: Any, head_size: int):
        inputs = {node.name: node for node in session.get_inputs()}
        self.session = session
        self.head_size = head_size
        self.caches = [node for name, node in inputs.items() if name.startswith("past_key_values.")]
        self.takes_positions = "position_ids" in inputs
        self.logits = next(node for node in session.get_outputs() if node.name == "logits")
        known = {"input_ids", "attention_mask", "position_ids", PICKED, *(node.name for node in self.caches)}
        if unknown := sorted(inputs.keys() - known):
            raise NotDeployable(
                f"onnxruntime opens decoders with a key-value cache only; this model also has the inputs {', '.join(unknown)}"
            )

    def run(self, binding: Any, ids: Ids, past: Ids, new: Ids, picked: Ids) -> NDArray[Any]:
        """Return the logits [n, vocabulary] at `picked` [n, 2], for right-padded `ids` [rows, width].

        `new` [rows]: how many tokens of each row are real. They follow the `past` [rows] tokens in the cache of `binding`.
        """
        import numpy as np

        lengths = past + new
        binding.bind_cpu_input("input_ids", ids)
        binding.bind_cpu_input("attention_mask", (np.arange(lengths.max()) < lengths[:, None]).astype(np.int64))
        binding.bind_cpu_input(PICKED, picked)
        if self.takes_positions:
            binding.bind_cpu_input("position_ids", past[:, None] + np.arange(ids.shape[1]))
        logits = np.empty((len(picked), self.logits.shape[-1]), DTYPES[self.logits.type])
        _bind(binding.bind_output, "logits", logits)
        self.session.run_with_iobinding(binding)
        return logits


class _Cache:
    """Keys and values of a batch, which the model writes to: two arrays [rows, heads, capacity, head size] for each layer."""

    def __init__(self, model: _Model, rows: int, capacity: int):
        import numpy as np

        self.session = model.session
        self.arrays = {
            node.name: np.zeros((rows, node.shape[1], capacity, model.head_size), DTYPES[node.type])
            for node in model.caches
        }

    def binding(self, begin: int, end: int) -> Any:
        """Return a binding of the model to these rows of the cache; it can be used for any number of runs."""
        binding = self.session.io_binding()
        for name, array in self.arrays.items():
            _bind(binding.bind_input, name, array[begin:end])
            _bind(binding.bind_output, name.replace("past_key_values", "present"), array[begin:end])
        return binding

    def move(self, source: int, target: int) -> None:
        """Overwrite row `target` with row `source`."""
        for array in self.arrays.values():
            array[target] = array[source]


def _bind(bind: Any, name: str, array: NDArray[Any]) -> None:
    """Let the session read or write an array in place; the caller must keep it alive."""
    bind(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)


# --- generating -----------------------------------------------------------------------------------------------------


class _Batch:
    """Prompts that are continued together, shortest first.

    `order` holds the index of the prompt of each unfinished row. These rows come first in the cache: when one ends, the last takes its place.
    """

    def __init__(self, model: _Model, prompts: Sequence[Sequence[int]], max_new_tokens: int):
        import numpy as np

        self.model = model
        self.order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
        self.prompts = [prompts[index] for index in self.order]
        self.lengths = np.array([len(prompt) for prompt in self.prompts])  # tokens of each row in the cache
        self.tokens = np.zeros(len(prompts), np.int64)  # the newest of each row, not yet in the cache
        self.cache = _Cache(model, len(prompts), int(self.lengths[-1]) + max_new_tokens)
        self.binding: Any = None

    def read(self, begin: int, end: int) -> dict[int, int]:
        """Read the prompts of these rows, and return their first tokens."""
        import numpy as np

        new = self.lengths[begin:end]
        last = np.stack([np.arange(len(new)), new - 1], axis=1)
        ids = _padded(self.prompts[begin:end])
        logits = self.model.run(self.cache.binding(begin, end), ids, np.zeros_like(new), new, last)
        self.tokens[begin:end] = logits.argmax(-1)
        return self._newest(begin, end)

    def step(self) -> dict[int, int]:
        """Decode one more token of each row."""
        import numpy as np

        count = len(self.order)
        self.binding = self.binding or self.cache.binding(0, count)
        past, one = self.lengths[:count], np.ones(count, np.int64)
        picked = np.stack([np.arange(count), np.zeros_like(one)], axis=1)
        logits = self.model.run(self.binding, self.tokens[:count, None], past, one, picked)
        self.tokens[:count] = logits.argmax(-1)
        self.lengths[:count] += 1
        return self._newest(0, count)

    def drop(self, stop: frozenset[int]) -> None:
        """Remove the rows whose newest token is in `stop`."""
        ended = [row for row, index in enumerate(self.order) if int(self.tokens[row]) in stop]
        for row in reversed(ended):
            last = len(self.order) - 1
            if row < last:
                self.cache.move(last, row)
                self.lengths[row], self.tokens[row] = self.lengths[last], self.tokens[last]
                self.order[row] = self.order[last]
            self.order.pop()
            self.binding = None

    def _newest(self, begin: int, end: int) -> dict[int, int]:
        return dict(zip(self.order[begin:end], self.tokens[begin:end].tolist(), strict=True))


def _padded(rows: Sequence[Sequence[int]]) -> Ids:
    """Return token ids [rows, longest], padded with 0 on the right."""
    import numpy as np

    ids = np.zeros((len(rows), max(map(len, rows))), np.int64)
    for index, row in enumerate(rows):
        ids[index, : len(row)] = row
    return ids


# --- scoring --------------------------------------------------------------------------------------------------------


def _score(model: _Model, rows: Sequence[TokenRow]) -> Iterator[RowScores]:
    """Score rows in one forward pass; logits are computed only where they predict a completion token."""
    import numpy as np

    ids = _padded([row.input_ids for row in rows])
    new = np.array([len(row.input_ids) for row in rows])
    picked = np.array(
        [(index, place) for index, row in enumerate(rows) for place in predicting_positions(row)], np.int64
    )
    cache = _Cache(model, len(rows), ids.shape[1])
    logits = model.run(cache.binding(0, len(rows)), ids, np.zeros_like(new), new, picked.reshape(-1, 2))
    yield from scores_of(rows, logits)
