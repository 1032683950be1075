"""Reads a record as words with tags: two lists, or a text with spans of characters."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from qkit.core.errors import listed, short
from qkit.plugins.example import RowError, TaggedWords
from qkit.recipe.schema import Data
from qkit.tasks._columns import column_of, left_over, missing, not_there
from qkit.tasks._encoder.tagging.spans import Span, tags_of_spans
from qkit.tasks._encoder.tagging.words import word_offsets
from qkit.tasks._texts import check_characters

# Our names, and the columns that stand for them in public data sets; data.columns maps others
COLUMNS: Mapping[str, tuple[str, ...]] = {
    "words": ("words", "tokens"),
    "tags": ("tags", "ner_tags", "labels", "ner"),
    "text": ("text", "sentence", "content"),
    "spans": ("spans", "entities"),
}
KNOWN = frozenset(name for names in COLUMNS.values() for name in names)
WORDS, SPANS = "words", "spans"
FORMS: Mapping[str, tuple[str, str]] = {WORDS: ("words", "tags"), SPANS: ("text", "spans")}  # those first that win
SPAN_KEYS = ("start", "end", "label")


def tagged_words(record: Mapping[str, Any], section: Data) -> TaggedWords:
    """A record as an example, checked by the rules of `data.clean`.

    Raises:
        RowError: a column is missing, there are not as many tags as words, or a span does not fit the text.
    """
    read_in = form_of(record, section)
    if read_in is None:
        raise RowError(_missing(record, section))
    first, second = (str(column_of(name, record, section, COLUMNS)) for name in FORMS[read_in])
    read = _words_of_text if read_in == SPANS else _listed_words
    words, tags = read(record[first], record[second], first, second)
    if not words:
        raise RowError(f"{first} has no words", "empty")
    check_characters(" ".join(words), first, section)
    return TaggedWords(words, tags, *left_over(record, (first, second), section))


def form_of(record: Mapping[str, Any], section: Data) -> str | None:
    """Which of FORMS a record has the columns of, or None."""
    return next(
        (form for form, pair in FORMS.items() if all(column_of(name, record, section, COLUMNS) for name in pair)), None
    )


def _missing(record: Mapping[str, Any], section: Data) -> str:
    for ours, theirs in section.columns.items():
        if ours in COLUMNS and theirs not in record:
            return not_there(ours, record, section)
    return (
        f"has the columns {listed(record)}; it must have words and tags ({', '.join(COLUMNS['words'])}; {', '.join(COLUMNS['tags'])}), "
        f"or a text and spans ({', '.join(COLUMNS['text'])}; {', '.join(COLUMNS['spans'])}); data.columns maps others, such as "
        "{words: your_column, tags: your_other_column}"
    )


# --- words and tags ---------------------------------------------------------------------------------------------------


def _listed_words(words: Any, tags: Any, first: str, second: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    said, marked = _list(words, first), _list(tags, second)
    if len(said) != len(marked):
        raise RowError(
            f"has {len(said):,} words in {first} and {len(marked):,} tags in {second}: each word has one tag"
        )
    for place, word in enumerate(said):
        if not isinstance(word, str) or not word:
            raise RowError(
                f"{first}: word {place} (counted from 0) is not a text with a sign in it: {short(repr(word))}"
            )
    return tuple(said), tuple(_tag(tag, second) for tag in marked)


def _list(value: Any, column: str) -> Sequence[Any]:
    """A list; that of a JSON text; or what spaces part."""
    if isinstance(value, str):
        value = _parsed(value, column) if value.lstrip().startswith("[") else value.split()
    if not isinstance(value, list | tuple):
        raise RowError(f"{column} is not a list: {short(repr(value))}")
    return value


def _parsed(text: str, column: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        raise RowError(f"{column} begins like a JSON list, but is none: {short(repr(text))}") from None


def _tag(tag: Any, column: str) -> str:
    if isinstance(tag, int) and not isinstance(tag, bool):
        raise RowError(
            f"{column} has the number {tag} for a tag, and its column does not say what it means: write names, such as B-person"
        )
    if not isinstance(tag, str) or not tag.strip():
        raise RowError(f"{column} has no name for a tag: {short(repr(tag))}")
    return _name(tag)


def _name(text: str) -> str:
    """A name without white space: tags are written one after another, with spaces between them."""
    return "_".join(text.split())


# --- a text and spans -------------------------------------------------------------------------------------------------


def _words_of_text(text: Any, spans: Any, first: str, second: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    if not isinstance(text, str):
        raise RowError(f"{first} is not a text: {short(repr(text))}")
    offsets = word_offsets(text)
    tags = tags_of_spans(text, offsets, [_span(span, second) for span in _list(spans or [], second)])
    return tuple(text[begin:end] for begin, end in offsets), tags


def _span(span: Any, column: str) -> Span:
    values = [span.get(key) for key in SPAN_KEYS] if isinstance(span, Mapping) else span
    if isinstance(values, list | tuple) and len(values) == len(SPAN_KEYS):
        begin, end, label = values
        if type(begin) is int and type(end) is int and isinstance(label, str):
            return Span(begin, end, _name(label))
    raise RowError(
        f"{column} has a span that is not {{start: number, end: number, label: name}} or [start, end, label]: {short(repr(span))}"
    )


def request_of(record: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """The `tokens` or the `text` of a record without its tags, or of a prepared row; a text is not checked.

    `columns`: which of its columns these are, where they have other names than in data sets; if one is mapped, no other is read.

    Raises:
        RowError: there is no such column, or its words are no list.
    """
    section = Data.model_construct(columns=dict(columns))
    wanted = [ours for ours in ("words", "text") if ours in columns] or ["words", "text"]
    for ours in wanted:
        if place := column_of(ours, record, section, COLUMNS):
            return {"tokens": list(_list(record[place], place))} if ours == "words" else {"text": record[place]}
    raise RowError(missing(wanted[-1], record, section, COLUMNS))
