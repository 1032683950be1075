"""Which split each row is in and which rows are dropped, once all rows are known; and whether training rows are held out as well.

Rules in RULES apply in order; each sees only the rows that the rules before it kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from qkit.data import near_duplicates, splits
from qkit.data.checks import Findings
from qkit.data.entry import Entry
from qkit.plugins.checks import NAMED_ROWS, Check, Place
from qkit.plugins.task import open_task
from qkit.recipe.schema import SPLITS, Recipe

HELD_OUT = SPLITS[1:]


@dataclass
class Decision:
    """What becomes of an entry: its split, and why it is dropped. `rule` is "" for a row that is used.

    `number`: its place among all decisions.
    """

    number: int
    entry: Entry
    split: str
    rule: str = ""
    reason: str = ""

    @property
    def used(self) -> bool:
        return not self.rule

    def drop(self, rule: str, reason: str) -> None:
        self.rule, self.reason = rule, reason


@dataclass
class Selection:
    """All decisions, in the order of the entries, and what the rules report. `indexes`: near-duplicate index of each split."""

    decisions: Sequence[Decision]
    recipe: Recipe
    findings: Findings
    checks: list[Check] = field(default_factory=list)
    indexes: dict[str, near_duplicates.Index] = field(default_factory=dict)

    def records(self, *in_splits: str) -> list[Decision]:
        """Decisions on the first row of each record that is used so far; of these splits only, where some are given."""
        return [
            decision
            for decision in self.decisions
            if decision.entry.part == 0 and decision.used and (not in_splits or decision.split in in_splits)
        ]


def select(entries: Sequence[Entry], recipe: Recipe, findings: Findings) -> tuple[list[Decision], list[Check]]:
    """A decision for each entry, and the checks that need all rows at once. What single rows show goes to `findings`."""
    decisions = [
        Decision(number, entry, split, entry.rule, entry.reason)
        for number, (entry, split) in enumerate(zip(entries, _splits(entries, recipe), strict=True))
    ]
    for entry in entries:
        for name, message in entry.findings:
            findings.add(name, entry.source, entry.line, message)
    selection = Selection(decisions, recipe, findings)
    for _, apply in RULES:
        apply(selection)
    return decisions, selection.checks


def _splits(entries: Sequence[Entry], recipe: Recipe) -> list[str]:
    """The split that each entry was given for; with data.split, the one drawn for its content."""
    division = recipe.data.split
    if division is None:
        return [entry.pool for entry in entries]
    usable = [entry for entry in entries if entry.key]
    drawn = splits.assigned([e.group for e in usable], [e.label for e in usable], division, recipe.seed)
    together = {(entry.group, split) for entry, split in zip(usable, drawn, strict=True)}
    assert len(together) == len({entry.group for entry in usable}), "a group of rows is in several splits"
    by_record = {entry.record: split for entry, split in zip(usable, drawn, strict=True)}
    return [by_record.get(entry.record, "train") for entry in entries]


# --- rules ------------------------------------------------------------------------------------------------------------


def _drop_earlier_turns(selection: Selection) -> None:
    """Held-out conversations are scored on their last turn alone."""
    whole = open_task(selection.recipe.task).SCORED_IN_PARTS
    for decision in selection.decisions:
        entry = decision.entry
        if entry.part and decision.split in HELD_OUT and entry.format not in whole and decision.used:
            decision.drop(
                "earlier_turn", "is an earlier turn: held-out conversations are scored on their last turn only"
            )


def _find_duplicates(selection: Selection) -> None:
    """Rows of a split with the same content."""
    action = selection.recipe.data.clean.duplicate
    first_with: dict[tuple[str, str], Entry] = {}
    for decision in selection.records():
        entry = decision.entry
        first = first_with.setdefault((decision.split, entry.sha256), entry)
        if first is not entry:
            _report_repeat("duplicate", action, decision, f"is a duplicate of {first.place}", selection.findings)


def _find_near_duplicates(selection: Selection) -> None:
    """Rows of a split with nearly the same content; the indexes stay for the checks of overlap."""
    action = selection.recipe.data.clean.near_duplicate
    selection.indexes = {split: near_duplicates.Index() for split in SPLITS}
    for decision in selection.records():
        entry = decision.entry
        number = selection.indexes[decision.split].add(decision.number, entry.near)
        if number is None:
            continue
        other = selection.decisions[number].entry
        if other.sha256 != entry.sha256:
            message = f"is a near-duplicate of {other.place}"
            _report_repeat("near_duplicate", action, decision, message, selection.findings)


def _report_repeat(rule: str, action: str, decision: Decision, message: str, findings: Findings) -> None:
    findings.add(rule, decision.entry.source, decision.entry.line, message)
    if action == "drop":
        decision.drop(rule, message)


def _mix_sources(selection: Selection) -> None:
    """Drop the rows that the sources' weights leave out."""
    recipe = selection.recipe
    weights = {i: source.weight for i, source in enumerate(recipe.data.train) if source.weight is not None}
    if not weights:
        return
    records = selection.records("train")
    origins = [decision.entry.origin for decision in records]
    taken = splits.mixed(origins, [decision.entry.sha256 for decision in records], weights, recipe.seed)
    for decision, kept in zip(records, taken, strict=True):
        if not kept:
            decision.drop("mix", "is excluded by the weights of data.train")


