"""How a finished model answers requests: a question and a context to a part of the context, or to nothing."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qkit.core.errors import ModelError, short
from qkit.model import added_tokens
from qkit.model.provenance import NOTE
from qkit.plugins.example import RowError
from qkit.plugins.task import LABELS, Prepared
from qkit.recipe.schema import Data, Evaluate
from qkit.tasks._answering.spans import THRESHOLD, joined_windows, shares
from qkit.tasks._answering.windows import UNANSWERED, context_of, windows
from qkit.tasks._encoder.encoder import TooLong
from qkit.tasks._texts import SURROGATE

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


LOGITS = 4  # by which a margin changes at most where the probability of none against the answer, near 1/2, changes by 1


class AnswerService:
    """`threshold`: see spans.THRESHOLD, None where every training question had an answer; a request may have its own."""

    FIELDS: Sequence[str] = ("question", "context")
    OPTIONS: Collection[str] = (THRESHOLD,)

    def __init__(self, tokenizer: Any, section: Data, longest: int, threshold: float | None):
        self.tokenizer = tokenizer
        self.section = section
        self.longest = longest
        self.threshold = threshold
        self.max_length = section.max_length

    def prepare(self, requests: Sequence[Mapping[str, Any]]) -> list[Prepared | RowError]:
        """The windows of each request, or what is wrong with it; all are tokenized in one call."""
        wrong = [_wrong(request) for request in requests]
        asked = [request for request, error in zip(requests, wrong, strict=True) if error is None]
        texts = [one["question"] for one in asked], [one["context"] for one in asked]
        made = iter(windows(self.tokenizer, *texts, self.section) if asked else [])
        return [error or self._prepared(request, next(made)) for request, error in zip(requests, wrong, strict=True)]

    def _prepared(self, request: Mapping[str, Any], made: Any) -> Prepared | RowError:
        if isinstance(made, TooLong):
            return RowError(str(made))
        given = request.get(THRESHOLD)
        return Prepared(
            [context_of(row, request["context"]) for row in made], self.threshold if given is None else given
        )

    def answer(self, prepared: Prepared, logits: Sequence[NDArray[np.float32]]) -> dict[str, Any]:
        """`answer`, its first character and that after its last, and its `score`, a probability; "" and null for no answer.

        `no_answer`: how much better no answer is, in logits. `logits`: [tokens, 2] of each window.
        """
        rows: Any = prepared.rows
        (found,) = joined_windows(rows, iter(logits), self.longest)
        margin = None if found.best is None else found.margin
        if found.best is None or (prepared.kept is not None and found.margin > prepared.kept):
            return {"answer": "", "start": None, "end": None, "score": None, "no_answer": margin}
        best = found.best
        return {
            "answer": best.text,
            "start": best.begin,
            "end": best.end,
            "score": best.confidence,
            "no_answer": margin,
        }

    def difference(self, expected: Mapping[str, Any], given: Mapping[str, Any], tolerance: float) -> str:
        """What differs between the answers to one request, "" if nothing does. `tolerance`: of the probability.

        Of two answers that are equally likely within the tolerance, either is right; also none, where `no_answer` of both is at the
        threshold within it.
        """
        scores = [answer["score"] for answer in (expected, given)]
        if None not in scores and not abs(scores[0] - scores[1]) <= tolerance:
            return f"the answer {short(repr(given['answer']))} has the probability {scores[1]:.4f}, not {scores[0]:.4f}"
        if expected["answer"] != given["answer"] and not (
            None not in scores or self._at_threshold(expected, given, tolerance)
        ):
            return f"the answer is {short(repr(given['answer']))}, not {short(repr(expected['answer']))}"
        return ""

    def _at_threshold(self, expected: Mapping[str, Any], given: Mapping[str, Any], tolerance: float) -> bool:
        """Whether either of two answers could as well be none."""
        margins = [answer["no_answer"] for answer in (expected, given)]
        if self.threshold is None or None in margins:
            return False
        return all(abs(margin - self.threshold) <= LOGITS * tolerance for margin in margins)


def _wrong(request: Mapping[str, Any]) -> RowError | None:
    """What is wrong with a request, or None."""
    for name in AnswerService.FIELDS:
        value = request.get(name)
        if not isinstance(value, str):
            return RowError(f"{name} is not a text: {short(repr(value))}" if value is not None else f"has no {name}")
        if not value.strip():
            return RowError(f"{name} is empty or contains only white space", "empty")
        if SURROGATE.search(value):
            return RowError(f"{name} contains half of a surrogate pair, which is not valid Unicode")
    given = request.get(THRESHOLD)
    if given is not None and (isinstance(given, bool) or not isinstance(given, int | float)):
        return RowError(f"{THRESHOLD} must be a number, not {short(repr(given))}")
    return None


def open_service(folder: Path, max_length: int) -> AnswerService:
    """Open the tokenizer of an artifact, and what its folder records of its windows.

    Raises:
        ModelError: the folder has no tokenizer, or no labels.json.
    """
    if not (folder / LABELS).is_file():
        raise ModelError(f"{folder}: {LABELS} is missing; export it again", source=folder)
    file = folder / NOTE
    note = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    section = Data(max_length=max_length, stride=note.get("stride"), too_long="split")
    longest = note.get("max_answer_tokens") or Evaluate().max_answer_tokens
    threshold = note.get("tuned", {}).get(THRESHOLD, 0.0) if shares(folder)[UNANSWERED] else None
    return AnswerService(added_tokens.bare_tokenizer(folder, False), section, longest, threshold)
