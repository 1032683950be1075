"""Log-probabilities of two answers to one prompt, with the prompt computed once and the head on labelled positions only.

A row is prompt, chosen answer, rejected answer. With `shared`, it passes through the model as it is: a mask keeps the rejected answer from
seeing the chosen one, and its positions go on from the prompt. Else it passes as two rows, each of the prompt and one answer.
Reference: two plain rows, and TRL's DPOTrainer, in tests/train/test_pairs.py.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qkit.core.batching import IGNORED, padded_length
from qkit.model.load import scaled

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

CHOSEN, REJECTED = 0, 1
POSITIONS_AT_ONCE = 256  # of the head: so many rows of logits are in memory at once
MASKED = ("sdpa", "eager")  # the kinds of attention that take any mask


@dataclass(frozen=True)
class LabelledTokens:
    """Every labelled token of a batch, [tokens]: `log_probabilities` in nats, `pairs` (which row of the batch), `sides`, and `ranks`, its place
    among the labelled tokens of its side, from 0. `squares`: the log of the summed squared probabilities over the vocabulary."""

    log_probabilities: torch.Tensor
    pairs: torch.Tensor
    sides: torch.Tensor
    ranks: torch.Tensor
    squares: torch.Tensor

    def by_side(self, values: torch.Tensor, pairs: int) -> torch.Tensor:
        """Sums of values [tokens], [pairs, 2]."""
        sums = values.new_zeros(pairs * 2)
        return sums.index_add(0, self.pairs * 2 + self.sides, values).view(pairs, 2)


def labelled_tokens(model: PreTrainedModel, batch: Mapping[str, torch.Tensor], shared: bool) -> LabelledTokens:
    """The log-probability of every labelled token. `model`: without PEFT's wrapper; `batch`: of `collate_pairs`."""
    pairs, places = (batch["labels"] != IGNORED).nonzero(as_tuple=True)
    sides = (places >= batch["starts"][pairs, 1]).long()
    hidden = (_shared_states if shared else _separate_states)(model, batch, pairs, places, sides)
    log_probabilities, squares = _head(model, hidden, batch["labels"][pairs, places])
    return LabelledTokens(log_probabilities, pairs, sides, _ranks(pairs * 2 + sides), squares)


def _ranks(groups: torch.Tensor) -> torch.Tensor:
    """The place of each element among those of its group; groups are contiguous."""
    import torch

    _, counts = torch.unique_consecutive(groups, return_counts=True)
    first = torch.repeat_interleave(counts.cumsum(0) - counts, counts)
    return torch.arange(len(groups), device=groups.device) - first


# --- the decoder ------------------------------------------------------------------------------------------------------


def _shared_states(
    model: PreTrainedModel,
    batch: Mapping[str, torch.Tensor],
    pairs: torch.Tensor,
    places: torch.Tensor,
    sides: torch.Tensor,
) -> torch.Tensor:
    """The states that predict the labelled tokens, [tokens, hidden]; the first token of either answer is predicted by the end of the prompt."""
    import torch

    decoder = model.get_decoder()
    dtype = next(decoder.parameters()).dtype if not torch.is_autocast_enabled(batch["labels"].device.type) else None
    states = decoder(
        input_ids=batch["input_ids"],
        position_ids=positions(batch),
        attention_mask=mask(batch, dtype or torch.get_autocast_dtype(batch["labels"].device.type)),
        use_cache=False,
    ).last_hidden_state
    starts = batch["starts"]
    begins = (sides == REJECTED) & (places == starts[pairs, REJECTED])
    return states[pairs, torch.where(begins, starts[pairs, CHOSEN], places) - 1]


