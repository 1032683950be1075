"""A linear-chain conditional random field: a distribution over the tag sequences of a sentence, from a score of each tag for each word.

A sequence's score is the sum of its words' scores (emissions), of a score for each pair of neighbouring tags, and of one for the first tag and
for the last. Its probability is exp(score), divided by the sum over all sequences of that length.

B sentences of up to T words: emissions [B, T, tags], lengths [B]. The words of a sentence are its first positions, without gaps; what comes
after them does not count. Everything is computed in fp32, within autocast too (in fp64 where the emissions are).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Protocol, cast

from qkit.core.errors import ModelError
from qkit.tasks._encoder.tagging.schemes import Constraint

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Transitions:
    """The scores that do not depend on the words: `pairs` [tags, tags] from one tag (row) to the next, `start` [tags], `end` [tags]."""

    pairs: Tensor
    start: Tensor
    end: Tensor


def log_likelihood(transitions: Transitions, emissions: Tensor, tags: Tensor, lengths: Tensor) -> Tensor:
    """Return the log-probability of each sentence's tags, [B], in nats. `tags`: [B, T] integers; 0 for a sentence without words."""
    return _path_scores(transitions, emissions, tags, lengths) - log_partition(transitions, emissions, lengths)


def _path_scores(transitions: Transitions, emissions: Tensor, tags: Tensor, lengths: Tensor) -> Tensor:
    import torch

    if not emissions.shape[1]:
        return emissions.sum((1, 2))
    real = _real(emissions, lengths)
    tags = tags.clamp(min=0)  # of positions after the last word, which are often -100
    words = emissions.gather(2, tags[..., None])[..., 0]
    words = torch.where(real, words, 0).sum(1)
    pairs = torch.where(real[:, 1:], transitions.pairs[tags[:, :-1], tags[:, 1:]], 0).sum(1)
    last = tags.gather(1, (lengths[:, None] - 1).clamp(min=0))[:, 0]
    score: Tensor = words + pairs + transitions.start[tags[:, 0]] + transitions.end[last]
    return torch.where(lengths > 0, score, 0)


def log_partition(transitions: Transitions, emissions: Tensor, lengths: Tensor) -> Tensor:
    """Return the logarithm of the sum of exp(score) over all tag sequences of each sentence, [B]."""
    import torch

    total = emissions.new_zeros(len(emissions))
    if not emissions.shape[1]:
        return total
    for forward, norm in _forward(transitions, emissions, lengths):
        last, total = forward, total + norm
    return torch.where(lengths > 0, total + torch.logsumexp(last + transitions.end, 1), 0)


