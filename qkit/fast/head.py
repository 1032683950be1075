"""The language-model head on labelled positions only.

Half to nine tenths of a row is prompt and carries no loss; its logits (vocabulary x 4 bytes each) need not exist.
Reference: TRL's loss, in tests/test_fast.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qkit.fast.batches import IGNORED

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

POSITIONS_STEP = 32


def labelled_loss(
    model: PreTrainedModel, input_ids: torch.Tensor, labels: torch.Tensor, items: torch.Tensor | int | None
) -> torch.Tensor:
    """Mean cross-entropy over labelled tokens: their sum divided by `items`, the labels of the whole accumulated batch.

    `input_ids`, `labels`: [rows, tokens], right-padded, no mask needed. `items` None: the labels of this batch.
    """
    from torch.nn.functional import cross_entropy, pad

    hidden = model.get_decoder()(input_ids=input_ids, use_cache=False).last_hidden_state
    rows, places = (labels[:, 1:] != IGNORED).nonzero(as_tuple=True)
    targets = labels[rows, places + 1]
    count = len(targets)
    filler = -count % POSITIONS_STEP  # positions that are ignored, so that the head sees few distinct shapes
    logits = model.get_output_embeddings()(hidden[pad(rows, (0, filler)), pad(places, (0, filler))])
    total = cross_entropy(
        logits.float(), pad(targets, (0, filler), value=IGNORED), reduction="sum", ignore_index=IGNORED
    )
    return total / (count if items is None else items)
