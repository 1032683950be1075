"""The labels of a run, counted in three places that must agree to the last one.

A loss that is divided by another number than its labels, a batch that lost some on the way from the ledger, or an epoch that left rows out
trains something else than what was asked for, and no curve shows it.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Sums:
    """Labelled tokens so far. `drawn`: of the rows that were drawn, as the ledger has them; `in_batches`: of the batches that were trained on;
    `divided_by`: what the loss was divided by, summed over optimizer steps.

    The checksums add up the tokens' ids: labels that are off by one place are as many, but others.
    """

    drawn: int = 0
    in_batches: int = 0
    divided_by: int = 0
    drawn_checksum: int = 0
    in_batches_checksum: int = 0

    def problem(self, epoch: float, ledger: int) -> str | None:
        """What does not add up after `epoch` epochs of rows that have `ledger` labels; None when all does."""
        if not self.drawn == self.in_batches == self.divided_by:
            return (
                f"the labels do not add up after {epoch:.2f} epochs: the rows drawn have {self.drawn:,}, "
                f"the batches had {self.in_batches:,}, and the loss was divided by {self.divided_by:,}"
            )
        if self.drawn_checksum != self.in_batches_checksum:
            return (
                f"the labels are not those of the rows after {epoch:.2f} epochs: they are as many ({self.drawn:,}), "
                f"but their ids add up to {self.in_batches_checksum:,} instead of {self.drawn_checksum:,}"
            )
        if epoch == int(epoch) and self.drawn != int(epoch) * ledger:
            return (
                f"the labels do not add up: {int(epoch)} x {ledger:,} in the ledger, "
                f"and {self.drawn:,} in the rows drawn in as many epochs"
            )
        return None
