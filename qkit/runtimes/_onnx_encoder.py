"""ONNX Runtime, in this process, on encoders that `qkit.export._onnx.encoder` exported, in fp32 or int8; its docstring says what they take.

Four things make it fast on a CPU. Only rows of the same length share a batch, so there is no padding, neither to compute nor to hide, and
ONNX Runtime's quick attention, which takes no mask, can be used. Several batches run at once, one on each core, since these small products
gain little from sharing one. And two of ONNX Runtime's fusions are switched off, whose kernels are slower than the nodes that they replace:
SkipLayerNormalization takes about nine times as long as an addition and a LayerNormalization, BiasGelu a quarter longer than an addition and
a Gelu. benchmarks/encoder_onnx.py measures what this brings.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qkit.core.batching import within_budget
from qkit.core.device import Device, detect
from qkit.core.errors import DataError, MissingExtra, ModelError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Row = Mapping[str, Sequence[int]]
    Outputs = Mapping[str, NDArray[np.float32]]


GRAPH = "model.onnx"
BATCH_TOKENS = 512  # tokens of a forward pass; a longer row has one to itself
WINDOW = 4096  # rows that are sorted together; their outputs are in memory at once
SLOW_FUSIONS = ("SkipLayerNormFusion", "BiasGeluFusion")


class EncoderSession:
    """An open model. Several threads may use it at once."""

    def __init__(
        self,
        folder: Path,
        device: Device | None = None,
        *,
        threads: int | None = None,
        batch_tokens: int = BATCH_TOKENS,
    ):
        """Open `folder/model.onnx`. `threads`: batches that run at once, and threads of one that runs alone; by default one for each core.

        Raises:
            ModelError: the file is missing or damaged.
            MissingExtra: onnxruntime is not installed.
        """
        device = device or detect()
        threads = threads or device.cores
        self.session = _open(folder, device, threads)
        self.pool = ThreadPoolExecutor(threads, thread_name_prefix="onnx")
        self.batch_tokens = batch_tokens
        self.inputs = [node.name for node in self.session.get_inputs()]
        self.outputs = [node.name for node in self.session.get_outputs()]
        noted = self.session.get_modelmeta().custom_metadata_map
        self.positions = int(noted.get("positions", 0))

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
        """End the threads, and free the weights."""
        self.pool.shutdown()
        del self.session

    def _check(self, rows: Sequence[Row], begin: int) -> None:
        for index, row in enumerate(rows, begin):
            length = len(row["input_ids"])
            if not length or 0 < self.positions < length:
                limit = f"at most {self.positions}, the positions that it has learnt" if length else "at least one"
                raise DataError(f"row {index} has {length} tokens, and the model takes {limit}; cut or drop the row")

    def _sorted(self, rows: Sequence[Row]) -> Iterator[Outputs]:
        """Yield the outputs of rows that are computed in the order of their lengths."""
        results: dict[int, Outputs] = {}
        batches = list(equal_batches([len(row["input_ids"]) for row in rows], self.batch_tokens))
        run = map if len(batches) == 1 else self.pool.map
        computed = run(self._batch, [[rows[index] for index in places] for places in batches])
        for places, outputs in zip(batches, computed, strict=True):
            results.update(zip(places, outputs, strict=True))
        for index in range(len(rows)):
            yield results.pop(index)

    def _batch(self, rows: Sequence[Row]) -> list[Outputs]:
        """Return the outputs of rows of one length."""
        feed = stacked(rows)
        arrays = self.session.run(self.outputs, {name: feed[name] for name in self.inputs})
        return [{name: array[i] for name, array in zip(self.outputs, arrays, strict=True)} for i in range(len(rows))]


def equal_batches(lengths: Sequence[int], budget: int) -> Iterator[list[int]]:
    """Yield the indices of each batch: rows of the same length, the longest first, and at most `budget` tokens.

    The longest come first so that no core is left with a long batch at the end.
    """
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    for length, run in groupby(order, key=lambda index: lengths[index]):
        places = list(run)
        for cut in within_budget([length] * len(places), budget):
            yield places[cut.start : cut.stop]


def stacked(rows: Sequence[Row]) -> dict[str, NDArray[np.int64]]:
    """Return ids, mask and types of rows of one length, [rows, length]."""
    import numpy as np

    ids = np.array([row["input_ids"] for row in rows], np.int64)
    zeros = [0] * ids.shape[1]
    types = np.array([row.get("token_type_ids", zeros) for row in rows], np.int64)
    return {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": types}


def _open(folder: Path, device: Device, threads: int) -> Any:
    """Return an InferenceSession.

    Idle threads sleep instead of spinning: equally fast on an idle machine, and faster next to another busy process. Where sums of int8
    products could overflow, ONNX Runtime is told to make the weights unsigned. It would do so on any x86 CPU, at half the speed: its test is
    only whether unsigned weights have a kernel of their own.
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
    if not device.sums_int8_exactly:
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
