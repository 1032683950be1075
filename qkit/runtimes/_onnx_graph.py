"""What both kinds of ONNX graph share: batches, and scores from logits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from qkit.core.batching import within_budget
from qkit.plugins.runtime import RowScores, TokenRow

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Ids = NDArray[np.int64]


BATCH_TOKENS = 256  # right-padded tokens per forward that reads; more is no quicker, and slower in int4
PICKED = "picked"


def batches(rows: Sequence[Sequence[int]]) -> Iterator[tuple[int, int]]:
    """Cut rows of token ids, in their order, into batches of BATCH_TOKENS: begin and end of each."""
    return ((batch.start, batch.stop) for batch in within_budget(map(len, rows), BATCH_TOKENS))


def scores_of(rows: Sequence[TokenRow], logits: NDArray[Any]) -> Iterator[RowScores]:
    """From the logits [n, vocabulary] of all completion tokens of these rows, in their order."""
    import numpy as np

    begin = 0
    for row in rows:
        end = begin + len(row.input_ids) - row.start
        yield _row_scores(logits[begin:end], np.asarray(row.input_ids[row.start :], np.int64))
        begin = end


def spoken_from(row: TokenRow) -> range:
    """The positions whose states say the completion: each token is said from the one before it."""
    return range(row.start - 1, len(row.input_ids) - 1)


def _row_scores(logits: NDArray[Any], targets: Ids) -> RowScores:
    """From the logits [T, vocabulary], which are overwritten where they are float32 already."""
    import numpy as np

    full = logits.astype(np.float32, copy=False)
    full -= full.max(axis=-1, keepdims=True)
    full -= np.log(np.exp(full).sum(axis=-1, keepdims=True))
    return RowScores(targets=full[np.arange(len(targets)), targets], top1=full.argmax(-1), full=full)
