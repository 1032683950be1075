"""Schemes of tags, and the entities that they mean."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qkit.core.errors import DataError
from qkit.tasks._encoder.tagging.rows import as_iob2
from qkit.tasks._encoder.tagging.schemes import (
    Entity,
    Scheme,
    constraint,
    entities,
    follows,
    recognise,
    violations,
)

# One sentence, two neighbouring entities of one type among others, in each scheme
IOB2 = "B-X I-X B-X O B-Y B-X I-X I-X"
SAME = {
    Scheme.IOB1: "I-X I-X B-X O I-Y I-X I-X I-X",
    Scheme.IOB2: IOB2,
    Scheme.BIOES: "B-X E-X S-X O S-Y B-X I-X E-X",
    Scheme.BILOU: "B-X L-X U-X O U-Y B-X I-X L-X",
}


@pytest.mark.parametrize("scheme", SAME)
def test_schemes_say_the_same_of_a_sentence(scheme: Scheme) -> None:
    tags = SAME[scheme].split()
    assert recognise([tags]) is scheme
    assert not violations(tags, scheme)
    assert " ".join(as_iob2(tags, plain=False)) == IOB2
    assert as_iob2([tag[0] for tag in tags if tag[-1] != "Y"], plain=False)[:4] == ("B", "I", "B", "O")


@pytest.mark.parametrize(
    ("tags", "scheme"),
    [
        ("O B-X O", Scheme.IOB2),
        ("B-X I-X", Scheme.IOB2),
        ("I-X I-X B-X", Scheme.IOB1),
        ("I-X O I-Y", Scheme.IO),
        ("B I O", Scheme.IOB2),
        ("I I O", Scheme.IO),
        ("S O", Scheme.BIOES),
        ("U-X O", Scheme.BILOU),
        ("B-X E-X", Scheme.BIOES),
        ("B-X L-X", Scheme.BILOU),
        ("B-X I-X I-Y O B-X", Scheme.IOB2),  # one error, against two as IOB1
        ("O O", Scheme.PLAIN),
        ("", Scheme.PLAIN),
        ("NN VBZ -LRB- E", Scheme.PLAIN),
        ("PER O LOC", Scheme.PLAIN),
        ("O PER E-mail S-Bahn", Scheme.PLAIN),
        ("O E-mail", Scheme.PLAIN),
    ],
)
def test_recognised(tags: str, scheme: Scheme) -> None:
    assert recognise([tags.split()]) is scheme


def test_all_sequences_decide_together() -> None:
    assert recognise([["I-X", "O"], ["B-X", "I-X"], ["B-Y"], ["O", "B-X"]]) is Scheme.IOB2
    assert recognise([["I-X", "O"], ["I-X", "I-X"], ["I-X", "B-X"]]) is Scheme.IOB1


@pytest.mark.parametrize(
    ("tags", "message"),
    [
        ("B-X I-X LOC O", r"some tags name a position and a type \(B-X, I-X\), others do not \(LOC\)"),
        ("B-X I-X B O", r"others do not \(B\)"),
        ("B-X E-X U-X", "tags have the positions B, E, U"),
        ("B-X I-X L-X S-X", "tags have the positions B, I, L, S"),
    ],
)
def test_mixed_schemes_are_refused(tags: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        recognise([tags.split()])


@pytest.mark.parametrize(
    ("tags", "scheme", "positions", "message"),
    [
        ("O I-X I-X", Scheme.IOB2, [1], r"I-X \(word 1, counted from 0\) follows O, which IOB2 does not allow"),
        ("I-X B-X I-Y", Scheme.IOB2, [0, 2], r"I-X \(word 0, counted from 0\) begins the sentence, which IOB2"),
        ("B-X I-X B-Y", Scheme.IOB1, [0, 2], "B-X .* begins the sentence, which IOB1"),
        ("B-X I-X", Scheme.BIOES, [2], "the sentence ends after I-X, within an entity of BIOES"),
        ("B-X O E-X", Scheme.BIOES, [1, 2], r"O \(word 1, counted from 0\) follows B-X"),
        ("U-X L-X B-X U-X", Scheme.BILOU, [1, 3], "L-X .* follows U-X"),
        ("B-X NN I-X", Scheme.IOB2, [1], r"NN \(word 1, counted from 0\) is no tag of IOB2"),
        ("B-X S-X", Scheme.IOB2, [1], "S-X .* is no tag of IOB2"),
        ("I-X B-X", Scheme.IO, [1], "B-X .* is no tag of IO"),
    ],
)
def test_violations(tags: str, scheme: Scheme, positions: list[int], message: str) -> None:
    wrong = violations(tags.split(), scheme)
    assert [violation.position for violation in wrong] == positions
    assert re.search(message, wrong[0].message)


def test_runs_of_one_type_are_one_entity_where_nothing_divides_them() -> None:
    assert as_iob2(["I-X", "I-X", "O", "I-X", "I-Y"], plain=False) == ("B-X", "I-X", "O", "B-X", "B-Y")
    assert as_iob2(["X", "X", "O", "X", "E-mail", "E-mail"], plain=True) == (
        "B-X",
        "I-X",
        "O",
        "B-X",
        "B-E-mail",
        "I-E-mail",
    )


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ("", []),
        ("O O", []),
        ("B-X", [("X", 0, 1)]),
        ("B-X I-X O", [("X", 0, 2)]),
        ("B-X B-X", [("X", 0, 1), ("X", 1, 2)]),
        ("I-X I-X", []),
        ("O I-X B-X I-X", [("X", 2, 4)]),
        ("B-X I-Y I-Y", [("X", 0, 1)]),
        ("B-X I-Y I-X", [("X", 0, 1)]),
        ("B-X I-X I-Y B-Y I-Y", [("X", 0, 2), ("Y", 3, 5)]),
        ("B-a-b I-a-b", [("a-b", 0, 2)]),
        ("B I O", [("_", 0, 2)]),
    ],
)
def test_entities_are_strict(tags: str, expected: list[tuple[str, int, int]]) -> None:
    """As seqeval 1.2.2 has them with mode="strict" and scheme=IOB2; the two agree on all sequences of up to 6 tags of 2 types."""
    assert entities(tags.split()) == tuple(Entity(*entity) for entity in expected)


@settings(deadline=None)
@given(st.lists(st.sampled_from(["O", "B-X", "I-X", "B-Y", "I-Y"])))
def test_entities_do_not_overlap_and_each_begins_with_its_tag(tags: list[str]) -> None:
    named = entities(tags)
    assert len(named) == sum(tag.startswith("B") for tag in tags)
    for entity, later in pairwise([*named, Entity("", len(tags), 0)]):
        assert entity.begin < entity.end <= later.begin
        assert tags[entity.begin : entity.end] == [
            f"B-{entity.type}",
            *[f"I-{entity.type}"] * (entity.end - entity.begin - 1),
        ]


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from("XYO"), st.integers(1, 4)), max_size=8), st.sampled_from(list(SAME)))
def test_entities_survive_every_scheme(chunks: list[tuple[str, int]], scheme: Scheme) -> None:
    tags, wanted = written(chunks, scheme)
    assert not violations(tags, scheme)
    assert entities(as_iob2(tags, plain=False)) == tuple(wanted)


def written(chunks: list[tuple[str, int]], scheme: Scheme) -> tuple[list[str], list[Entity]]:
    """The tags of a sentence of chunks (type and number of words) in a scheme, and its entities."""
    last, single = {Scheme.BIOES: "ES", Scheme.BILOU: "LU"}.get(scheme, "IB")
    tags: list[str] = []
    wanted = []
    for kind, count in chunks:
        if kind == "O":
            tags += ["O"] * count
            continue
        wanted.append(Entity(kind, len(tags), len(tags) + count))
        begin = "I" if scheme is Scheme.IOB1 and tags[-1:] not in ([f"I-{kind}"], [f"B-{kind}"]) else "B"
        positions = [begin, *"I" * (count - 2), last] if count > 1 else [begin if scheme is Scheme.IOB1 else single]
        tags += [f"{position}-{kind}" for position in positions]
    return tags, wanted


@pytest.mark.parametrize("scheme", [*SAME, Scheme.IO])
def test_a_constraint_allows_what_has_no_violation(scheme: Scheme) -> None:
    tags = ["O", *(f"{position}-{kind}" for kind in "XY" for position in "BIESLU")]
    rule = constraint(tags, scheme)
    for i, first in enumerate(tags):
        for j, second in enumerate(tags):
            allowed = rule.start[i] and rule.pairs[i][j] and rule.end[j]
            assert allowed is not bool(violations([first, second], scheme)), (first, second)
            assert rule.pairs[i][j] is follows(first, second, scheme)


def test_plain_tags_follow_each_other_freely() -> None:
    rule = constraint(["NN", "I-X"], Scheme.PLAIN)
    assert all(rule.start) and all(map(all, rule.pairs)) and all(rule.end)
