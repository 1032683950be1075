"""Precision, recall and F1 from counts: how often a class is right, is in the references, and is predicted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Counts:
    """[..., classes] each. `right`: both in the reference and predicted."""

    right: Floats
    reference: Floats
    predicted: Floats

    @classmethod
    def of(cls, sums: Floats, classes: int) -> Counts:
        """The counts that `sums` [..., at least 3 * classes] begin with, in the order of the fields."""
        return cls(*(sums[..., part * classes : (part + 1) * classes] for part in range(3)))


def ratio(part: Floats, whole: Floats) -> Floats:
    """part / whole, and 0 where the whole is 0."""
    import numpy as np

    quotient: Floats = np.divide(part, whole, out=np.zeros(np.broadcast(part, whole).shape), where=whole != 0)
    return quotient


def scores(counts: Counts, names: Sequence[str]) -> dict[str, Floats]:
    """Return precision, recall and F1: of all classes together, as means over classes, and of each.

    A class that is neither in the references nor predicted is left out of the macro means, as it is in scikit-learn's for single labels;
    `macro_classes` says how many classes are in. In all others a precision or recall without any row to judge it by counts as 0.

    Returns:
        [...] by name: precision_micro, precision_macro, precision_weighted (by rows in the references) and precision:CLASS, and so on.
        support:CLASS is how often a class is in the references.
    """
    whole = Counts(*(part.sum(-1, keepdims=True) for part in (counts.right, counts.reference, counts.predicted)))
    present = (counts.reference + counts.predicted > 0).astype("f8")
    figures: dict[str, Floats] = {"macro_classes": present.sum(-1)}
    for name, of_classes in _by_class(counts).items():
        figures[f"{name}_micro"] = _by_class(whole)[name][..., 0]
        figures[f"{name}_macro"] = ratio((of_classes * present).sum(-1), present.sum(-1))
        figures[f"{name}_weighted"] = ratio((of_classes * counts.reference).sum(-1), counts.reference.sum(-1))
        figures |= {f"{name}:{label}": of_classes[..., index] for index, label in enumerate(names)}
    support = {f"support:{label}": counts.reference[..., index] for index, label in enumerate(names)}
    return {**figures, **support}


def _by_class(counts: Counts) -> dict[str, Floats]:
    return {
        "precision": ratio(counts.right, counts.predicted),
        "recall": ratio(counts.right, counts.reference),
        "f1": ratio(2 * counts.right, counts.reference + counts.predicted),
    }
