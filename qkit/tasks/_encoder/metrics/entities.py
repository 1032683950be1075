"""Metrics of tagged words: entities, which count only if type, begin and end are right, and tags."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

from qkit.plugins.resampling import RowStatistics
from qkit.plugins.task import SCORE
from qkit.tasks._encoder.metrics.counts import Counts, ratio, scores
from qkit.tasks._encoder.tagging.schemes import entities

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]


def tagging(reference: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]]) -> RowStatistics:
    """Return a sample with the figures token_accuracy and those of counts.scores, of entities by type.

    Its rows are sentences: words of one sentence are not independent, so intervals over words would be too narrow. Types are those of the
    references and of the predictions.

    Args:
        reference: tags of each sentence's words, in IOB2.
        predicted: the same; entities are read strictly, as schemes.entities does.

    Raises:
        ValueError: a sentence has a different number of tags in the two.
    """
    import numpy as np

    known = [(set(entities(tags)), set(entities(guess))) for tags, guess in zip(reference, predicted, strict=True)]
    types = tuple(sorted({entity.type for pair in known for some in pair for entity in some}))
    columns = {name: column for column, name in enumerate(types)}
    values = np.zeros((len(known), 3 * len(types) + 2))
    for row, (wanted, guessed) in enumerate(known):
        for part, some in enumerate((wanted & guessed, wanted, guessed)):
            for name, count in Counter(entity.type for entity in some).items():
                values[row, part * len(types) + columns[name]] = count
        values[row, -2] = sum(one == other for one, other in zip(reference[row], predicted[row], strict=True))
        values[row, -1] = len(reference[row])
    return RowStatistics(values, partial(_of_sums, types))


def entity_f1(reference: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]]) -> RowStatistics:
    """Return a sample with micro F1 of entities alone, as the figure SCORE."""
    sample = tagging(reference, predicted)
    return RowStatistics(sample.values, lambda sums: {SCORE: sample.of_sums(sums)["f1_micro"]})


def _of_sums(types: Sequence[str], sums: Floats) -> Mapping[str, Floats]:
    return {"token_accuracy": ratio(sums[..., -2], sums[..., -1]), **scores(Counts.of(sums, len(types)), types)}
