"""The loss of one labelled token, as train.loss_type and train.label_smoothing_factor say.

Reference: TRL's losses of the same names, in tests/train/test_token_loss.py. Ledger, evaluation and isolation of packs use PLAIN, whatever
the training does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from qkit.core.batching import IGNORED

if TYPE_CHECKING:
    import torch

    from qkit.recipe.training import Train


@dataclass(frozen=True)
class TokenLoss:
    """`name`: nll, the cross-entropy; or dft, that times the token's probability, through which no gradient flows.

    `smoothing`: the share of the label's weight that is spread evenly over the whole vocabulary.
    """

    name: str = "nll"
    smoothing: float = 0.0

    def __call__(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Losses [positions] of logits [positions, vocabulary] and target ids [positions]; 0 where the target is ignored."""
        from torch.nn.functional import cross_entropy

        losses = cross_entropy(logits, targets, reduction="none", ignore_index=IGNORED, label_smoothing=self.smoothing)
        return losses * (-losses.detach()).exp() if self.name == "dft" else losses

    @property
    def remark(self) -> str:
        """How the logged loss differs from the cross-entropy; empty if it does not."""
        if self.name == "dft":
            return "the logged loss is that of train.loss_type=dft, each token's cross-entropy times its probability"
        if self.smoothing:
            return f"the logged loss is smoothed (train.label_smoothing_factor={self.smoothing:g})"
        return ""


PLAIN = TokenLoss()


def of(section: Train) -> TokenLoss:
    """The loss that a recipe trains with."""
    return TokenLoss(section.loss_type, section.label_smoothing_factor)
