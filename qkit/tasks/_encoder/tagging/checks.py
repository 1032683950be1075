"""The checks of tagged words: of rows, and of the tags of a whole data set."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from qkit.core.errors import listed
from qkit.plugins.checks import NAMED_ROWS, Check, Kind, SetRow
from qkit.tasks._encoder.kinds import LABELLED_CHECKS
from qkit.tasks._encoder.label_checks import LabelledRow, conflicts, near_names
from qkit.tasks._encoder.tagging.rows import as_iob2
from qkit.tasks._encoder.tagging.schemes import Scheme, entities, recognise, violations

FEWEST = 5  # entities of a type from which something can be learned and measured
NAMED = 3  # types that a message names

ROW_CHECKS: Mapping[str, Kind] = {
    **LABELLED_CHECKS,
    "length": Kind(
        "every sentence fits data.max_length",
        "are longer than data.max_length and dropped",
        "warn",
        "raise data.max_length, or set data.too_long=truncate",
    ),
    "text_cut": Kind(
        "no sentence is truncated in training",
        "lose their last words to data.max_length in training; predictions read them in windows",
        "warn",
        "raise data.max_length, as far as the model has positions, or divide long sentences",
    ),
    "no_tokens": Kind(
        "the tokenizer makes a token of every word",
        "have words of which the tokenizer makes no token: these carry no loss, and are never an entity by themselves",
        "warn",
        "remove such words, often zero-width signs, from the rows",
    ),
}


def checks(rows: Sequence[SetRow]) -> Iterator[Check]:
    """Whether tags follow their scheme, their types are in training, frequent enough and spelled alike, and equal sentences have equal tags."""
    if not any(row.split == "train" for row in rows):
        return
    scheme = recognise(row.names for row in rows)
    yield _scheme(rows, scheme)
    tags = [as_iob2(row.names, scheme is Scheme.PLAIN) for row in rows]
    types = [Counter(entity.type for entity in entities(of_row)) for of_row in tags]
    trained: Counter[str] = Counter()
    for row, counts in zip(rows, types, strict=True):
        trained.update(counts if row.split == "train" else {})
    yield _types(rows, types, trained)
    if trained:
        yield _rare(trained)
        yield _near(trained)
    yield _conflicts(rows, tags)


def _scheme(rows: Sequence[SetRow], scheme: Scheme) -> Check:
    wrong = [(row, found[0].message) for row in rows if (found := violations(row.names, scheme))]
    read = (
        "name no positions: neighbouring words of one type are one entity"
        if scheme is Scheme.PLAIN
        else f"follow {scheme}"
    )
    if not wrong:
        converted = "" if scheme is Scheme.IOB2 else "; they are converted to IOB2"
        return Check("tag_scheme", "pass", f"the tags {read}{converted}")
    first, message = wrong[0]
    return Check(
        "tag_scheme",
        "warn",
        f"the tags {read}, but not in {len(wrong):,} rows, where a tag that continues no entity is read as the begin of one: {message} "
        f"({first.place})",
        len(wrong),
        tuple(row.place for row, _ in wrong[:NAMED_ROWS]),
        "correct these tags, or check which column has them",
    )


def _types(rows: Sequence[SetRow], types: Sequence[Counter[str]], trained: Counter[str]) -> Check:
    if not trained:
        remedy = "give rows with entities, or check which column data.columns maps to tags"
        return Check("labels", "fail", "no training row has an entity: nothing can be learned", remedy=remedy)
    unseen = [
        (row, counts.keys() - trained.keys())
        for row, counts in zip(rows, types, strict=True)
        if row.split != "train" and counts.keys() - trained.keys()
    ]
    if unseen:
        names = listed(sorted({name for _, some in unseen for name in some}))
        first = unseen[0][0].place
        message = f"{len(unseen):,} held-out rows have entities of types that no training row has: {names}; the first is {first}"
        places = tuple(row.place for row, _ in unseen[:NAMED_ROWS])
        return Check(
            "labels", "fail", message, len(unseen), places, "add training rows with these types, or correct their names"
        )
    if len(trained) == 1:
        return Check(
            "labels", "pass", f"one type of entity, {next(iter(trained))}, with {trained.total():,} in training"
        )
    span = f"{min(trained.values()):,} to {max(trained.values()):,}"
    return Check("labels", "pass", f"{len(trained):,} types of entities, with {span} in training each")


def _rare(trained: Counter[str]) -> Check:
    rare = sorted((count, name) for name, count in trained.items() if count < FEWEST)
    if not rare:
        return Check("rare_labels", "pass", f"every type has at least {FEWEST} entities in training")
    named = ", ".join(f"{name} has {count}" for count, name in rare[:NAMED])
    message = f"{len(rare):,} types have fewer than {FEWEST} entities in training: {named}"
    return Check("rare_labels", "warn", message, len(rare), remedy="add rows with these types, or join types")


def _near(trained: Counter[str]) -> Check:
    near = near_names(trained)
    if not near:
        return Check("label_names", "pass", "no two types have nearly the same name")
    pair = near[0]
    named = f"{pair.rare} ({pair.rare_rows:,} entities) and {pair.common} ({pair.common_rows:,})"
    message = (
        f"{len(near):,} pairs of types have nearly the same name: {named}; if they mean the same, write them alike"
    )
    return Check("label_names", "warn", message, len(near))


def _conflicts(rows: Sequence[SetRow], tags: Sequence[Sequence[str]]) -> Check:
    labelled = [
        LabelledRow(row.question, " ".join(of_row), row.split, str(row.place))
        for row, of_row in zip(rows, tags, strict=True)
    ]
    different = conflicts(labelled)
    if not different.texts:
        return Check("label_conflicts", "pass", "no sentence has different tags")
    places = ", ".join(different.texts[0].places[:NAMED_ROWS])
    return Check(
        "label_conflicts",
        "warn",
        f"{len(different.texts):,} sentences have different tags in different rows; the first: {places}",
        len(different.texts),
        remedy="decide on the tags of each sentence",
    )
