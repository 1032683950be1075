"""What both ONNX runtimes share: batches, and scores computed from logits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from qkit.core.batching import within_budget
from qkit.plugins.runtime import RowScores, TokenRow

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Ids = NDArray[np.int64]


BATCH_TOKENS = 256  # padded tokens per forward pass over given tokens; more is not faster, and slower in int4
PICKED = "picked"  # the graph input that selects the positions to compute logits for


def batches(rows: Sequence[Sequence[int]]) -> Iterator[tuple[int, int]]:
    """Cut rows of token ids, in their order, into batches of BATCH_TOKENS: begin and end of each."""
    return ((batch.start, batch.stop) for batch in within_budget(map(len, rows), BATCH_TOKENS))


def scores_of(rows: Sequence[TokenRow], logits: NDArray[Any]) -> Iterator[RowScores]:
    """Yield the scores of each row, given the logits [n, vocabulary] of the completion tokens of all rows, in order."""
    import numpy as np

    begin = 0
    for row in rows:
        end = begin + len(row.input_ids) - row.start
        yield _row_scores(logits[begin:end], np.asarray(row.input_ids[row.start :], np.int64))
        begin = end


def predicting_positions(row: TokenRow) -> range:
    """Return the positions whose states predict the completion: each token is predicted at the position before it."""
    return range(row.start - 1, len(row.input_ids) - 1)


def _row_scores(logits: NDArray[Any], targets: Ids) -> RowScores:
    """Compute scores from logits [T, vocabulary]; float32 logits are overwritten."""
    import numpy as np

    full = logits.astype(np.float32, copy=False)
    full -= full.max(axis=-1, keepdims=True)
    full -= np.log(np.exp(full).sum(axis=-1, keepdims=True))
    return RowScores(targets=full[np.arange(len(targets)), targets], top1=full.argmax(-1), full=full)
