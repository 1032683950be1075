"""How words with tags, and texts with spans, are told by their columns."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from qkit.plugins.first_recipe import CERTAIN, LIKELY, Column, Suggestion, Table
from qkit.tasks._encoder.tagging.records import COLUMNS, SPAN_KEYS, SPANS

TAGS = (*COLUMNS["tags"], "pos_tags", "pos", "chunk_tags")
TAG = re.compile(r"O|[BIESLUM]-\S+")


def of_tags(table: Table) -> Suggestion | None:
    """Lists of words and of as many tags, or a text with spans of characters."""
    if spans := _of_spans(table):
        return spans
    words, tags = table.named(COLUMNS["words"]), table.named(TAGS)
    if words is not None and tags is not None and words is not tags and _as_many(words, tags):
        return _suggestion(words, tags, CERTAIN)
    lists = [column for column in table.columns.values() if column.is_list]
    pairs = (
        (a, b) for a in lists for b in lists if a is not b and _as_many(a, b) and _are_tags(b) and not _are_tags(a)
    )
    found = next(pairs, None)
    return _suggestion(*found, LIKELY) if found else None


def _suggestion(words: Column, tags: Column, sure: int) -> Suggestion:
    why = f"{words.name} and {tags.name} have as many items in each record"
    return Suggestion(sure, why, {"words": words.name, "tags": tags.name}, tags.name if tags.is_list else None)


def _of_spans(table: Table) -> Suggestion | None:
    text, spans = table.named(COLUMNS["text"]), table.named(COLUMNS[SPANS])
    if text is None or spans is None or not text.is_text or not spans.is_list:
        return None
    items = [item for value in spans.values for item in value]
    if not items or not all(_is_span(item) for item in items):
        return None
    why = f"{spans.name} has begins and ends in {text.name}"
    return Suggestion(CERTAIN, why, {"text": text.name, "spans": spans.name})


def _is_span(item: Any) -> bool:
    if isinstance(item, dict):
        return {*SPAN_KEYS} <= item.keys()
    return isinstance(item, list) and len(item) == len(SPAN_KEYS) and isinstance(item[0], int)


def _as_many(words: Column, tags: Column) -> bool:
    if len(words.values) != len(tags.values):
        return False
    pairs = zip(map(_items, words.values), map(_items, tags.values), strict=True)
    return all(first and len(first) == len(second) for first, second in pairs)


def _items(value: Any) -> Sequence[Any]:
    return value.split() if isinstance(value, str) else value if isinstance(value, list) else ()


def _are_tags(column: Column) -> bool:
    return all(TAG.fullmatch(tag) for tag in column.counts)
