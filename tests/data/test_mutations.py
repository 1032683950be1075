"""Masking, splitting and packing broken on purpose: the data stage's own checks must see it."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from helpers.data_traps.models import Tiny, build
from helpers.data_traps.prepared import Prepared, prepare_rows
from helpers.data_traps.table import GOOD, HELD_OUT, talk
from qkit.core.batching import IGNORED
from qkit.data import ledger, splits
from qkit.tasks._conversation import encode
from qkit.tasks._conversation.rows import EncodedRow

Mutation = Callable[[EncodedRow], EncodedRow]
TALK = talk(("user", "And?"), ("assistant", "Nothing."), ("user", "Are you sure?"), ("assistant", "Yes."))
MASKING = {"mask": "fail"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(Tiny(), tmp_path_factory.mktemp("tiny"))


def with_mask(row: EncodedRow, learnt: Sequence[bool]) -> EncodedRow:
    return replace(row, labels=[token if here else IGNORED for token, here in zip(row.input_ids, learnt, strict=True)])


def mask_of(row: EncodedRow) -> list[bool]:
    return [label != IGNORED for label in row.labels]


def labels_of_the_next_token(row: EncodedRow) -> EncodedRow:
    """The shift that the model makes, made once more."""
    return replace(row, labels=[*row.labels[1:], IGNORED])


def mask_one_early(row: EncodedRow) -> EncodedRow:
    return with_mask(row, [*mask_of(row)[1:], False])


def mask_one_late(row: EncodedRow) -> EncodedRow:
    return with_mask(row, [False, *mask_of(row)[:-1]])


def user_turns_learnt(row: EncodedRow) -> EncodedRow:
    return with_mask(row, [False, *[True] * (len(row.labels) - 1)])


def user_text_learnt(row: EncodedRow) -> EncodedRow:
    """The first question's words, without the tokens around them."""
    begin = len("xuser\n")
    return with_mask(row, [here or begin <= i < begin + 4 for i, here in enumerate(mask_of(row))])


def end_of_turn_masked(row: EncodedRow) -> EncodedRow:
    return replace(row, labels=[*row.labels[:-1], IGNORED])


def first_token_masked(row: EncodedRow) -> EncodedRow:
    return replace(row, labels=[*row.labels[: row.start], IGNORED, *row.labels[row.start + 1 :]])


def another_token(row: EncodedRow) -> EncodedRow:
    return replace(row, labels=[*row.labels[: row.start], row.labels[row.start] + 1, *row.labels[row.start + 1 :]])


