"""Schemes of tags: recognises which one tag sequences follow, converts them to IOB2, and reads entities.

A tag is `O` (outside), or the position of a word in an entity and the entity's type, such as `B-person`. Positions are B (begin), I (inside),
E or L (last) and S or U (an entity of one word). A set of tags without types (B, I, O) is read as one type, NO_TYPE.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from qkit.core.errors import DataError, listed

OUTSIDE = "O"
NO_TYPE = "_"
POSITIONED = re.compile(r"([BIESLU])(?:-(.+))?", re.DOTALL)
PLACES = 5  # of tags that a message names
BEGINS = frozenset("BSU")


class Scheme(StrEnum):
    """How tags mark where entities begin and end."""

    IOB1 = "IOB1"  # B only between two neighbouring entities of one type
    IOB2 = "IOB2"  # every entity begins with B
    BIOES = "BIOES"  # and ends with E, or is an S; also called IOBES
    BILOU = "BILOU"  # the same with L and U
    IO = "IO"  # I only: neighbouring entities of one type are one
    PLAIN = "plain"  # tags that name no position, such as parts of speech


POSITIONS = {Scheme.IOB1: "IB", Scheme.IOB2: "IB", Scheme.BIOES: "BIES", Scheme.BILOU: "BILU", Scheme.IO: "I"}


@dataclass(frozen=True, slots=True, order=True)
class Entity:
    """The words `begin` to `end`, which is not included."""

    type: str
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class Violation:
    """A tag that its scheme forbids there. `position`: of the word, from 0; the number of words if the end comes too early."""

    position: int
    message: str


@dataclass(frozen=True)
class Constraint:
    """Which tags may begin a sentence, follow each other and end it, in the order of a list of tags.

    `pairs[i][j]`: whether tag j may follow tag i.
    """

    start: tuple[bool, ...]
    pairs: tuple[tuple[bool, ...], ...]
    end: tuple[bool, ...]


def parts(tag: str, scheme: Scheme = Scheme.IOB2) -> tuple[str, str]:
    """Return position and type of a tag: `O` and nothing outside of entities; nothing and the tag if it names no position."""
    if tag == OUTSIDE:
        return OUTSIDE, ""
    match = None if scheme is Scheme.PLAIN else POSITIONED.fullmatch(tag)
    return (match[1], match[2] or NO_TYPE) if match else ("", tag)


def recognise(sequences: Iterable[Sequence[str]]) -> Scheme:
    """Return the scheme of tag sequences. Between IOB1 and IOB2, which have the same tags, the one that fewer of them violate.

    Raises:
        DataError: some tags name a position and others do not, or their positions belong to different schemes.
    """
    known = [tuple(tags) for tags in sequences]
    tags = {tag for sequence in known for tag in sequence} - {OUTSIDE}
    positioned = {tag for tag in tags if POSITIONED.fullmatch(tag) and len(tag) > 1}
    if not positioned and all(POSITIONED.fullmatch(tag) for tag in tags):
        positioned = tags  # B, I and O, without types
    positions = {parts(tag)[0] for tag in positioned}
    if not positions & (set("BI") if positioned < tags else set("BISU")):
        return Scheme.PLAIN  # what has a dash is a type such as `E-mail`
    if others := tags - positioned:
        raise DataError(
            f"some tags name a position and a type ({_some(positioned)}), others do not ({_some(others)}): "
            f"write all of them in one scheme, such as B-{min(others)} and I-{min(others)}"
        )
    return _by_positions(known, positions)


def _by_positions(sequences: Sequence[Sequence[str]], positions: set[str]) -> Scheme:
    if positions == {"I"}:
        return Scheme.IO
    for scheme in (Scheme.BIOES, Scheme.BILOU):
        if positions - {"B", "I"} and positions <= set(POSITIONS[scheme]):
            return scheme
    if positions - {"B", "I"}:
        raise DataError(f"tags have the positions {listed(positions)}; BIOES has B, I, E, S and BILOU has B, I, L, U")
    counts = {scheme: sum(len(violations(tags, scheme)) for tags in sequences) for scheme in (Scheme.IOB2, Scheme.IOB1)}
    return min(counts, key=lambda scheme: counts[scheme])


def _some(tags: Iterable[str]) -> str:
    return listed(sorted(tags)[:PLACES])


def follows(before: str, tag: str, scheme: Scheme) -> bool:
    """Whether `tag` may follow `before`. A sentence begins after, and ends before, an `O`."""
    if scheme is Scheme.PLAIN:
        return True
    (position, kind), (earlier, earlier_kind) = parts(tag), parts(before)
    if position not in (OUTSIDE, *POSITIONS[scheme]):
        return False
    if scheme is Scheme.IO or earlier not in (
        OUTSIDE,
        *POSITIONS[scheme],
    ):  # what is no tag is wrong where it stands, not here
        return True
    opened = earlier in ("B", "I")
    inside = opened and kind == earlier_kind  # `tag` can continue the entity of `before`
    if scheme is Scheme.IOB1:
        return position != "B" or inside
    if scheme is Scheme.IOB2:
        return position != "I" or inside
    return inside and position in ("I", "E", "L") if opened else position not in ("I", "E", "L")


def violations(tags: Sequence[str], scheme: Scheme) -> list[Violation]:
    """Return every tag that may not follow the one before it, in order; and where a sentence ends within an entity."""
    return [
        Violation(position, _violation(before, tag, position, len(tags), scheme))
        for position, (before, tag) in enumerate(zip((OUTSIDE, *tags), (*tags, OUTSIDE), strict=True))
        if not follows(before, tag, scheme)
    ]


def _violation(before: str, tag: str, position: int, words: int, scheme: Scheme) -> str:
    if position == words:
        return f"the sentence ends after {before}, within an entity of {scheme}"
    if parts(tag)[0] not in (OUTSIDE, *POSITIONS[scheme]):
        return f"{tag} (word {position}, counted from 0) is no tag of {scheme}"
    place = f"follows {before}" if position else "begins the sentence"
    return f"{tag} (word {position}, counted from 0) {place}, which {scheme} does not allow"


def constraint(tags: Sequence[str], scheme: Scheme) -> Constraint:
    """Return which sequences of these tags are valid, for a decoder."""
    return Constraint(
        tuple(follows(OUTSIDE, tag, scheme) for tag in tags),
        tuple(tuple(follows(before, tag, scheme) for tag in tags) for before in tags),
        tuple(follows(tag, OUTSIDE, scheme) for tag in tags),
    )


def entities(tags: Sequence[str]) -> tuple[Entity, ...]:
    """Return the entities of tags in IOB2, strictly: each begins with its B; an I that continues nothing belongs to none.

    So a prediction `O I-PER` has no entity, and `B-PER I-LOC` has the entity PER of one word.
    """
    named, begin = [], None
    for end, (before, tag) in enumerate(zip((OUTSIDE, *tags), (*tags, OUTSIDE), strict=True)):
        position, kind = parts(tag)
        if begin is not None and (position != "I" or kind != parts(before)[1]):
            named.append(Entity(parts(before)[1], begin, end))
            begin = None
        if position == "B":
            begin = end
    return tuple(named)
