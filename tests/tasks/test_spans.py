"""Spans of characters as one tag for each word."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qkit.plugins.example import RowError
from qkit.tasks._encoder.tagging.schemes import entities
from qkit.tasks._encoder.tagging.spans import Span, tags_of_spans

TEXT = "Angela Merkel, of Berlin."
WORDS = [match.span() for match in re.finditer(r"\w+|[^\w\s]", TEXT)]  # Angela Merkel , of Berlin .


def test_each_word_has_one_tag() -> None:
    spans = [Span(18, 24, "LOC"), Span(0, 13, "PER")]
    assert tags_of_spans(TEXT, WORDS, spans) == ("B-PER", "I-PER", "O", "O", "B-LOC", "O")
    assert tags_of_spans(TEXT, WORDS, []) == ("O",) * 6
    assert tags_of_spans(TEXT, WORDS, [Span(0, 25, "ALL")]) == ("B-ALL", *["I-ALL"] * 5)
    assert tags_of_spans("", [], []) == ()


def test_neighbours_are_two_entities() -> None:
    spans = [Span(0, 6, "PER"), Span(7, 13, "PER"), Span(13, 14, "PER")]
    assert tags_of_spans(TEXT, WORDS, spans) == ("B-PER", "B-PER", "B-PER", "O", "O", "O")


def test_offsets_count_characters_not_bytes() -> None:
    text = "\U0001f600 Zo\u00eb"
    assert tags_of_spans(text, [(0, 1), (2, 5)], [Span(2, 5, "PER")]) == ("O", "B-PER")


@pytest.mark.parametrize(
    ("spans", "message"),
    [
        ([Span(0, 12, "PER")], "ends inside the word 'Merkel' (7:13): the whole words are 0:13 PER ('Angela Merkel')"),
        ([Span(1, 13, "PER")], "begins inside the word 'Angela' (0:6): the whole words are 0:13 PER ('Angela Merkel')"),
        ([Span(17, 24, "LOC")], "begins before the word 'Berlin' (18:24): the whole words are 18:24 LOC ('Berlin')"),
        ([Span(0, 7, "PER")], "the span 0:7 PER ('Angela ') ends after the word 'Angela' (0:6): the whole words are 0:6 PER ('Angela')"),
        ([Span(19, 23, "LOC")], "begins inside the word 'Berlin' (18:24) and ends inside the word 'Berlin' (18:24)"),
        ([Span(6, 7, "PER")], "the span 6:7 PER (' ') covers no word: remove it"),
        ([Span(0, 13, "PER"), Span(7, 13, "LOC")], "the spans 0:13 PER ('Angela Merkel') and 7:13 LOC ('Merkel') overlap"),
        ([Span(7, 13, "PER"), Span(7, 13, "PER")], "overlap"),
        ([Span(3, 3, "PER")], "the span 3:3 PER is empty: its end must be after its begin"),
        ([Span(13, 0, "PER")], "the span 13:0 PER is empty"),
        ([Span(18, 26, "LOC")], "the span 18:26 LOC exceeds the text, which has 25 characters"),
        ([Span(-7, -1, "LOC")], "the span -7:-1 LOC exceeds the text"),
        ([Span(0, 6, "")], "the span 0:6 has no label"),
    ],
)  # fmt: skip
def test_a_span_that_cannot_be_tags(spans: list[Span], message: str) -> None:
    with pytest.raises(RowError, match=re.escape(message)):
        tags_of_spans(TEXT, WORDS, spans)


def test_a_long_span_is_not_quoted_in_full() -> None:
    with pytest.raises(RowError) as caught:
        tags_of_spans("x" * 10_000, [(0, 10_000)], [Span(1, 10_000, "X")])
    assert len(str(caught.value)) < 300


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(1, 3), st.sampled_from(["", "PER", "LOC"])), max_size=8), st.data())
def test_entities_are_the_spans(chunks: list[tuple[int, str]], data: st.DataObject) -> None:
    """Chunks of words, each a span where it has a label."""
    lengths = [data.draw(st.integers(1, 5)) for count, _ in chunks for _ in range(count)]
    gaps = [data.draw(st.integers(0, 2)) for _ in lengths]
    text, words = "", []
    for gap, length in zip(gaps, lengths, strict=True):
        text += " " * gap
        words.append((len(text), len(text) + length))
        text += "w" * length
    spans, first = [], 0
    for count, label in chunks:
        if label:
            spans.append(Span(words[first][0], words[first + count - 1][1], label))
        first += count
    named = entities(tags_of_spans(text, words, data.draw(st.permutations(spans))))
    assert [Span(words[entity.begin][0], words[entity.end - 1][1], entity.type) for entity in named] == spans
