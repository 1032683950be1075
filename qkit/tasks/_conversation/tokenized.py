"""Rows that were tokenized elsewhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qkit.core.batching import IGNORED
from qkit.plugins.example import RowError, Tokens
from qkit.tasks._conversation.turns import Notes, listing, shown

MAX_ID = 2**31 - 1  # token ids are kept in 32 bits


View = Mapping[str, Any]  # a record by our names


def tokenized_row(view: View, _: Notes) -> Tokens:
    ids = _ints(view["input_ids"], "input_ids")
    labels = _ints(view["labels"], "labels") if "labels" in view else ids
    if len(labels) != len(ids):
        raise RowError(f"has {len(ids)} input_ids and {len(labels)} labels")
    if ids and not 0 <= min(ids) <= max(ids) <= MAX_ID:
        raise RowError(f"has input_ids from {min(ids)} to {max(ids)}; ids must be 0 to {MAX_ID}")
    if "attention_mask" in view:
        first, last = _unmasked(view["attention_mask"], len(ids))
        ids, labels = ids[first:last], labels[first:last]
    if not ids:
        raise RowError("input_ids is empty", "empty")
    _check_labels(ids, labels)
    return Tokens(tuple(ids), tuple(labels))


def _check_labels(ids: Sequence[int], labels: Sequence[int]) -> None:
    for place, (token, label) in enumerate(zip(ids, labels, strict=True)):
        if label not in (token, IGNORED):
            raise RowError(
                f"has the label {label} at position {place}, where the token is {token}: a label must be its token or {IGNORED}"
            )


def _ints(value: Any, column: str) -> list[int]:
    numbers = listing(value, column, "is not a list of integers")
    if not set(map(type, numbers)) <= {int}:
        raise RowError(f"{column} is not a list of integers: {shown(numbers)}")
    return numbers


def _unmasked(value: Any, count: int) -> tuple[int, int]:
    """Where the ones of an attention mask begin and end; the rest is padding."""
    mask = _ints(value, "attention_mask")
    ones = mask.count(1)
    first = mask.index(1) if ones else 0
    if len(mask) != count or mask[first : first + ones] != [1] * ones or mask.count(0) != count - ones:
        raise RowError(
            f"attention_mask must have {count} values, one for each of input_ids (it has {len(mask)}): ones, "
            "with zeros only before and after them"
        )
    return first, first + ones
