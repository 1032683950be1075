"""Exact match and F1 of answers, by the rules of the SQuAD evaluation (Rajpurkar et al., 2016 and 2018).

Answers are compared in lower case, without punctuation and the articles a, an and the, and with single spaces. F1 is that of the words two
answers share. Of several accepted answers the best counts; a question without an answer is right, with F1 1, if nothing is answered.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from qkit.plugins.resampling import RowStatistics

ARTICLES = re.compile(r"\b(a|an|the)\b")
PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalized(text: str) -> str:
    """An answer as it is compared."""
    return " ".join(ARTICLES.sub(" ", text.lower().translate(PUNCTUATION)).split())


def accepted(references: Sequence[str]) -> list[str]:
    """The normalized answers that are accepted; "" alone where there are none, or all are empty."""
    return [words for reference in references if (words := normalized(reference))] or [""]


def exact(prediction: str, references: Sequence[str]) -> bool:
    """Whether the answer is one of those accepted."""
    return normalized(prediction) in accepted(references)


def f1(prediction: str, references: Sequence[str]) -> float:
    """The best F1 of the words with one of the accepted answers."""
    said = normalized(prediction).split()
    return max(_f1(said, reference.split()) for reference in accepted(references))


def _f1(said: Sequence[str], true: Sequence[str]) -> float:
    if not said or not true:
        return float(said == true)
    shared = sum((Counter(said) & Counter(true)).values())
    return 2 * shared / (len(said) + len(true))


def figures_of_answers(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> RowStatistics:
    """f1; where some questions have no answer and some have one: has_answer_exact, has_answer_f1, no_answer_exact."""
    import numpy as np

    from qkit.plugins.resampling import RowStatistics
    from qkit.tasks._encoder.metrics.counts import ratio

    pairs = list(zip(predictions, references, strict=True))
    has = np.array([accepted(true) != [""] for _, true in pairs], np.float64)
    right = np.array([exact(said, true) for said, true in pairs], np.float64)
    words = np.array([f1(said, true) for said, true in pairs])
    values = np.stack([np.ones(len(pairs)), words, has, has * right, has * words, (1 - has) * right], 1)
    both = 0 < has.sum() < len(pairs)

    def of_sums(sums: NDArray[np.float64]) -> Mapping[str, NDArray[np.float64]]:
        rows, every, answered, answered_right, answered_words, none_right = np.moveaxis(sums, -1, 0)
        figures = {"f1": ratio(every, rows)}
        if both:
            figures["has_answer_exact"] = ratio(answered_right, answered)
            figures["has_answer_f1"] = ratio(answered_words, answered)
            figures["no_answer_exact"] = ratio(none_right, rows - answered)
        return figures

    return RowStatistics(values, of_sums)
