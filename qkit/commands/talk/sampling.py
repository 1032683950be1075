"""Chooses the next token, as the servers do: a penalty on repetition, then temperature, top_k and top_p."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from qkit.server.onnx_engine import Sampling

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


def next_token(logits: NDArray[np.float32], sampling: Sampling, seen: Collection[int], random: Any) -> int:
    """The next token by its logits [vocabulary]. `seen`: the tokens so far, prompt included; `random`: a numpy Generator."""
    scores = logits.astype("float64")
    if sampling.repetition_penalty != 1.0:
        places = sorted(set(seen))
        of_seen = scores[places]
        scores[places] = of_seen * sampling.repetition_penalty ** (1 - 2 * (of_seen > 0))
    if sampling.temperature == 0:
        return int(scores.argmax())
    shares = probabilities(scores / sampling.temperature, sampling.top_k, sampling.top_p)
    return int(random.choice(len(shares), p=shares))


def probabilities(scores: NDArray[np.float64], top_k: int, top_p: float) -> NDArray[np.float64]:
    """Probabilities [vocabulary] of the `top_k` best tokens (0: of all), and of these of the fewest that have `top_p` together."""
    import numpy as np

    if 0 < top_k < len(scores):
        scores = np.where(scores < np.partition(scores, -top_k)[-top_k], -np.inf, scores)
    shares: NDArray[np.float64] = np.exp(scores - scores.max())
    shares /= shares.sum()
    if top_p < 1:
        order = np.argsort(-shares, kind="stable")
        before = np.cumsum(shares[order]) - shares[order]
        shares[order[before >= top_p]] = 0.0
        shares /= shares.sum()
    return shares
