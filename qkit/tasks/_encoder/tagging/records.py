"""Reads a record as words with tags: two lists, or a text with spans of characters."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from qkit.core.errors import listed, nearest, short
from qkit.plugins.example import RowError, TaggedWords
from qkit.recipe.schema import Data
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
SPAN_KEYS = ("start", "end", "label")


def tagged_words(record: Mapping[str, Any], section: Data) -> TaggedWords:
    """A record as an example, checked by the rules of `data.clean`.

    Raises:
        RowError: a column is missing, there are not as many tags as words, or a span does not fit the text.
    """
    places = {ours: _column(ours, record, section) for ours in COLUMNS}
    pair = next((pair for pair in (("words", "tags"), ("text", "spans")) if all(places[name] for name in pair)), None)
    if pair is None:
        raise RowError(_missing(record, section))
    first, second = (str(places[name]) for name in pair)
    read = _listed_words if pair[0] == "words" else _words_of_text
    words, tags = read(record[first], record[second], first, second)
    if not words:
        raise RowError(f"{first} has no words", "empty")
    check_characters(" ".join(words), first, section)
    rest = [name for name in record if name not in (first, second) and record[name] not in (None, "")]
    matched = {name: [p for p in section.ignore if fnmatchcase(name, p)] for name in rest}
    unread = tuple(name for name, patterns in matched.items() if not patterns and not _is_used(name, section))
    return TaggedWords(words, tags, unread, tuple({p for some in matched.values() for p in some}))


def _column(ours: str, record: Mapping[str, Any], section: Data) -> str | None:
    """The record's column for one of our names, or None."""
    if ours in section.columns:
        return section.columns[ours] if section.columns[ours] in record else None
    taken = {*section.columns.values()}
    return next((name for name in COLUMNS[ours] if name in record and name not in taken), None)


def _is_used(name: str, section: Data) -> bool:
    """Whether splits go by this column."""
    return name in {section.columns.get(ours, ours) for ours in (section.group, section.stratify) if ours}


def _missing(record: Mapping[str, Any], section: Data) -> str:
    for ours, theirs in section.columns.items():
        if ours in COLUMNS and theirs not in record:
            close = nearest(theirs, list(record))
            return f"has no column {short(repr(theirs))} (data.columns maps {ours} to it){close}; it has the columns {listed(record)}"
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


def text_of(record: Mapping[str, Any], columns: Mapping[str, str]) -> Any:
    """The sentence of a record without its tags: its words with spaces between them, or its text."""
    for ours in ("words", "text"):
        for name in (columns[ours],) if ours in columns else COLUMNS[ours]:
            if name in record:
                value = record[name]
                return " ".join(map(str, value)) if isinstance(value, list | tuple) else value
    return None


def unknown_column(section: Data) -> str:
    """The error for the first name in data.columns that nothing reads; "" if all are read."""
    known = sorted({*COLUMNS, *filter(None, (section.group, section.stratify))})
    for ours, theirs in section.columns.items():
        if ours not in known:
            return (
                f"data.columns maps {short(repr(ours))} to {short(repr(theirs))}, but {short(repr(ours))} is not a name that this task "
                f"reads{nearest(ours, known)}; it reads {', '.join(known)}"
            )
    return ""
