"""ONNX Runtime, in this process, on encoders that `qkit.export._onnx.encoder` exported, in fp32 or int8; its docstring says what they take.

What makes it fast is to compute little padding: rows of similar length share a batch. And two of ONNX Runtime's fusions are switched off,
whose kernels are slower than the nodes that they replace: SkipLayerNormalization takes about nine times as long as an addition and a
LayerNormalization on a CPU, BiasGelu a quarter longer than an addition and a Gelu.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qkit.core.batching import within_budget
from qkit.core.device import Device, detect
from qkit.core.errors import DataError, MissingExtra, ModelError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Row = Mapping[str, Sequence[int]]
    Ids = NDArray[np.int64]
    Outputs = Mapping[str, NDArray[np.float32]]


GRAPH = "model.onnx"
BATCH_TOKENS = 512  # padded tokens of a forward pass
WINDOW = 4096  # rows that are sorted together; their outputs are in memory at once
SLOW_FUSIONS = ("SkipLayerNormFusion", "BiasGeluFusion")


class EncoderSession:
    """An open model. Several threads may use it at once."""

    def __init__(
        self, folder: Path, device: Device | None = None, *, threads: int = 0, batch_tokens: int = BATCH_TOKENS
    ):
        """Open `folder/model.onnx`. `threads`: of one forward pass, by default as many as the device has cores.

        Raises:
            ModelError: the file is missing or damaged.
            MissingExtra: onnxruntime is not installed.
        """
        device = device or detect()
        self.session = _open(folder, device, threads or device.cores)
        self.batch_tokens = batch_tokens
        self.inputs = [node.name for node in self.session.get_inputs()]
        shapes = {node.name: node.shape for node in self.session.get_outputs()}
        self.outputs = list(shapes)
        self.per_token = {name for name, shape in shapes.items() if not isinstance(shape[1], int)}
        noted = self.session.get_modelmeta().custom_metadata_map
        self.pad, self.positions = int(noted.get("pad", 0)), int(noted.get("positions", 0))

    def logits(self, rows: Sequence[Row]) -> Iterator[Outputs]:
        """Yield the outputs of each row, in the order of the rows: `logits` [labels] or [tokens, labels], or two of [tokens].

        `rows`: `input_ids`, and `token_type_ids` where they are not all 0.

        Raises:
            DataError: a row is empty, or longer than the model's positions.
        """
        for begin in range(0, len(rows), WINDOW):
            part = rows[begin : begin + WINDOW]
            self._check(part, begin)
            yield from self._sorted(part)

    def close(self) -> None:
        """Free the weights."""
        del self.session

    def _check(self, rows: Sequence[Row], begin: int) -> None:
        for index, row in enumerate(rows, begin):
            length = len(row["input_ids"])
            if not length or 0 < self.positions < length:
                limit = f"at most {self.positions}, the positions that it has learnt" if length else "at least one"
                raise DataError(f"row {index} has {length} tokens, and the model takes {limit}; cut or drop the row")

    def _sorted(self, rows: Sequence[Row]) -> Iterator[Outputs]:
        """Yield the outputs of rows that are computed in the order of their lengths."""
        order = sorted(range(len(rows)), key=lambda index: len(rows[index]["input_ids"]))
        results: dict[int, Outputs] = {}
        for batch in within_budget((len(rows[index]["input_ids"]) for index in order), self.batch_tokens):
            places = order[batch.start : batch.stop]
            results.update(zip(places, self._batch([rows[place] for place in places]), strict=True))
        for index in range(len(rows)):
            yield results.pop(index)

    def _batch(self, rows: Sequence[Row]) -> Iterator[Outputs]:
        """Yield the outputs of rows that are computed at once."""
        feed = padded(rows, self.pad)
        arrays = self.session.run(self.outputs, {name: feed[name] for name in self.inputs})
        for index, row in enumerate(rows):
            length = len(row["input_ids"])
            yield {
                name: array[index, :length] if name in self.per_token else array[index]
                for name, array in zip(self.outputs, arrays, strict=True)
            }


def padded(rows: Sequence[Row], pad: int) -> dict[str, Ids]:
    """Return ids, mask and types of rows, [rows, longest], padded on the right."""
    import numpy as np

    longest = max(len(row["input_ids"]) for row in rows)
    ids = np.full((len(rows), longest), pad, np.int64)
    mask, types = np.zeros_like(ids), np.zeros_like(ids)
    for index, row in enumerate(rows):
        length = len(row["input_ids"])
        ids[index, :length] = row["input_ids"]
        mask[index, :length] = 1
        types[index, :length] = row.get("token_type_ids", 0)
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}


def _open(folder: Path, device: Device, threads: int) -> Any:
    """Return an InferenceSession.

    Idle threads sleep instead of spinning: equally fast on an idle machine, and faster next to another busy process. The products of int8
    weights are exact on any CPU: without VNNI instructions, intermediate sums of 16 bits could overflow, and weights become unsigned instead.
    """
    if find_spec("onnxruntime") is None:
        raise MissingExtra(
            f"{folder}: opening it requires onnxruntime: pip install 'qkit[onnx]'", package="onnxruntime"
        )
    import onnxruntime

    file = folder / GRAPH
    if not file.is_file():
        raise ModelError(f"{folder}: not an exported encoder: it has no {GRAPH}; export it again", source=folder)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.x64quantprecision", "1")
    available = onnxruntime.get_available_providers()
    providers = [name for name in device.onnx_providers if name in available]
    try:
        return onnxruntime.InferenceSession(
            str(file), options, providers=providers, disabled_optimizers=list(SLOW_FUSIONS)
        )
    except Exception as error:  # its own types, which have no common one
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(f"{file}: damaged or incomplete ({reason}); export it again", source=file) from error
