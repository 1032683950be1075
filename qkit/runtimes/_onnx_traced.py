"""ONNX Runtime, in this process, on graphs that transformers' exporter traced; `qkit.export._onnx.trace` documents their inputs.

Rows are padded on the left, and the cache that one step returns is the input of the next, so each step copies it. onnxruntime-genai does
not open these graphs. Logits are computed only for the positions that are needed, as with the builder's graphs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from qkit.core.memory_meter import PeakMeter
from qkit.plugins.runtime import RowScores, Runtime, TokenRow
from qkit.runtimes._onnx_graph import PICKED, batches, predicting_positions, scores_of

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Ids = NDArray[np.int64]

    Cache = Mapping[str, NDArray[np.float32]]


class TracedRuntime(Runtime):
    """Greedy decoding and scoring with a traced graph."""

    def __init__(self, session: Any, meter: PeakMeter):
        self.session = session
        self.meter = meter
        self.inputs = {node.name: node for node in session.get_inputs()}
        self.caches = [name for name in self.inputs if name.startswith("past_key_values.")]
        self.vocabulary = session.get_outputs()[0].shape[-1]
        self.outputs = ["logits", *(name.replace("past_key_values", "present") for name in self.caches)]

    def steps(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, stop: frozenset[int]
    ) -> Iterator[dict[int, int]]:
        """All prompts are read at once; a row that has ended leaves the batch."""
        import numpy as np

        alive = list(range(len(prompts)))
        ids, mask = _left_padded(prompts)
        past = self._empty(len(alive))
        for _ in range(max_new_tokens if alive else 0):
            last = [(row, ids.shape[1] - 1) for row in range(len(alive))]
            logits, past = self._run(ids, mask, past, np.array(last))
            tokens = logits.argmax(-1)
            yield dict(zip(alive, tokens.tolist(), strict=True))
            running = [row for row, token in enumerate(tokens.tolist()) if token not in stop]
            if not running:
                return
            if len(running) < len(alive):
                alive, mask, tokens = [alive[row] for row in running], mask[running], tokens[running]
                past = {name: array[running] for name, array in past.items()}
            ids, mask = tokens[:, None], np.pad(mask, ((0, 0), (0, 1)), constant_values=1)

    def score(self, rows: Sequence[TokenRow]) -> Iterator[RowScores]:
        for begin, end in batches([row.input_ids for row in rows]):
            yield from self._score(rows[begin:end])

    def memory_bytes(self) -> int:
        return self.meter.peak_bytes()

    def close(self) -> None:
        del self.session

    def _score(self, rows: Sequence[TokenRow]) -> Iterator[RowScores]:
        """Score in two passes, the second with the cache of the first, so that a comparison of scores covers the cache as well."""
        import numpy as np

        ids, mask = _left_padded([row.input_ids for row in rows])
        width = ids.shape[1]
        places = [
            (i, width - len(row.input_ids) + at) for i, row in enumerate(rows) for at in predicting_positions(row)
        ]
        picked = np.array(places, np.int64).reshape(-1, 2)
        logits, past = np.empty((len(picked), self.vocabulary), np.float32), self._empty(len(rows))
        for begin, end in ((0, width // 2), (width // 2, width)):
            in_pass = (begin <= picked[:, 1]) & (picked[:, 1] < end)
            if begin < end:
                logits[in_pass], past = self._run(ids[:, begin:end], mask[:, :end], past, picked[in_pass] - [0, begin])
        yield from scores_of(rows, logits)

    def _empty(self, rows: int) -> Cache:
        """Return the cache before the first token: no positions."""
        import numpy as np

        shapes = {name: self.inputs[name].shape for name in self.caches}
        return {name: np.zeros((rows, heads, 0, size), np.float32) for name, (_, heads, _, size) in shapes.items()}

    def _run(self, ids: Ids, mask: Ids, past: Cache, picked: Ids) -> tuple[NDArray[Any], Cache]:
        """Return the logits [n, vocabulary] at `picked` [n, 2] of `ids` [rows, new], and the new cache. `mask`: [rows, past + new]."""
        positions = (mask.cumsum(1) - 1).clip(min=0)[:, -ids.shape[1] :]
        inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, PICKED: picked, **past}
        logits, *present = self.session.run(self.outputs, {name: inputs[name] for name in self.inputs})
        return logits, dict(zip(self.caches, present, strict=True))


def _left_padded(rows: Sequence[Sequence[int]]) -> tuple[Ids, Ids]:
    """Return token ids and their mask, [rows, longest]; padded positions hold token 0."""
    import numpy as np

    ids = np.zeros((len(rows), max(map(len, rows), default=0)), np.int64)
    mask = np.zeros_like(ids)
    for index, row in enumerate(rows):
        ids[index, ids.shape[1] - len(row) :] = row
        mask[index, ids.shape[1] - len(row) :] = 1
    return ids, mask
