"""The language-model head on labelled positions only.

Half to nine tenths of a row is prompt and has no loss, so its logits (vocabulary x 4 bytes each) are not computed.
Reference: TRL's loss and the models' own, in tests/train/test_fast.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from qkit.core.batching import IGNORED
from qkit.model.load import scaled
from qkit.train.fast.token_loss import PLAIN, TokenLoss
from qkit.train.row_weights import at

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


POSITIONS_STEP = 32
POSITIONS_AT_ONCE = (
    1024  # row_losses computes logits for at most this many positions at once; a multiple of POSITIONS_STEP
)


def labelled_loss(
    model: PreTrainedModel,
    batch: Mapping[str, torch.Tensor],
    items: torch.Tensor | int | None,
    loss: TokenLoss = PLAIN,
) -> torch.Tensor:
    """Mean loss over labelled tokens: their sum divided by `items`, the labels of the whole accumulated batch.

    `batch`: from `collate` or `collate_pack`; with `weights`, those of the losses. `items` None: the number of labels in this batch.
    """
    rows, places = _labelled(batch["labels"])
    losses = _losses(model, _hidden(model, batch), batch["labels"], rows, places, loss)
    if "weights" in batch:
        losses = losses[: len(rows)] * at(batch["weights"], rows, places + 1)
    return losses.sum() / (len(rows) if items is None else items)


def row_losses(model: PreTrainedModel, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Summed cross-entropy of each row's labelled tokens, in nats: [rows], fp64. For `collate`'s batches, without gradients."""
    import torch

    rows, places = _labelled(batch["labels"])
    hidden = _hidden(model, batch)
    sums = torch.zeros(len(hidden), dtype=torch.float64, device=hidden.device)
    for row, place in zip(rows.split(POSITIONS_AT_ONCE), places.split(POSITIONS_AT_ONCE), strict=True):
        losses = _losses(model, hidden, batch["labels"], row, place)
        sums.index_add_(0, row, losses[: len(row)].double())
    return sums


def _labelled(labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows and positions [labels] of the tokens that predict a labelled token."""
    rows, places = (labels[:, 1:] != IGNORED).nonzero(as_tuple=True)
    return rows, places


def _hidden(model: PreTrainedModel, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Last hidden states [rows, tokens, hidden]. No cache and no mask, so that documents of a pack do not attend to each other."""
    positions = batch["position_ids"][:1]  # a pack is one row, and all rows of other batches have the same positions
    decoder = model.get_decoder()
    states: torch.Tensor = decoder(
        input_ids=batch["input_ids"], position_ids=positions, use_cache=False
    ).last_hidden_state
    return states


def _losses(
    model: PreTrainedModel,
    hidden: torch.Tensor,
    labels: torch.Tensor,
    rows: torch.Tensor,
    places: torch.Tensor,
    loss: TokenLoss = PLAIN,
) -> torch.Tensor:
    """The loss of the token after each of `places`: [places], padded with zeros to a multiple of POSITIONS_STEP.

    The padding keeps the number of distinct shapes that the head computes small.
    """
    from torch.nn.functional import pad

    filler = -len(rows) % POSITIONS_STEP
    targets = pad(labels[rows, places + 1], (0, filler), value=IGNORED)
    logits = model.get_output_embeddings()(hidden[pad(rows, (0, filler)), pad(places, (0, filler))])
    return loss(scaled(model, logits.float()), targets)
