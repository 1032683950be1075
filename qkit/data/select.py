"""Which split each row is in and which rows are dropped, once all have been seen; and whether training has seen what is held out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from qkit.data import near_duplicates, splits
from qkit.data.checks import NAMED_ROWS, Check, Findings, Place
from qkit.data.entry import Entry
from qkit.recipe.schema import SPLITS, Recipe

HELD_OUT = SPLITS[1:]


@dataclass
class Fate:
    """What becomes of an entry. `rule` "": it is used."""

    split: str
    rule: str = ""
    reason: str = ""

    def drop(self, rule: str, reason: str) -> None:
        self.rule, self.reason = rule, reason


def decide(entries: Sequence[Entry], how: Recipe, findings: Findings) -> tuple[list[Fate], list[Check]]:
    """The fate of each entry, and the checks that need all rows at once; what is found in single rows goes to `findings`."""
    fates = [Fate(split, entry.rule, entry.reason) for entry, split in zip(entries, _splits(entries, how), strict=True)]
    for entry in entries:
        for name, words in entry.findings:
            findings.add(name, entry.source, entry.line, words)
    _earlier_turns(entries, fates)
    _duplicates(entries, fates, how, findings)
    seen = _near_duplicates(entries, fates, how, findings)
    overlap = list(_overlap(entries, fates, how, seen))
    _mix(entries, fates, how)
    _follow(entries, fates)
    return fates, overlap


def _splits(entries: Sequence[Entry], how: Recipe) -> list[str]:
    """The split each entry was given for, or, with data.split, the one that its content has drawn."""
    division = how.data.split
    if division is None:
        return [entry.pool for entry in entries]
    usable = [entry for entry in entries if entry.key]
    drawn = splits.assigned([e.group for e in usable], [e.label for e in usable], division, how.seed)
    together = {(entry.group, split) for entry, split in zip(usable, drawn, strict=True)}
    assert len(together) == len({entry.group for entry in usable}), "a group of rows is in several splits"
    by_record = {entry.record: split for entry, split in zip(usable, drawn, strict=True)}
    return [by_record.get(entry.record, "train") for entry in entries]


def _earlier_turns(entries: Sequence[Entry], fates: Sequence[Fate]) -> None:
    """Held-out conversations are scored on their last turn alone."""
    for entry, fate in zip(entries, fates, strict=True):
        if entry.part and fate.split in HELD_OUT and entry.format != "text" and not fate.rule:
            fate.drop("earlier_turn", "an earlier turn: held-out conversations are scored on their last one")


def _firsts(entries: Sequence[Entry], fates: Sequence[Fate], split: str | None = None) -> Iterator[int]:
    """Entries that stand for a record which is used so far."""
    for index, (entry, fate) in enumerate(zip(entries, fates, strict=True)):
        if entry.part == 0 and not fate.rule and split in (None, fate.split):
            yield index


def _duplicates(entries: Sequence[Entry], fates: Sequence[Fate], how: Recipe, findings: Findings) -> None:
    seen: dict[tuple[str, str], Entry] = {}
    for index in _firsts(entries, fates):
        entry, fate = entries[index], fates[index]
        first = seen.setdefault((fate.split, entry.sha256), entry)
        if first is not entry:
            _again(
                "duplicate", how.data.clean.duplicate, entry, fate, f"is {first.source}:{first.line} again", findings
            )


def _near_duplicates(
    entries: Sequence[Entry], fates: Sequence[Fate], how: Recipe, findings: Findings
) -> dict[str, near_duplicates.Index]:
    """Finds rows nearly alike within a split; returns what was seen, by split."""
    indexes = {split: near_duplicates.Index() for split in SPLITS}
    for index in list(_firsts(entries, fates)):
        entry, fate = entries[index], fates[index]
        found = indexes[fate.split].add(index, entry.near)
        if found is not None and entries[found].sha256 != entry.sha256:
            words = f"is nearly {entries[found].source}:{entries[found].line}"
            _again("near_duplicate", how.data.clean.near_duplicate, entry, fate, words, findings)
    return indexes


def _again(name: str, action: str, entry: Entry, fate: Fate, words: str, findings: Findings) -> None:
    findings.add(name, entry.source, entry.line, words)
    if action == "drop":
        fate.drop(name, words)


def _mix(entries: Sequence[Entry], fates: Sequence[Fate], how: Recipe) -> None:
    """Leave out what the sources' weights leave out."""
    weights = {i: source.weight for i, source in enumerate(how.data.train) if source.weight is not None}
    if not weights:
        return
    rows = list(_firsts(entries, fates, "train"))
    taken = splits.mixed([entries[i].origin for i in rows], [entries[i].sha256 for i in rows], weights, how.seed)
    for index, kept in zip(rows, taken, strict=True):
        if not kept:
            fates[index].drop("mix", "left out by the weights of data.train")


def _follow(entries: Sequence[Entry], fates: Sequence[Fate]) -> None:
    """The further rows of a record go where its first one goes."""
    dropped = {entry.record: fate for entry, fate in zip(entries, fates, strict=True) if entry.part == 0 and fate.rule}
    for entry, fate in zip(entries, fates, strict=True):
        if entry.part and not fate.rule and (first := dropped.get(entry.record)):
            fate.drop(first.rule, first.reason)


# --- what is held out and trained on as well ----------------------------------------------------------------------------


