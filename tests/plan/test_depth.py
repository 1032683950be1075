from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qkit.plan._traced.depth import extended

LETTERS = st.text("ab", max_size=4)


@given(before=LETTERS, forward=LETTERS, between=LETTERS, backward=LETTERS, behind=LETTERS, more=st.integers(0, 6))
def test_equal_layers_are_repeated(
    before: str, forward: str, between: str, backward: str, behind: str, more: int
) -> None:
    """Of few letters, so that blocks begin and end as their neighbours do."""

    def sequence(layers: int) -> str:
        return before + forward * layers + between + backward * layers + behind

    made = extended(sequence(3), sequence(4), sequence(5), 2)
    assert made is not None and "".join(made) == sequence(5)
    assert len(extended(sequence(3), sequence(4), sequence(5), more) or "") == len(sequence(3 + more))


@given(
    forward=st.text("abc", min_size=1, max_size=3),
    backward=st.text("xyz", min_size=1, max_size=3),
    more=st.integers(0, 9),
)
def test_a_step_of_more_layers(forward: str, backward: str, more: int) -> None:
    def sequence(layers: int) -> str:
        return f"P{forward * layers}M{backward * layers}S"

    assert "".join(extended(sequence(3), sequence(4), sequence(5), more) or "") == sequence(3 + more)


@pytest.mark.parametrize(
    "sequences",
    [
        ("PabS", "PababS", "PabababxS"),  # the third has something of its own
        ("PaaaS", "PaaaabS", "PaaaabaS"),  # layers are not alike
        ("Pab", "Pa", "P"),  # fewer
    ],
)
def test_other_sequences_are_not(sequences: tuple[str, str, str]) -> None:
    assert extended(*sequences, 5) is None