def _follow_first_row(selection: Selection) -> None:
    """Further rows of a record are dropped with its first one."""
    dropped = {
        decision.entry.record: decision
        for decision in selection.decisions
        if decision.entry.part == 0 and not decision.used
    }
    for decision in selection.decisions:
        if decision.entry.part and decision.used and (first := dropped.get(decision.entry.record)):
            decision.drop(first.rule, first.reason)


# --- overlap of training and held-out rows ----------------------------------------------------------------------------

Pair = tuple[Decision, Decision]  # a held-out row, and the training row that it resembles


def _find_overlap(selection: Selection) -> None:
    """Held-out rows that are in training too, or nearly; with data.clean.overlap=drop they leave training first."""
    data, held_out = selection.recipe.data, selection.records(*HELD_OUT)
    if not held_out:
        selection.checks += [Check(name, "skipped", "nothing is held out") for name in ("overlap", "near_overlap")]
        return
    if data.clean.overlap == "drop":
        _drop_overlap(selection, held_out)
    if data.clean.near_overlap == "drop":
        _drop_near_overlap(selection, held_out)
    if "drop" in (data.clean.overlap, data.clean.near_overlap):
        selection.indexes["train"] = _index(selection.records("train"))
    same = _with_the_same_prompt(selection, held_out)
    matched = {pair[0].number for pair in same}
    near = _nearly_trained(selection, [row for row in held_out if row.number not in matched])
    count = len(held_out)
    selection.checks += [
        _share_check("overlap", "are also in the training data", same, count, data.max_overlap),
        _share_check("near_overlap", "have a near-duplicate in the training data", near, count, data.max_near_overlap),
    ]


def _with_the_same_prompt(selection: Selection, held_out: Sequence[Decision]) -> list[Pair]:
    trained = {decision.entry.key: decision for decision in selection.records("train")}
    return [(row, trained[row.entry.key]) for row in held_out if row.entry.key in trained]


def _nearly_trained(selection: Selection, held_out: Sequence[Decision]) -> list[Pair]:
    index, pairs = selection.indexes["train"], []
    for row in held_out:
        number = index.nearest(row.entry.near)
        if number is not None and selection.decisions[number].used:
            pairs.append((row, selection.decisions[number]))
    return pairs


def _drop_overlap(selection: Selection, held_out: Sequence[Decision]) -> None:
    by_key = {decision.entry.key: decision.entry for decision in held_out}
    for decision in selection.records("train"):
        if other := by_key.get(decision.entry.key):
            decision.drop("overlap", f"has the prompt of the held-out {other.place}")


def _drop_near_overlap(selection: Selection, held_out: Sequence[Decision]) -> None:
    index = _index(held_out)
    for decision in selection.records("train"):
        if (number := index.nearest(decision.entry.near)) is not None:
            decision.drop(
                "near_overlap", f"is a near-duplicate of the held-out {selection.decisions[number].entry.place}"
            )


def _index(decisions: Iterable[Decision]) -> near_duplicates.Index:
    index = near_duplicates.Index()
    for decision in decisions:
        index.insert(decision.number, decision.entry.near)
    return index


def _share_check(name: str, message: str, pairs: Sequence[Pair], rows: int, allowed: float) -> Check:
    """A check on the share of held-out rows that a pair was found for, against the share that is allowed."""
    share = len(pairs) / rows
    if not pairs:
        return Check(name, "pass", f"none of {rows:,} held-out rows {message}")
    first, other = (_place(decision) for decision in pairs[0])
    message = (
        f"{len(pairs):,} of {rows:,} held-out rows ({share:.1%}) {message}, ignoring case and white space: {first} matches {other}; "
        f"data.max_{name}={allowed:g}"
    )
    places = tuple(_place(decision) for pair in pairs[:NAMED_ROWS] for decision in pair)
    remedy = f"remove them from training with data.clean.{name}=drop"
    return Check(name, "fail" if share > allowed else "warn", message, len(pairs), places, remedy)


def _place(decision: Decision) -> Place:
    return Place(decision.entry.source, decision.entry.line)


# The order matters: a row that an earlier rule drops takes no part in a later one.
RULES: tuple[tuple[str, Callable[[Selection], None]], ...] = (
    ("earlier turns of held-out conversations", _drop_earlier_turns),
    ("duplicates", _find_duplicates),
    ("near-duplicates", _find_near_duplicates),
    ("overlap with held-out rows", _find_overlap),
    ("weights of the sources", _mix_sources),
    ("further rows of dropped records", _follow_first_row),
)
