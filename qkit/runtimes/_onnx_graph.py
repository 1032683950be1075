"""What both kinds of ONNX graph share: batches, and scores from logits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from qkit.plugins.runtime import RowScores, TokenRow

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Ids = NDArray[np.int64]


BATCH_TOKENS = 256  # right-padded tokens per forward that reads; more is no quicker, and slower in int4
PICKED = "picked"


def batches(lengths: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Rows in their order, as many at once as fit BATCH_TOKENS when padded: begin and end of each batch."""
    begin = longest = 0
    for index, length in enumerate(lengths):
        longest = max(longest, length)
        if index > begin and longest * (index + 1 - begin) > BATCH_TOKENS:
            yield begin, index
            begin, longest = index, length
    if len(lengths):
        yield begin, len(lengths)


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
