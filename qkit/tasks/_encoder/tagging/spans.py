"""Turns labelled spans of characters into one tag for each word, in IOB2. A span must be whole words: it is never stretched or cut."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from qkit.core.errors import short
from qkit.plugins.example import RowError
from qkit.tasks._encoder.tagging.schemes import OUTSIDE

SHOWN = 40  # characters of a text that a message quotes


@dataclass(frozen=True, slots=True, order=True)
class Span:
    """The characters `begin` to `end` of a text, where `end` is not included, and their label. Characters are code points."""

    begin: int
    end: int
    label: str


def tags_of_spans(text: str, words: Sequence[tuple[int, int]], spans: Sequence[Span]) -> tuple[str, ...]:
    """Return one tag in IOB2 for each word.

    Args:
        text: which the offsets count in.
        words: begin and end of each word, in order; they do not overlap.
        spans: in any order.

    Raises:
        RowError: a span is empty, exceeds the text, overlaps another one, or begins or ends anywhere but where words do.
    """
    ordered = sorted(spans)
    for span in ordered:
        _check_range(text, span)
    for first, second in pairwise(ordered):
        if second.begin < first.end:
            raise RowError(f"the spans {_shown(text, first)} and {_shown(text, second)} overlap: a word has one tag")
    tags = [OUTSIDE] * len(words)
    for span in ordered:
        covered = _covered(text, words, span)
        tags[covered.start] = f"B-{span.label}"
        tags[covered.start + 1 : covered.stop] = [f"I-{span.label}"] * (len(covered) - 1)
    return tuple(tags)


def _check_range(text: str, span: Span) -> None:
    if not span.label:
        raise RowError(f"the span {span.begin}:{span.end} has no label")
    if span.begin >= span.end:
        raise RowError(f"the span {span.begin}:{span.end} {span.label} is empty: its end must be after its begin")
    if span.begin < 0 or span.end > len(text):
        raise RowError(
            f"the span {span.begin}:{span.end} {span.label} exceeds the text, which has {len(text)} characters: "
            "offsets count characters from 0, not bytes"
        )


def _covered(text: str, words: Sequence[tuple[int, int]], span: Span) -> range:
    """The words of a span."""
    first = bisect_right(words, span.begin, key=lambda word: word[1])  # the first word that ends after the span's begin
    stop = bisect_left(words, span.end, key=lambda word: word[0])  # the first word that begins after it
    if first >= stop:
        raise RowError(f"the span {_shown(text, span)} covers no word: remove it")
    begin, end = words[first][0], words[stop - 1][1]
    if (begin, end) == (span.begin, span.end):
        return range(first, stop)
    reasons = []
    if span.begin != begin:
        reasons.append(_misplaced("begins", span.begin, text, words[first]))
    if span.end != end:
        reasons.append(_misplaced("ends", span.end, text, words[stop - 1]))
    whole = _shown(text, Span(begin, end, span.label))
    raise RowError(f"the span {_shown(text, span)} {' and '.join(reasons)}: the whole words are {whole}")


def _misplaced(verb: str, offset: int, text: str, word: tuple[int, int]) -> str:
    """Where an offset is that is not where the word begins or ends."""
    begin, end = word
    where = "inside" if begin < offset < end else "before" if offset < begin else "after"
    return f"{verb} {where} the word {_quoted(text, begin, end)} ({begin}:{end})"


def _shown(text: str, span: Span) -> str:
    return f"{span.begin}:{span.end} {span.label} ({_quoted(text, span.begin, span.end)})"


def _quoted(text: str, begin: int, end: int) -> str:
    return repr(short(text[begin:end], SHOWN))
