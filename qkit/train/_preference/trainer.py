"""The Trainer of pairs: qkit's batches, one loss for each pair, and the same gradient however a step is divided into batches."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from qkit.recipe.preference import Preference
from qkit.train._preference.losses import Compared, pair_losses
from qkit.train.fast.pairs import CHOSEN, LabelledTokens, labelled_tokens
from qkit.train.trainer import Counted

if TYPE_CHECKING:
    import torch
    from datasets import Dataset


class CountedPairs(Counted):
    """What qkit changes in a Trainer whose rows are pairs. `train_dataset` has the columns of `collate.whole`, and REFERENCE once it is known.

    `shared`: whether a pair passes through the model with its prompt once.
    """

    divisors = "in the pairs that the losses were divided by"

    def __init__(self, *args: Any, section: Preference, shared: bool, **kwargs: Any):
        self.section = section
        self.ld_alpha: float | None = getattr(section, "ld_alpha", None)  # rated answers have none
        self.shared = shared
        self._pairs = 0  # of the step
        self._per_pair = 1.0  # labelled tokens of chosen answers per pair of the step
        super().__init__(*args, **kwargs)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """The sum of the pairs' losses, divided by the pairs of the whole accumulated batch."""
        with self.accelerator.autocast():
            tokens = self.tokens(inputs)
        count = len(inputs["starts"])
        per_pair = tokens.log_probabilities.new_full((count,), self._per_pair)
        return self.losses(tokens, inputs, per_pair).sum() / (self._pairs or count)

    def tokens(self, inputs: Mapping[str, torch.Tensor]) -> LabelledTokens:
        """The log-probabilities of both answers of each pair."""
        return labelled_tokens(self.base_model, inputs, self.shared)

    def losses(
        self, tokens: LabelledTokens, inputs: Mapping[str, torch.Tensor], per_token: torch.Tensor
    ) -> torch.Tensor:
        """The loss of each pair, [pairs]. `per_token`: of Compared."""
        count = len(inputs["starts"])
        lengths = tokens.by_side(tokens.log_probabilities.new_ones(len(tokens.pairs)), count)
        compared = Compared(
            model=side_sums(tokens, count, self.ld_alpha),
            reference=inputs["reference"],
            tokens=lengths,
            plain=tokens.by_side(tokens.log_probabilities, count)[:, CHOSEN],
            per_token=per_token,
        )
        losses = pair_losses(compared, self.section)
        return losses * _likelihoods(tokens, lengths) if self.section.use_weighting else losses

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        """The labelled tokens of a step, which are counted; beside them, its pairs, by which its losses are divided."""
        from qkit.core.batching import IGNORED

        self._pairs = sum(len(batch["starts"]) for batch in batch_samples)
        chosen = 0
        for batch in batch_samples:
            pairs, places = (batch["labels"] != IGNORED).nonzero(as_tuple=True)
            chosen += int((places < batch["starts"][pairs, 1]).sum())
        self._per_pair = chosen / max(self._pairs, 1)
        return super()._get_num_items_in_batch(batch_samples, device)

    def items(self, rows: Dataset) -> list[int]:
        """A row is a pair, and has one loss."""
        return [1] * len(rows)

    def row_losses(self, inputs: Any) -> torch.Tensor:
        """The loss of each pair, [rows] fp64; without gradients."""
        tokens = self.tokens(inputs)
        lengths = tokens.by_side(tokens.log_probabilities.new_ones(len(tokens.pairs)), len(inputs["starts"]))
        return self.losses(tokens, inputs, lengths[:, CHOSEN].clamp(min=1)).double()


def side_sums(tokens: LabelledTokens, pairs: int, ld_alpha: float | None) -> torch.Tensor:
    """The summed log-probabilities of each answer, [pairs, 2]. `ld_alpha`: the weight of tokens beyond the length of the shorter answer."""
    import torch

    values = tokens.log_probabilities
    if ld_alpha is not None:
        shorter = tokens.by_side(values.new_ones(len(values)), pairs).min(dim=1).values
        values = values * torch.where(tokens.ranks < shorter[tokens.pairs], 1.0, ld_alpha)
    return tokens.by_side(values, pairs)


def _likelihoods(tokens: LabelledTokens, lengths: torch.Tensor) -> torch.Tensor:
    """WPO's weight of each pair, [pairs]: how likely the model is to say both answers, per token, against how sure it is of what it says.

    https://arxiv.org/abs/2406.11827, equation 2.
    """
    aligned = (tokens.log_probabilities - tokens.squares).detach()
    means = tokens.by_side(aligned, len(lengths)) / lengths.clamp(min=1)
    weights: torch.Tensor = means.sum(-1).exp()
    return weights


def trainer_class() -> Any:
    """The trainer as a subclass of transformers' Trainer. A function, to import transformers no sooner than needed."""
    from transformers import Trainer

    return type("Trainer", (CountedPairs, Trainer), {})
