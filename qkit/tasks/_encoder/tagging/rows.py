"""Prepared rows of tagged words: the names of all tags, tags in IOB2, ids for tokens, and what a runtime reads."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from qkit.core.batching import IGNORED
from qkit.plugins.checks import SetRow
from qkit.plugins.runtime import TextRow
from qkit.recipe.schema import SPLITS
from qkit.tasks._encoder.labels import with_lists
from qkit.tasks._encoder.tagging.records import SPANS
from qkit.tasks._encoder.tagging.schemes import BEGINS, NO_TYPE, OUTSIDE, Scheme, entities, parts, recognise
from qkit.tasks._encoder.tagging.words import BY_KIND, BY_SPACE, DIVIDED

if TYPE_CHECKING:
    import pyarrow as pa
    import torch

ENDS = frozenset("ESLU")  # the positions after which an entity does not go on


def as_iob2(tags: Sequence[str], plain: bool) -> tuple[str, ...]:
    """Tags of any scheme in IOB2. One that would continue another entity than the one before it begins one: it is read as IOB1.

    `plain`: they name no positions.
    """
    converted, before, open_type = [], OUTSIDE, ""
    for tag in tags:
        position, kind = parts(tag, Scheme.PLAIN if plain else Scheme.IOB2)
        if position == OUTSIDE:
            converted.append(OUTSIDE)
        else:
            goes_on = open_type == kind and position not in BEGINS and before not in ENDS
            converted.append(("I" if goes_on else "B") + ("" if kind == NO_TYPE else f"-{kind}"))
        before, open_type = position, kind
    return tuple(converted)


def names_of(types: Iterable[str]) -> list[str]:
    """The names of all tags of these types: O first, then B and I of each type."""
    endings = ["" if kind == NO_TYPE else f"-{kind}" for kind in sorted(types)]
    return [OUTSIDE, *(position + ending for ending in endings for position in "BI")]


def labels(rows: Sequence[SetRow]) -> dict[str, Any]:
    """The content of labels.json: `names`, `rows` (words with each tag by split), `entities` (of each type by split), the `scheme` read,
    and `divided`: what divides a raw text into words as in training, see words.DIVISIONS.

    Raises:
        DataError: the tags are of several schemes.
    """
    if not any(row.split == "train" for row in rows):
        return {}
    scheme = recognise(row.names for row in rows)
    words: dict[str, Counter[str]] = {split: Counter() for split in SPLITS}
    found: dict[str, Counter[str]] = {split: Counter() for split in SPLITS}
    for row in rows:
        tags = as_iob2(row.names, scheme is Scheme.PLAIN)
        words[row.split].update(tags)
        found[row.split].update(entity.type for entity in entities(tags))
    names = names_of(found["train"])
    return {
        "names": names,
        "rows": {
            split: {name: words[split][name] for name in {**dict.fromkeys(names), **words[split]}} for split in SPLITS
        },
        "entities": {split: dict(sorted(found[split].items())) for split in SPLITS},
        "scheme": str(scheme),
        DIVIDED: BY_KIND if any(row.split == "train" and row.format == SPANS for row in rows) else BY_SPACE,
    }


def with_label_ids(batch: pa.RecordBatch, names: Sequence[str]) -> pa.RecordBatch:
    """The rows with their tags in IOB2, and the id of a word's tag at its first token. -1 for a tag of a type that training lacks."""
    ids, known = {name: number for number, name in enumerate(names)}, {*names}
    tags = [in_names(row, known) for row in batch.column("names").to_pylist()]
    numbers = [[ids.get(tag, -1) for tag in row] for row in tags]
    starts, tokens = (batch.column(name).to_pylist() for name in ("starts", "input_ids"))
    by_token = [_by_token(of_row, at, len(row)) for of_row, at, row in zip(numbers, starts, tokens, strict=True)]
    for name, values in (("names", tags), ("tag_ids", numbers), ("labels", by_token)):
        batch = with_lists(batch, name, values)
    return batch


def in_names(tags: Sequence[str], names: set[str]) -> tuple[str, ...]:
    """Tags of any scheme in IOB2, where `names` are those of all tags in IOB2: that tells plain tags with a dash from positions."""
    return as_iob2(tags, plain=all(f"B-{tag}" in names for tag in {*tags} - {OUTSIDE}))


def _by_token(tag_ids: Sequence[int], starts: Sequence[int], length: int) -> list[int]:
    values = [IGNORED] * length
    for tag, start in zip(tag_ids, starts, strict=True):
        if 0 <= start < length:
            values[start] = tag
    return values


@dataclass(frozen=True)
class TaggedRow:
    """A sentence, as runtimes and predictions need it. `windows`: its tokens; `starts`: of each word, in the tokens of all windows, -1 for a
    word without any; `labels`: the ids of its tags."""

    windows: tuple[TextRow, ...]
    starts: tuple[int, ...]
    words: tuple[str, ...]
    labels: tuple[int, ...] = ()


def row(record: Mapping[str, Any]) -> TaggedRow:
    """A prepared row."""
    types = bool(record["token_type_ids"])
    parts_of = [record["input_ids"]]
    for size, end in zip(record["sizes"], accumulate(record["sizes"]), strict=True):
        parts_of.append(record["further"][end - size : end])
    texts = tuple(TextRow(ids, [0] * len(ids) if types else []) for ids in parts_of)
    return TaggedRow(texts, tuple(record["starts"]), tuple(record["words"]), tuple(record["tag_ids"]))


def collate(rows: Sequence[Mapping[str, Any]], pad: int) -> dict[str, torch.Tensor]:
    """Padded rows with `labels` [rows, longest], the id of a word's tag at its first token, and `lengths` [rows]."""
    import torch

    from qkit.tasks._encoder.collate import padded

    batch = padded(rows, pad)
    tags = torch.full_like(batch["input_ids"], IGNORED)
    for index, of_row in enumerate(rows):
        tags[index, : len(of_row["labels"])] = torch.tensor(of_row["labels"])
    lengths = torch.tensor([len(of_row["input_ids"]) for of_row in rows])
    return {**batch, "labels": tags, "lengths": lengths}
