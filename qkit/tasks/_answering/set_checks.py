"""What the checks over questions mean, and those of a whole data set."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from qkit.plugins.checks import NAMED_ROWS, Check, Kind, SetRow
from qkit.recipe.schema import SPLITS
from qkit.tasks._answering.windows import ANSWERED, UNANSWERED
from qkit.tasks._encoder.kinds import LABELLED_CHECKS

QUESTION_CHECKS: Mapping[str, Kind] = {
    **{name: kind for name, kind in LABELLED_CHECKS.items() if name != "text_cut"},
    "length": Kind(
        "every question fits data.max_length, with its context in windows",
        "do not fit data.max_length and are dropped",
        "warn",
        "raise data.max_length or lower data.stride; a long answer needs a data.stride of more tokens than it has",
    ),
    "answer_tokens": Kind(
        "every answer begins and ends with a token",
        "have an answer that begins or ends inside of a token, so that only more or less than it can be predicted",
        "warn",
        "check the offsets of these answers: most end in the middle of a word by mistake",
    ),
    "answer_place": Kind(
        "every answer has one place in its context",
        "do not say which of several places is the answer: the first is taken",
        "warn",
        "give answer_start, the answer's first character in the context, counted from 0",
    ),
}


def described(rows: Sequence[SetRow]) -> dict[str, Any]:
    """The content of labels.json: the outputs of the head by id, and how many questions of each split have an answer."""
    if not rows:
        return {}
    counts = {split: dict.fromkeys((ANSWERED, UNANSWERED), 0) for split in SPLITS}
    for row in rows:
        counts[row.split][row.names[0]] += 1
    return {"names": ["start", "end"], "rows": counts}


def checks(rows: Sequence[SetRow]) -> Iterator[Check]:
    """Whether there are answers to learn from, and questions without one wherever the result is scored on such."""
    training = Counter(row.names[0] for row in rows if row.split == "train")
    if not training[ANSWERED]:
        remedy = "give questions with answers, or check which column data.columns maps to answers"
        yield Check("answers", "fail", "no training question has an answer: nothing can be learned", remedy=remedy)
        return
    unseen = [row for row in rows if row.split != "train" and row.names[0] == UNANSWERED]
    said = f"{training[ANSWERED]:,} training questions have an answer, {training[UNANSWERED]:,} have none"
    if training[UNANSWERED] or not unseen:
        yield Check("answers", "pass", said)
        return
    yield Check(
        "answers",
        "warn",
        f"{said}, but {len(unseen):,} held-out questions have none, and the model will answer them; the first is {unseen[0].place}",
        len(unseen),
        tuple(row.place for row in unseen[:NAMED_ROWS]),
        "give training questions without an answer, or leave these out",
    )
