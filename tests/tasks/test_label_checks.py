"""What is odd about labels, and what is not."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qkit.tasks._encoder.label_checks import (
    LabelledRow,
    NearNames,
    RareLabel,
    conflicts,
    near_names,
    rare_labels,
)


def rows(*labels: str, split: str = "train") -> list[LabelledRow]:
    """Rows of different texts with these labels."""
    return [
        LabelledRow(f"{split} {index}", label, split, f"{split}.csv:{index + 2}") for index, label in enumerate(labels)
    ]


def test_rare_labels_are_counted_in_training() -> None:
    known = [*rows("a", "a", "a", "b", "c", "c"), *rows("b", "b", "b", "d", split="test")]
    rare = rare_labels(known, 3)
    assert rare == [RareLabel("b", 1, 3), RareLabel("c", 2, 3)]
    assert rare[0].message == "label 'b' has 1 row, fewer than 3"
    assert rare_labels(known, 1) == []


def test_texts_with_several_labels_bound_the_accuracy() -> None:
    known = [
        LabelledRow(text, label, "train", f"train.csv:{line}")
        for line, (text, label) in enumerate(
            itertools.chain(zip("ppppqqrrs", "aabbabccc", strict=True), [("p", "a")]), 2
        )
    ]
    both = conflicts(known)
    assert [(text.text, text.labels, text.lost) for text in both.texts] == [
        ("p", (("a", 3), ("b", 2)), 2),
        ("q", (("a", 1), ("b", 1)), 1),
    ]
    assert both.most_right == 7 and both.best_accuracy == 0.7
    assert both.message == (
        "2 texts have different labels: no classifier can get more than 7 of these 10 rows right (70.00 %); "
        "one text has the labels 'a' (3 rows), 'b' (2 rows): train.csv:2, train.csv:3, train.csv:4, train.csv:5, train.csv:11"
    )
    assert conflicts(known[6:8]).best_accuracy == conflicts([]).best_accuracy == 1
    assert conflicts([]).message == "no text has different labels"


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from("pqr"), st.sampled_from("abc")), min_size=1, max_size=12))
def test_no_choice_of_labels_beats_the_bound(pairs: list[tuple[str, str]]) -> None:
    best = max(
        sum(dict(zip("pqr", choice, strict=True))[text] == label for text, label in pairs)
        for choice in itertools.product("abc", repeat=3)
    )
    assert conflicts(LabelledRow(text, label, "train", "") for text, label in pairs).most_right == best


@pytest.mark.parametrize(
    ("one", "other", "edits"),
    [
        ("card_arrival", "card_arival", 1),
        ("card_arrival", "card_arrivla", 1),
        ("card_arrival", "card_arrivals", 1),
        ("card_arrival", "cart_arrival", None),  # too short to tell a typo from a word
        ("complaint", "complainet", 1),
        ("cancellation", "cancelaton", 2),
        ("exchange_rate", "exchnage_rate", 1),
        ("Card Arrival", "card_arrival", 0),
        ("CardArrival", "card-arrival", 0),
        ("caf\u00e9", "cafe\u0301", 0),
        ("caf\u00e9", "cafe", 0),
        ("billing ", "Billing", 0),
        ("label_1", "label_2", None),
        ("label_1", "label_12", None),
        ("label1", "label2", None),
        ("topic 2023a", "topic 2023b", None),
        ("q1_results", "q2_results", None),
        ("version 1.12", "version 11.2", None),
        ("lable_1", "label_1", 1),
        ("lable_1", "label_2", None),
        ("positive", "negative", None),
        ("typical", "atypical", None),
        ("increase", "decrease", None),
        ("minimum", "maximum", None),
        ("class_a", "class_b", None),
        ("text", "test", None),
        ("card_arrival", "cash_arrival", None),
        ("reverted_card_payment", "reverted_cash_payments", None),
        ("\u30d0\u30b9", "\u30cf\u30b9", None),  # the mark tells ba from ha
        ("!", "?", None),
        ("-", "_", None),
    ],
)
def test_names_that_are_likely_meant_to_be_one(one: str, other: str, edits: int | None) -> None:
    wanted = [] if edits is None else [NearNames(other, one, 2, 50, edits)]
    assert near_names({one: 50, other: 2}) == near_names({other: 2, one: 50}) == wanted


def test_near_names_say_which_is_rare() -> None:
    (near,) = near_names({"card_arival": 1, "card_arrival": 1500, "exchange_rate": 9})
    assert near.message == (
        "labels 'card_arival' (1 row) and 'card_arrival' (1,500 rows) differ in 1 letter: if they mean the same, write them alike"
    )
    (near,) = near_names({"Cancelaton": 3, "cancellation": 4})
    assert "differ in 2 letters" in near.message
    (near,) = near_names({"Card Arrival": 3, "card_arrival": 4})
    assert "differ only in case, separators or accents" in near.message


def test_all_pairs_of_three_spellings() -> None:
    assert len(near_names({"refund": 3, "Refund": 2, "REFUND": 1})) == 3
    assert [near.edits for near in near_names({"refund": 3, "Refund": 2, "refunds": 1})] == [0, 1, 1]


def test_a_long_label_is_not_quoted_in_full() -> None:
    assert len(RareLabel("x" * 1000, 1, 2).message) < 100