def _forward(transitions: Transitions, emissions: Tensor, lengths: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """For each position, the log-probability of each tag given the words so far [B, tags], and what it was divided by [B].

    Dividing at each word keeps the numbers small: over 512 words the sum is a few thousand, and what fp32 loses of it would make marginals
    wrong by 0.005 nats; so it is 0.000005.
    """
    import torch

    real = _real(emissions, lengths)
    scores = transitions.start + emissions[:, 0]
    norm = torch.logsumexp(scores, 1)
    forward = scores - norm[:, None]
    yield forward, norm
    for position in range(1, emissions.shape[1]):
        scores = torch.logsumexp(forward[:, :, None] + transitions.pairs, 1) + emissions[:, position]
        norm = torch.logsumexp(scores, 1)
        active = real[:, position]
        forward = torch.where(active[:, None], scores - norm[:, None], forward)
        yield forward, torch.where(active, norm, 0)


def _backward(transitions: Transitions, emissions: Tensor, lengths: Tensor) -> list[Tensor]:
    """For each position, the score of the words that follow, by tag [B, tags], up to a constant of the sentence."""
    import torch

    real = _real(emissions, lengths)
    after = transitions.end.expand(len(emissions), -1)
    places = [after]
    for position in range(emissions.shape[1] - 1, 0, -1):
        scores = torch.logsumexp(transitions.pairs + (emissions[:, position] + after)[:, None], 2)
        scores = scores - torch.logsumexp(scores, 1, keepdim=True)
        after = torch.where(real[:, position][:, None], scores, after)
        places.append(after)
    return places[::-1]


def marginals(transitions: Transitions, emissions: Tensor, lengths: Tensor) -> Tensor:
    """Return the log-probability of each tag at each word over all tag sequences, [B, T, tags]; 0 after the last word."""
    import torch

    if not emissions.shape[1]:
        return emissions
    forward = torch.stack([place for place, _ in _forward(transitions, emissions, lengths)], 1)
    backward = torch.stack(_backward(transitions, emissions, lengths), 1)
    real = _real(emissions, lengths)
    return torch.where(real[..., None], torch.log_softmax(forward + backward, -1), 0)


def decode(
    transitions: Transitions, emissions: Tensor, lengths: Tensor, constraint: Constraint | None = None
) -> list[list[int]]:
    """Return the most probable tag sequence of each sentence; with a constraint, the most probable of the valid ones.

    Raises:
        ModelError: no sequence is valid.
    """
    import torch

    if not emissions.shape[1]:
        return [[] for _ in lengths]
    allowed = _restricted(transitions, constraint) if constraint else transitions
    best, sources = _best_sources(allowed, emissions, lengths)
    score, tag = (best + allowed.end).max(1)
    if constraint and bool((score == -torch.inf).any()):
        raise ModelError(
            "the model's tags allow no valid sequence: they need O, or the tags that begin and end an entity"
        )
    path = [tag]
    for source in reversed(sources):
        path.append(source.gather(1, path[-1][:, None])[:, 0])
    rows = torch.stack(path[::-1], 1).tolist()
    return [row[:length] for row, length in zip(rows, lengths.tolist(), strict=True)]


def _best_sources(transitions: Transitions, emissions: Tensor, lengths: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The best score of a sequence that ends in each tag [B, tags], and for each position after the first where it comes from [B, tags]."""
    import torch

    real = _real(emissions, lengths)
    best = transitions.start + emissions[:, 0]
    itself = torch.arange(best.shape[1], device=best.device).expand_as(best)
    sources = []
    for position in range(1, emissions.shape[1]):
        scores, source = (best[:, :, None] + transitions.pairs).max(1)
        active = real[:, position][:, None]
        best = torch.where(active, scores + emissions[:, position], best)
        sources.append(torch.where(active, source, itself))
    return best, sources


def _restricted(transitions: Transitions, constraint: Constraint) -> Transitions:
    def allowed(scores: Tensor, valid: Sequence[Any]) -> Tensor:
        import torch

        return scores.masked_fill(~torch.tensor(valid, device=scores.device), -torch.inf)

    return Transitions(
        allowed(transitions.pairs, constraint.pairs),
        allowed(transitions.start, constraint.start),
        allowed(transitions.end, constraint.end),
    )


def _real(emissions: Tensor, lengths: Tensor) -> Tensor:
    """Which positions are words, [B, T]."""
    import torch

    return torch.arange(emissions.shape[1], device=emissions.device) < lengths[:, None]


class ChainCRF(Protocol):
    """The module that `chain_crf` makes, a torch.nn.Module. Its methods are the functions above, with its parameters for the transitions."""

    pairs: Tensor
    start: Tensor
    end: Tensor

    def log_likelihood(self, emissions: Tensor, tags: Tensor, lengths: Tensor) -> Tensor: ...
    def marginals(self, emissions: Tensor, lengths: Tensor) -> Tensor: ...
    def decode(self, emissions: Tensor, lengths: Tensor, constraint: Constraint | None = None) -> list[list[int]]: ...


def chain_crf(tags: int) -> ChainCRF:
    """Return a module with transition scores for so many tags. They begin at 0, where the likelihood is a softmax over each word's tags."""
    return cast(ChainCRF, _module_class()(tags))


@cache
def _module_class() -> type[Any]:
    """The class, defined where torch is needed."""
    import torch

    class ChainCRFModule(torch.nn.Module):
        def __init__(self, tags: int):
            super().__init__()
            self.pairs = torch.nn.Parameter(torch.zeros(tags, tags))
            self.start = torch.nn.Parameter(torch.zeros(tags))
            self.end = torch.nn.Parameter(torch.zeros(tags))

        def _call(self, function: Any, emissions: Tensor, *rest: Any) -> Any:
            # Autocast leaves it at that: it lowers products of matrices, and there are none
            dtype = torch.promote_types(emissions.dtype, torch.float32)
            transitions = Transitions(self.pairs.to(dtype), self.start.to(dtype), self.end.to(dtype))
            return function(transitions, emissions.to(dtype), *rest)

        def log_likelihood(self, emissions: Tensor, tags: Tensor, lengths: Tensor) -> Any:
            return self._call(log_likelihood, emissions, tags, lengths)

        def marginals(self, emissions: Tensor, lengths: Tensor) -> Any:
            return self._call(marginals, emissions, lengths)

        @torch.no_grad()
        def decode(self, emissions: Tensor, lengths: Tensor, constraint: Constraint | None = None) -> Any:
            return self._call(decode, emissions, lengths, constraint)

    return ChainCRFModule