def _overlap(
    entries: Sequence[Entry], fates: Sequence[Fate], how: Recipe, seen: dict[str, near_duplicates.Index]
) -> Iterator[Check]:
    held_out = [index for index in _firsts(entries, fates) if fates[index].split in HELD_OUT]
    if not held_out:
        yield Check("overlap", "skipped", "nothing is held out")
        yield Check("near_overlap", "skipped", "nothing is held out")
        return
    if how.data.clean.overlap == "drop":
        _drop_overlap(entries, fates, held_out)
    if how.data.clean.near_overlap == "drop":
        _drop_near_overlap(entries, fates, held_out)
    if "drop" in (how.data.clean.overlap, how.data.clean.near_overlap):
        seen = {"train": _index(entries, _firsts(entries, fates, "train"))}
    trained = {entries[index].key: index for index in _firsts(entries, fates, "train")}
    same = [(index, trained[entries[index].key]) for index in held_out if entries[index].key in trained]
    yield _shared("overlap", "are in training too", entries, same, len(held_out), how.data.max_overlap)
    known = {index for index, _ in same}
    near = [
        (index, found)
        for index in held_out
        if index not in known and (found := seen["train"].nearest(entries[index].near)) is not None
        if not fates[found].rule
    ]
    yield _shared("near_overlap", "are nearly in training too", entries, near, len(held_out), how.data.max_near_overlap)


def _drop_overlap(entries: Sequence[Entry], fates: Sequence[Fate], held_out: Sequence[int]) -> None:
    keys = {entries[index].key: entries[index] for index in held_out}
    for index in list(_firsts(entries, fates, "train")):
        if other := keys.get(entries[index].key):
            fates[index].drop("overlap", f"has the prompt of the held-out {other.source}:{other.line}")


def _drop_near_overlap(entries: Sequence[Entry], fates: Sequence[Fate], held_out: Sequence[int]) -> None:
    index = _index(entries, held_out)
    for row in list(_firsts(entries, fates, "train")):
        if (found := index.nearest(entries[row].near)) is not None:
            other = entries[found]
            fates[row].drop("near_overlap", f"is nearly the held-out {other.source}:{other.line}")


def _index(entries: Sequence[Entry], rows: Iterable[int]) -> near_duplicates.Index:
    made = near_duplicates.Index()
    for row in rows:
        made.insert(row, entries[row].near)
    return made


def _shared(
    name: str, words: str, entries: Sequence[Entry], pairs: Sequence[tuple[int, int]], rows: int, allowed: float
) -> Check:
    """A check on (held-out row, training row) pairs against the share that is allowed."""
    share = len(pairs) / rows
    if not pairs:
        return Check(name, "pass", f"none of {rows:,} held-out rows {words}")
    first, other = (Place(entries[i].source, entries[i].line) for i in pairs[0])
    message = (
        f"{len(pairs):,} of {rows:,} held-out rows ({share:.1%}) {words}, case and white space aside: {first} is {other}; "
        f"data.max_{name}={allowed:g}"
    )
    places = tuple(Place(entries[i].source, entries[i].line) for pair in pairs[:NAMED_ROWS] for i in pair)
    remedy = f"take them out of training with data.clean.{name}=drop"
    return Check(name, "fail" if share > allowed else "warn", message, len(pairs), places, remedy)


# --- counts -------------------------------------------------------------------------------------------------------------


def split_counts(entries: Sequence[Entry], fates: Sequence[Fate]) -> dict[str, dict[str, int]]:
    """By split: records in, those used (`kept`) and dropped, rows, tokens, tokens that carry loss."""
    counted: dict[str, Counter[str]] = {
        split: Counter(records=0, kept=0, dropped=0, rows=0, tokens=0, labelled_tokens=0, truncated_tokens=0)
        for split in SPLITS
    }
    for entry, fate in zip(entries, fates, strict=True):
        counts = counted[fate.split]
        if entry.part == 0:
            counts.update({"records": 1, "dropped" if fate.rule else "kept": 1})
        if not fate.rule:
            counts.update(
                rows=1,
                tokens=entry.tokens,
                labelled_tokens=entry.labelled_tokens,
                truncated_tokens=entry.truncated_by,
            )
    return {split: dict(counts) for split, counts in counted.items()}


def dropped_by_rule(fates: Sequence[Fate]) -> dict[str, int]:
    """Rows left out, by the rule under which they were."""
    return dict(Counter(fate.rule for fate in fates if fate.rule).most_common())


def source_counts(entries: Sequence[Entry], fates: Sequence[Fate]) -> list[dict[str, object]]:
    """By file and split: records, and in which format they were read."""
    counted: dict[tuple[str, str], Counter[str]] = {}
    for entry, fate in zip(entries, fates, strict=True):
        if entry.part == 0:
            counted.setdefault((entry.source, fate.split), Counter())[entry.format] += 1
    return [
        {"source": source, "split": split, "records": counts.total(), "formats": dict(counts)}
        for (source, split), counts in counted.items()
    ]


def lengths(entries: Sequence[Entry], fates: Sequence[Fate]) -> list[list[int]]:
    """[tokens, rows, labelled tokens] of the training rows before any was cut or left out for its length, by rising length."""
    counted: dict[int, list[int]] = {}
    for entry, fate in zip(entries, fates, strict=True):
        if fate.split == "train" and entry.tokens and fate.rule in ("", "length"):
            of_length = counted.setdefault(entry.tokens + entry.truncated_by, [0, 0])
            of_length[0] += 1
            of_length[1] += entry.labelled_tokens
    return [[tokens, *counts] for tokens, counts in sorted(counted.items())]
