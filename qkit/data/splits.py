"""Which split a row is in, by a hash of its content: adding rows moves no other row, and rows of one group stay together.

Where rows have labels, each label's groups are ranked by that hash and cut at the fractions, so that every split has its share of every
label; labels with too few groups for a share in every split are ranked together. Then adding rows can move others across a cut, but across
each of the two never more of them than were added, as long as no label grows out of those ranked together.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence

from qkit.recipe.schema import Split

RANGE = 2**64


def assigned(groups: Sequence[str], labels: Sequence[str | None], split: Split, seed: int) -> list[str]:
    """The split of each row. Rows of one group share a split. `labels`: None where there is none; a group has its first row's."""
    by_group: dict[str, str | None] = {}
    for group, label in zip(groups, labels, strict=True):
        by_group.setdefault(group, label)
    by_label: dict[str | None, list[str]] = {}
    for group, label in by_group.items():
        by_label.setdefault(label, []).append(group)
    chosen = _by_hash(by_label.pop(None, []), split, seed)
    for together in _strata([*by_label.values()], split):
        chosen.update(_by_rank(together, split, seed))
    return [chosen[group] for group in groups]


def _strata(by_label: Sequence[list[str]], split: Split) -> Iterator[list[str]]:
    """The groups that are ranked together: a label's, and those of all labels that have no group for the smallest split."""
    enough = 1 / min(share for share in (split.train, split.validation, split.test) if share)
    yield [group for groups in by_label if len(groups) < enough for group in groups]
    yield from (groups for groups in by_label if len(groups) >= enough)


def _by_hash(groups: Sequence[str], split: Split, seed: int) -> dict[str, str]:
    return {group: _at(draw(group, seed) / RANGE, split) for group in groups}


def _by_rank(groups: Sequence[str], split: Split, seed: int) -> dict[str, str]:
    ranked = sorted(groups, key=lambda group: draw(group, seed))
    return {group: _at((rank + 0.5) / len(ranked), split) for rank, group in enumerate(ranked)}


def _at(place: float, split: Split) -> str:
    """The split that holds a place between 0 and 1."""
    if place < split.test:
        return "test"
    return "validation" if place < split.test + split.validation else "train"


def draw(key: str, seed: int) -> int:
    """A number in [0, 2**64) that depends on the key and the seed alone."""
    return int.from_bytes(hashlib.blake2b(f"{seed}:{key}".encode(), digest_size=8).digest(), "big")


def mixed(sources: Sequence[int], keys: Sequence[str], weights: Mapping[int, float], seed: int) -> list[bool]:
    """Which rows a weighted mix takes: as many as possible with the sources in proportion to their weights, none twice.

    `sources`: the source of each row; `weights`: by source (a source without one has 1). Which rows of a source go depends on a hash of
    their content.
    """
    members: dict[int, list[int]] = {}
    for row, source in enumerate(sources):
        members.setdefault(source, []).append(row)
    share = {source: weights.get(source, 1.0) for source in members}
    scale = min((len(rows) / share[source] for source, rows in members.items()), default=0.0)
    taken = [False] * len(sources)
    for source, rows in members.items():
        ranked = sorted(rows, key=lambda row: draw(keys[row], seed))
        for row in ranked[: round(scale * share[source])]:
            taken[row] = True
    return taken
