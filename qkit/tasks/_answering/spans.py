"""Logits to answers: the best part of the context over all windows of a question, or no answer; and what models are compared by."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qkit.plugins.runtime import Encodes, RowScores, TextRow
from qkit.plugins.task import LABELS, Prediction
from qkit.tasks._answering.squad import exact
from qkit.tasks._answering.windows import ANSWERED, OUTSIDE, UNANSWERED, ContextRow, context_row

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from qkit.recipe.schema import Recipe

THRESHOLD = (
    "threshold"  # in the settings: how much better "no answer" must be than the best answer, in logits, to be predicted
)
RARE = 1e-3  # probability that a constant model gives to what no training row has


@dataclass(frozen=True)
class Span:
    """A part of a context. `score`: the logit of its begin and that of its end; `begin`, `end`: characters; `confidence`: its probability
    among all pairs of tokens of its window."""

    score: float
    begin: int
    end: int
    text: str
    confidence: float


@dataclass(frozen=True)
class Answered:
    """What a model makes of a question. `best`: None where no token of its context can be an answer; `nothing`: the logits of no answer."""

    best: Span | None
    nothing: float

    @property
    def margin(self) -> float:
        """How much better no answer is than the best one, in logits."""
        return float("inf") if self.best is None else self.nothing - self.best.score


def scores(row: TextRow, logits: NDArray[np.float32]) -> RowScores:
    """The log-probabilities of all tokens of a window as the begin of the answer, and as its end: [2, tokens], from logits [tokens, 2]."""
    import numpy as np

    full = _log_softmax(logits).T.astype(np.float32)
    targets = np.take_along_axis(full, np.array(row.labels, np.int64)[:, None], 1)[:, 0]
    return RowScores(targets, full.argmax(1).astype(np.int64), np.ascontiguousarray(full), unit="tokens of the row")


def _log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """Log-probabilities over the tokens, [tokens, 2]."""
    import numpy as np

    shifted = logits.astype(np.float64) - logits.max(0)
    result: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(0))
    return result


def best_span(row: ContextRow, logits: NDArray[np.float32], longest: int) -> Span | None:
    """The most likely part of a window's context that has at most `longest` tokens; of equal ones the first. None if it has no token."""
    import numpy as np

    inside = np.flatnonzero(np.array(row.begins) != OUTSIDE)
    if not len(inside):
        return None
    starts, ends = logits[inside, 0].astype(np.float64), logits[inside, 1].astype(np.float64)
    best = (-np.inf, 0, 0)
    for further in range(min(longest, len(inside))):
        sums = starts[: len(starts) - further] + ends[further:]
        place = int(sums.argmax())
        if sums[place] > best[0] or (sums[place] == best[0] and place < best[1]):
            best = (float(sums[place]), place, place + further)
    first, last = inside[best[1]], inside[best[2]]
    taken = row.context[row.begins[first] : row.ends[last]]
    begin = row.begins[first] + len(taken) - len(taken.lstrip())
    logp = _log_softmax(logits)
    text = taken.strip()
    return Span(best[0], begin, begin + len(text), text, float(np.exp(logp[first, 0] + logp[last, 1])))


def answered(
    runtime: Encodes, rows: Sequence[ContextRow], longest: int, advance: Callable[[int], None] = lambda _: None
) -> list[Answered]:
    """What a model makes of each question, from all its windows. `advance`: called after each."""
    return joined_windows(rows, runtime.logits(rows), longest, advance)


def joined_windows(
    rows: Sequence[ContextRow],
    logits_of: Iterator[NDArray[np.float32]],
    longest: int,
    advance: Callable[[int], None] = lambda _: None,
) -> list[Answered]:
    """Of each question the best part in any of its windows, and the least logits of no answer. `logits_of`: each window's, [tokens, 2]."""
    questions: list[Answered] = []
    for row, logits in zip(rows, logits_of, strict=True):
        found, nothing = best_span(row, logits, longest), float(logits[0].astype("float64").sum())
        if row.window == 0 or not questions:
            questions.append(Answered(found, nothing))
        else:
            before = questions[-1]
            spans = [span for span in (before.best, found) if span is not None]
            questions[-1] = Answered(max(spans, key=lambda s: s.score, default=None), min(before.nothing, nothing))
        advance(1)
    return questions


