"""Reads a record as a question on a context, with its answers: rows as SQuAD's, nested or not, and flat ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qkit.core.errors import short
from qkit.plugins.example import Question, RowError
from qkit.recipe.schema import Data
from qkit.tasks._columns import column_of, left_over, missing
from qkit.tasks._texts import check_characters

# Our names, and the columns that stand for them in public data sets; data.columns maps others
COLUMNS: Mapping[str, tuple[str, ...]] = {
    "question": ("question", "query"),
    "context": ("context", "passage", "paragraph", "document", "text"),
    "answers": ("answers", "answer"),
    "answer_start": ("answer_start", "start"),
    "is_impossible": ("is_impossible",),
    "id": ("id",),
}
NEEDED = ("question", "context", "answers")
BESIDE = ("title", "plausible_answers")  # columns of SQuAD that are no part of a question
KNOWN = frozenset(BESIDE).union(*COLUMNS.values())
NEAR = 5  # characters about which an offset may be wrong, to be told so


def question_of(record: Mapping[str, Any], section: Data) -> Question:
    """A record as an example, checked by the rules of `data.clean`.

    Raises:
        RowError: a column is missing, or an answer is not in the context where the record says so.
    """
    places = {ours: column_of(ours, record, section, COLUMNS) for ours in COLUMNS}
    for ours, place in places.items():
        if place is None and (ours in NEEDED or ours in section.columns):
            raise RowError(missing(ours, record, section, COLUMNS))
    values = {ours: record[place] for ours, place in places.items() if place is not None}
    question, context = (_text(values[ours], str(places[ours]), section) for ours in ("question", "context"))
    texts, starts = _given(values, str(places["answers"]))
    _check_impossible(values.get("is_impossible"), texts)
    placed = _placed(texts, starts, context)
    return Question(
        question,
        context,
        tuple(dict.fromkeys(placed)),
        str(values.get("id") or ""),
        starts is not None or all(context.count(text) == 1 for text in texts),
        *left_over(record, places.values(), section, BESIDE),
    )


def asked(record: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """The `question` and the `context` of a record that needs no answer, or of a prepared row; nothing of them is checked.

    Raises:
        RowError: there is no such column.
    """
    if "begins" in record:  # of a prepared row, text and pair
        return {"question": record["text"], "context": record["pair"]}
    section = Data.model_construct(columns=dict(columns))
    places = {ours: column_of(ours, record, section, COLUMNS) for ours in ("question", "context")}
    for ours, place in places.items():
        if place is None:
            raise RowError(missing(ours, record, section, COLUMNS))
    return {ours: record[str(place)] for ours, place in places.items()}


def _text(value: Any, column: str, section: Data) -> str:
    if value is None or (isinstance(value, str) and not value.strip()):
        raise RowError(f"{column} is empty or contains only white space", "empty")
    if not isinstance(value, str):
        raise RowError(f"{column} is not a text: {short(repr(value))}")
    check_characters(value, column, section)
    return value


# --- answers ----------------------------------------------------------------------------------------------------------


def _given(values: Mapping[str, Any], column: str) -> tuple[list[str], list[int] | None]:
    """The texts of the answers, and where they begin, or None if the record does not say; none of a question without an answer."""
    given, starts = values["answers"], values.get("answer_start")
    if isinstance(given, Mapping) and {"text", "answer_start"} <= given.keys():  # as the Hugging Face hub has SQuAD
        given, starts = given["text"], given["answer_start"]
    elif isinstance(given, list) and given and all(isinstance(one, Mapping) for one in given):  # as SQuAD's file has it
        if missing := [one for one in given if not {"text", "answer_start"} <= one.keys()]:
            raise RowError(f"{column} has an answer without text or answer_start: {short(repr(missing[0]))}")
        given, starts = [one["text"] for one in given], [one["answer_start"] for one in given]
    texts = _listed_texts(given, column)
    if not texts or starts is None or starts == "":
        return texts, None
    numbers = [_number(one) for one in (starts if isinstance(starts, list) else [starts])]
    if len(numbers) != len(texts):
        raise RowError(f"{column} has {len(texts)} texts and {len(numbers)} values of answer_start")
    return texts, numbers


def _listed_texts(value: Any, column: str) -> list[str]:
    values = value if isinstance(value, list | tuple) else [] if value in (None, "") else [value]
    for text in values:
        if not isinstance(text, str):
            raise RowError(f"{column} is not a text, a list of texts, or {{text, answer_start}}: {short(repr(text))}")
        if not text.strip():
            raise RowError(f"{column} has an answer of white space", "empty")
    return list(values)


def _number(value: Any) -> int:
    if isinstance(value, str) and value.strip().isdecimal():
        return int(value)
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    raise RowError(f"answer_start is not a whole number from 0: {short(repr(value))}")


def _check_impossible(value: Any, texts: Sequence[str]) -> None:
    """Raise RowError if a record says both that there is an answer and that there is none."""
    said = {"true": True, "1": True, "false": False, "0": False, "": None}.get(str(value).lower(), value)
    if said is True and texts:
        raise RowError(f"is_impossible is true, but there is an answer: {short(repr(texts[0]))}")
    if said is False and not texts:
        raise RowError("is_impossible is false, but there is no answer")


def _placed(texts: Sequence[str], starts: Sequence[int] | None, context: str) -> list[tuple[str, int]]:
    """Each answer without white space around it, and where it begins."""
    placed = []
    for index, text in enumerate(texts):
        begin = context.find(text) if starts is None else starts[index]
        if begin < 0:
            raise RowError(f"the answer {short(repr(text))} is not in the context")
        if not context.startswith(text, begin):
            raise RowError(_misplaced(text, begin, context))
        placed.append((text.strip(), begin + len(text) - len(text.lstrip())))
    return placed


def _misplaced(text: str, begin: int, context: str) -> str:
    """What is wrong with an offset."""
    there = short(repr(context[begin : begin + len(text)]))
    said = f"the answer {short(repr(text))} does not begin at answer_start={begin}, where the context has {there}"
    places = [place for place in range(len(context)) if context.startswith(text, place)]
    if not places:
        return f"the answer {short(repr(text))} is not in the context, which has {there} at answer_start={begin}"
    for unit, encoding, size in (("bytes of UTF-8", "utf-8", 1), ("units of UTF-16", "utf-16-le", 2)):
        if any(len(context[:place].encode(encoding, "surrogatepass")) == begin * size for place in places):
            return f"{said}: it counts {unit}, and must count characters"
    nearest_place = min(places, key=lambda place: abs(place - begin))
    distance = abs(nearest_place - begin)
    if distance <= NEAR:
        return f"{said}, but at {nearest_place}: off by {distance}"
    return f"{said}, but at {nearest_place}"
