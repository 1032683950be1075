"""Counts the labels of a run in three places, which must agree exactly.

A loss divided by the wrong number, a batch that lost labels, or an epoch that skipped rows would train the wrong thing, and no loss curve
would show it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass
class Sums:
    """Labelled tokens so far. `drawn`: in the sampled rows, by the ledger. `in_batches`: in the batches. `divided_by`: the summed divisors of
    the loss over optimizer steps.

    With data.weight, `drawn_weight` is the sum of the weights of the drawn labels, and the divisors are weights.

    The checksums are sums of token ids: labels shifted by one position have the same count but other ids.
    """

    drawn: int = 0
    in_batches: int = 0
    divided_by: float = 0  # a whole number without weights
    drawn_checksum: int = 0
    in_batches_checksum: int = 0
    drawn_weight: float | None = None

    def problem(self, epoch: float, ledger: int) -> str | None:
        """A message if the counts disagree after `epoch` epochs of rows with `ledger` labels, else None."""
        if self.drawn_weight is not None and not math.isclose(self.divided_by, self.drawn_weight, rel_tol=1e-6):
            return (
                f"weights of labels disagree after {epoch:.2f} epochs: those of the sampled rows add up to {self.drawn_weight:,.6g}, "
                f"and the loss was divided by {self.divided_by:,.6g}"
            )
        if self.drawn != self.in_batches or (self.drawn_weight is None and self.divided_by != self.drawn):
            return (
                f"label counts disagree after {epoch:.2f} epochs: the sampled rows have {self.drawn:,}, "
                f"the batches had {self.in_batches:,}, and the loss was divided by {self.divided_by:,}"
            )
        if self.drawn_checksum != self.in_batches_checksum:
            return (
                f"label ids disagree after {epoch:.2f} epochs: the count is right ({self.drawn:,}), "
                f"but the ids add up to {self.in_batches_checksum:,} instead of {self.drawn_checksum:,}"
            )
        if epoch == int(epoch) and self.drawn != int(epoch) * ledger:
            return (
                f"label counts disagree: {int(epoch)} x {ledger:,} in the ledger, "
                f"but {self.drawn:,} in the rows sampled in {int(epoch)} epochs"
            )
        return None