@dataclass(frozen=True)
class Reader:
    """`longest`: tokens of an answer; `threshold`: see THRESHOLD, None where every question has an answer."""

    longest: int
    threshold: float | None

    def predict(
        self, runtime: Encodes, rows: Sequence[ContextRow], advance: Callable[[int], None] = lambda _: None
    ) -> list[Prediction]:
        """The answer to each question, "" for none. `answer_start`: its first character; `no_answer`: see Answered.margin."""
        return [self._prediction(one) for one in answered(runtime, rows, self.longest, advance)]

    def _prediction(self, one: Answered) -> Prediction:
        none = {} if self.threshold is None or one.best is None else {"no_answer": one.margin}
        if one.best is None or (self.threshold is not None and one.margin > self.threshold):
            return Prediction("", {"answer_start": None, **none})
        details = {"answer_start": one.best.begin, "confidence": one.best.confidence}
        return Prediction(one.best.text, {**details, **none})


# --- no answer --------------------------------------------------------------------------------------------------------


def threshold(questions: Sequence[Answered], references: Sequence[Sequence[str]]) -> float:
    """The margin above which no answer should be predicted, so that most of these questions are right; 0 without questions.

    It lies in the middle between two margins; of several that are equally good it is the one nearest to 0.
    """
    judged = sorted(
        (one.margin, bool(one.best and exact(one.best.text, true)), exact("", true))
        for one, true in zip(questions, references, strict=True)
        if one.best is not None
    )
    if not judged:
        return 0.0
    margins = [margin for margin, _, _ in judged]
    right = sum(nothing for _, _, nothing in judged)  # with a threshold below all margins, nothing is ever answered
    found = [(right, margins[0] - 1)]
    for place, (margin, answer, nothing) in enumerate(judged):
        right += answer - nothing
        following = margins[place + 1] if place + 1 < len(margins) else margin + 2
        if following > margin:
            found.append((right, (margin + following) / 2))
    return max(found, key=lambda one: (one[0], -abs(one[1])))[1]


def tuned(runtime: Encodes, recipe: Recipe, data: Path) -> dict[str, float]:
    """The setting THRESHOLD, chosen on the validation rows of a data folder; none where every training question has an answer."""
    import pyarrow.parquet as pq

    if not shares(data)[UNANSWERED]:
        return {}
    records = pq.read_table(data / "validation.parquet").to_pylist()
    rows = [context_row(record) for record in records]
    references = [record["names"] for record in records if not record["window"]]
    return {THRESHOLD: threshold(answered(runtime, rows, recipe.evaluate.max_answer_tokens), references)}


# --- a model that knows nothing ---------------------------------------------------------------------------------------


class Uniform(Encodes):
    """A model without an input: no answer is as likely as in the training rows, and all tokens of the context are equally likely."""

    def __init__(self, unanswered: float):
        self.unanswered = unanswered

    def logits(self, rows: Sequence[Any]) -> Iterator[NDArray[np.float32]]:
        import numpy as np

        for row in rows:
            inside = np.array(row.begins) != OUTSIDE
            share = np.where(inside, (1 - self.unanswered) / max(int(inside.sum()), 1), RARE / len(inside))
            share[0] = self.unanswered
            yield np.repeat(np.log(share)[:, None], 2, 1).astype(np.float32)

    def memory_bytes(self) -> int:
        return 0


def shares(data: Path) -> Mapping[str, int]:
    """How many questions of the training rows of a data folder have an answer, and how many none."""
    rows: Mapping[str, int] = json.loads((data / LABELS).read_text(encoding="utf-8"))["rows"]["train"]
    return rows


def open_uniform(data: Path) -> Uniform:
    """The baseline of a data folder."""
    counts = shares(data)
    share = counts[UNANSWERED] / max(counts[ANSWERED] + counts[UNANSWERED], 1)
    return Uniform(min(max(share, RARE), 1 - RARE))