@pytest.mark.parametrize("loss", ["completion", "assistant"])
@pytest.mark.parametrize(
    ("mutation", "fires"),
    [
        (labels_of_the_next_token, MASKING),
        (mask_one_early, MASKING | {"turn_end": "fail"}),
        (mask_one_late, MASKING),
        (user_turns_learnt, MASKING | {"headers": "warn"}),
        (user_text_learnt, MASKING | {"turn_end": "fail"}),
        (end_of_turn_masked, MASKING | {"turn_end": "fail"}),
        (first_token_masked, MASKING),
        (another_token, MASKING),
    ],
)
def test_a_wrong_mask_is_seen(
    mutation: Mutation, fires: dict[str, str], loss: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = encode.label_row
    monkeypatch.setattr(encode, "label_row", lambda *given: mutation(right(*given)))
    made = prepare_rows(model, tmp_path, [*GOOD, TALK], HELD_OUT, [f"data.loss={loss}"])
    found = made.suspicious
    assert fires.items() <= found.items() and set(found) <= {"mask", "turn_end", "headers"}
    assert made.check("mask")["rows"][0]["line"] == 1


@pytest.mark.parametrize("mutation", [labels_of_the_next_token, end_of_turn_masked, first_token_masked, another_token])
def test_a_wrong_mask_is_seen_where_every_token_is_learnt(
    mutation: Mutation, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = encode.label_row
    monkeypatch.setattr(encode, "label_row", lambda *given: mutation(right(*given)))
    made = prepare_rows(model, tmp_path, [*GOOD, TALK], HELD_OUT, ["data.loss=all"])
    assert made.suspicious["mask"] == "fail" and set(made.suspicious) <= {"mask", "turn_end"}


def test_a_masked_end_of_a_text_is_seen(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = encode._text_rows
    monkeypatch.setattr(encode, "_text_rows", lambda *given: [end_of_turn_masked(row) for row in right(*given)])
    made = prepare_rows(model, tmp_path, [{"text": "Once upon a time."}], HELD_OUT)
    assert made.suspicious == {"turn_end": "fail"}


# --- splits -----------------------------------------------------------------------------------------------------------

DIVIDED = ["data.split={train: 0.5, test: 0.5}", "data.max_overlap=1", "data.group=author"]
ROWS = [{"prompt": f"Question {i}?", "completion": f"Answer {i}.", "author": i % 20} for i in range(60)]


def by_row(groups: Sequence[str], labels: Sequence[Any], split: Any, seed: int) -> list[str]:
    """As if every row was a group."""
    return [splits._at(splits.draw(str(row), seed) / splits.RANGE, split) for row in range(len(groups))]


def at_random(groups: Sequence[str], labels: Sequence[Any], split: Any, seed: int) -> list[str]:
    return [random.Random(row).choice(["train", "test"]) for row in range(len(groups))]


@pytest.mark.parametrize("mutation", [by_row, at_random])
@pytest.mark.parametrize("column", ["author", None])
def test_a_group_in_two_splits_is_seen(
    mutation: Any, column: str | None, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = ROWS if column else [row | {"prompt": f"Question {i % 20}?"} for i, row in enumerate(ROWS)]
    settings = [*DIVIDED[:2], *([f"data.group={column}"] if column else [])]
    prepare_rows(model, tmp_path / "right", rows, (), settings)
    monkeypatch.setattr(splits, "assigned", mutation)
    with pytest.raises(AssertionError, match="a group of rows is in several splits"):
        prepare_rows(model, tmp_path / "wrong", rows, (), settings)


def moved(before: Prepared, after: Prepared) -> int:
    """How many rows of the first are in another split of the second."""
    where = {row["sha256"]: row["split"] for row in after.ledger}
    return sum(where[row["sha256"]] != row["split"] for row in before.ledger)


def test_splits_that_do_not_depend_on_content_are_seen(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def moves(name: str) -> int:
        few = prepare_rows(model, tmp_path / name / "few", ROWS[:40], (), DIVIDED[:2])
        more = prepare_rows(model, tmp_path / name / "more", [*ROWS[40:], *ROWS[:40]], (), DIVIDED[:2])
        return moved(few, more)

    assert moves("right") == 0
    dice = random.Random(0)
    monkeypatch.setattr(splits, "draw", lambda key, seed: dice.getrandbits(64))
    assert moves("wrong") > 0


# --- packs ------------------------------------------------------------------------------------------------------------


def on_top_of_each_other(lengths: Sequence[int], capacity: int) -> list[tuple[int, int]]:
    return [(0, 0) for _ in lengths]


def one_token_shared(lengths: Sequence[int], capacity: int) -> list[tuple[int, int]]:
    return [(row // 2, lengths[row - 1] - 1 if row % 2 else 0) for row in range(len(lengths))]


def a_gap_between(lengths: Sequence[int], capacity: int) -> list[tuple[int, int]]:
    return [(row // 2, lengths[row - 1] + 1 if row % 2 else 0) for row in range(len(lengths))]


def all_in_one(lengths: Sequence[int], capacity: int) -> list[tuple[int, int]]:
    return [(0, sum(lengths[:row])) for row in range(len(lengths))]


@pytest.mark.parametrize("mutation", [on_top_of_each_other, one_token_shared, a_gap_between, all_in_one])
def test_wrong_packs_are_seen(mutation: Any, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = ["data.packing=true", "data.max_length=128", "data.batch_tokens=256"]
    made = prepare_rows(model, tmp_path / "right", GOOD, HELD_OUT, settings)
    assert made.suspicious == {} and 1 < made.summary["budget"]["batches"] < len(GOOD)
    monkeypatch.setattr(ledger, "packed", mutation)
    with pytest.raises(AssertionError):
        prepare_rows(model, tmp_path / "wrong", GOOD, HELD_OUT, settings)
