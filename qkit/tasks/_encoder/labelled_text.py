"""Reads a record as a text, or a pair of texts, with its labels."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any

from qkit.core.errors import short
from qkit.plugins.example import LabelledText, RowError
from qkit.recipe.schema import Data
from qkit.tasks._columns import column_of, left_over, missing
from qkit.tasks._texts import check_characters

# Our names, and the columns that stand for them in public data sets; data.columns maps others
COLUMNS: Mapping[str, tuple[str, ...]] = {
    "text": (
        "text",
        "sentence",
        "sentence1",
        "premise",
        "question1",
        "utterance",
        "query",
        "review",
        "content",
        "tweet",
    ),
    "pair": ("pair", "text_pair", "sentence2", "hypothesis", "question2"),
    "label": ("label", "labels", "category", "intent", "class", "sentiment", "target", "score"),
}
KNOWN = frozenset(name for names in COLUMNS.values() for name in names)


def labelled_text(
    record: Mapping[str, Any], section: Data, read: Callable[[Any, str, Data], tuple[str, ...]] | None = None
) -> LabelledText:
    """A record as an example, checked by the rules of `data.clean`. `read`: the labels, from the value and the name of their column.

    Raises:
        RowError: a column is missing, or a value is not a text or a label.
    """
    places = {ours: column_of(ours, record, section, COLUMNS) for ours in COLUMNS}
    for ours, place in places.items():
        if place is None and (ours != "pair" or ours in section.columns):
            raise RowError(missing(ours, record, section, COLUMNS))
    text, pair = (_text(record, places[ours], section) for ours in ("text", "pair"))
    assert text is not None
    names = (read or names_of)(record[str(places["label"])], str(places["label"]), section)
    return LabelledText(text, pair, names, *left_over(record, places.values(), section))


def texts_of(record: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """The `text`, and the `pair` if there is one, of a record that needs no label; nothing of them is checked.

    `columns`: which of its columns these are, where they have other names than in data sets.

    Raises:
        RowError: there is no such column.
    """
    section = Data.model_construct(columns=dict(columns))
    places = {ours: column_of(ours, record, section, COLUMNS) for ours in ("text", "pair")}
    for ours, place in places.items():
        if place is None and (ours == "text" or ours in columns):
            raise RowError(missing(ours, record, section, COLUMNS))
    return {ours: record[place] for ours, place in places.items() if place is not None and record[place] is not None}


def _text(record: Mapping[str, Any], column: str | None, section: Data) -> str | None:
    if column is None:
        return None
    value = record[column]
    if value is None or (isinstance(value, str) and not value.strip()):
        raise RowError(f"{column} is empty or contains only white space", "empty")
    if not isinstance(value, str):
        raise RowError(f"{column} is not a text: {short(repr(value))}")
    check_characters(value, column, section)
    return value


def names_of(value: Any, column: str, section: Data) -> tuple[str, ...]:
    """The names of one label, or of a list of labels."""
    if isinstance(value, list | tuple):
        return tuple(dict.fromkeys(_label(item, column, section) for item in value))
    return (_label(value, column, section),)


def several_names(value: Any, column: str, section: Data) -> tuple[str, ...]:
    """The names of any number of labels: of a list, of a JSON list in a text, or of a text that data.label_separator parts."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return ()
    if isinstance(value, str) and section.label_separator is not None:
        value = [part for part in value.split(section.label_separator) if part.strip()]
    elif isinstance(value, str) and value.lstrip().startswith("["):
        value = _listed(value, column)
    return names_of(value, column, section)


def _listed(text: str, column: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        raise RowError(f"{column} begins like a JSON list, but is none: {short(repr(text))}") from None


def numbers_of(value: Any, column: str, section: Data) -> tuple[str, ...]:
    """One number, or a list of them, in the notation that reads back to the same float."""
    values = value if isinstance(value, list | tuple) else [value]
    if not values:
        raise RowError(f"{column} has no number")
    return tuple(_number(item, column) for item in values)


def _number(value: Any, column: str) -> str:
    try:
        number = float(value) if isinstance(value, str | int | float) and not isinstance(value, bool) else math.nan
    except (ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise RowError(f"{column} is not a number: {short(repr(value))}")
    return repr(number)


def _label(value: Any, column: str, section: Data) -> str:
    if isinstance(value, bool | str | int) and str(value).strip():
        check_characters(str(value), column, section)
        return str(value).strip()
    raise RowError(f"{column} is not a label: {short(repr(value))}")