def positions(batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The position of each token in its own conversation, [pairs, longest]."""
    import torch

    places = torch.arange(batch["labels"].shape[1], device=batch["labels"].device)[None]
    starts, rejected = batch["starts"][:, :1], batch["starts"][:, 1:]
    return torch.where(places >= rejected, places - rejected + starts, places)


def mask(batch: Mapping[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """What is added to the attention scores, [pairs, 1, longest, longest]: 0 where a token sees another one, and the least number elsewhere.

    A token sees those before it, and one of the rejected answer none of the chosen one. Padding sees as rejected tokens do.
    """
    import torch

    length = batch["labels"].shape[1]
    places = torch.arange(length, device=batch["labels"].device)
    chosen = (places >= batch["starts"][:, :1]) & (places < batch["starts"][:, 1:])  # [pairs, longest]
    rejected = places >= batch["starts"][:, 1:]
    hidden = (places[None, :] > places[:, None])[None] | (rejected[:, :, None] & chosen[:, None, :])
    return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill(hidden, torch.finfo(dtype).min)[
        :, None
    ]


def _separate_states(
    model: PreTrainedModel,
    batch: Mapping[str, torch.Tensor],
    pairs: torch.Tensor,
    places: torch.Tensor,
    sides: torch.Tensor,
) -> torch.Tensor:
    """The same from two rows for each pair, padded on the right and without a mask."""
    ids = apart(batch)
    states = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
    moved = places - sides * (batch["starts"][pairs, REJECTED] - batch["starts"][pairs, CHOSEN])
    return states[pairs * 2 + sides, moved - 1]


def apart(batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Each pair as two rows of token ids, chosen and rejected, [pairs * 2, longest]. What follows an answer is padding, whatever it is."""
    import torch

    ids, start, rejected = batch["input_ids"], batch["starts"][:, :1], batch["starts"][:, 1:]
    labelled = (batch["labels"] != IGNORED) * torch.arange(1, ids.shape[1] + 1, device=ids.device)
    ends = labelled.amax(1, keepdim=True)  # one past the last labelled token
    longest = padded_length(int(torch.maximum(rejected, ends - rejected + start).max()))
    places = torch.arange(longest, device=ids.device).expand(len(ids), longest)
    moved = torch.where(places < start, places, places - start + rejected)
    rows = torch.stack([places, moved], dim=1).clamp(max=ids.shape[1] - 1)  # [pairs, 2, longest]
    return ids[:, None].expand(-1, 2, -1).gather(2, rows).flatten(0, 1)


# --- the head ---------------------------------------------------------------------------------------------------------


def _head(model: PreTrainedModel, hidden: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of `targets` [tokens], fp32, and the log of the summed squared probabilities at each, without gradients.

    The logits of POSITIONS_AT_ONCE positions exist at a time: what the backward pass needs of them, the gradient of each log-probability by its
    own state, is as wide as a state, and computed with them. A head that is trained itself needs the logits again: then they are kept.
    """
    head = model.get_output_embeddings()
    if not hidden.requires_grad or any(parameter.requires_grad for parameter in head.parameters()):
        return _scored(model, hidden, targets)
    scores: tuple[torch.Tensor, torch.Tensor] = _function().apply(hidden, targets, model)
    return scores


def _scored(model: PreTrainedModel, hidden: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    import torch

    parts = []
    for states, ids in zip(hidden.split(POSITIONS_AT_ONCE), targets.split(POSITIONS_AT_ONCE), strict=True):
        logits = scaled(model, model.get_output_embeddings()(states).float())
        whole = logits.logsumexp(-1)
        with torch.no_grad():
            squares = (2 * logits).logsumexp(-1) - 2 * whole
        parts.append((logits.gather(1, ids[:, None])[:, 0] - whole, squares))
    if not parts:
        return hidden.new_zeros(0).float(), hidden.new_zeros(0).float()
    return torch.cat([one for one, _ in parts]), torch.cat([square for _, square in parts])


@functools.cache
def _function() -> Any:
    """The head as a function whose gradients are computed with its values. A function, to import torch no sooner than needed."""
    import torch

    class Head(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, hidden: Any, targets: Any, model: Any) -> tuple[Any, Any]:
            parts = []
            for states, ids in zip(hidden.split(POSITIONS_AT_ONCE), targets.split(POSITIONS_AT_ONCE), strict=True):
                with torch.enable_grad():
                    leaf = states.detach().requires_grad_()
                    values, squares = _scored(model, leaf, ids)
                    (gradient,) = torch.autograd.grad(values.sum(), leaf)
                parts.append((values.detach(), squares, gradient))
            log_probabilities, squares, gradients = (torch.cat(part) for part in zip(*parts, strict=True))
            ctx.save_for_backward(gradients)
            ctx.mark_non_differentiable(squares)
            return log_probabilities, squares

        @staticmethod
        def backward(ctx: Any, outer: Any, _: Any) -> tuple[Any, None, None]:
            (gradients,) = ctx.saved_tensors
            return (outer[:, None] * gradients).to(gradients.dtype), None, None

    return Head
