"""data/summary.json: counts by split and source, why rows are dropped, lengths; and what of it is reported in words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from qkit.data.select import Decision
from qkit.recipe.schema import SPLITS


def split_counts(decisions: Sequence[Decision]) -> dict[str, dict[str, int]]:
    """By split: records in, those used (`kept`) and dropped, rows, tokens, tokens that carry loss."""
    by_split: dict[str, Counter[str]] = {
        split: Counter(records=0, kept=0, dropped=0, rows=0, tokens=0, labelled_tokens=0, truncated_tokens=0)
        for split in SPLITS
    }
    for decision in decisions:
        entry, counts = decision.entry, by_split[decision.split]
        if entry.part == 0:
            counts.update({"records": 1, "kept" if decision.used else "dropped": 1})
        if decision.used:
            counts.update(
                rows=1,
                tokens=entry.tokens,
                labelled_tokens=entry.labelled_tokens,
                truncated_tokens=entry.truncated_by,
            )
    return {split: dict(counts) for split, counts in by_split.items()}


def dropped_by_rule(decisions: Sequence[Decision]) -> dict[str, int]:
    """Rows that are dropped, by rule; most first."""
    return dict(Counter(decision.rule for decision in decisions if not decision.used).most_common())


def source_counts(decisions: Sequence[Decision]) -> list[dict[str, object]]:
    """By file and split: records, and the formats in which they were read."""
    by_source: dict[tuple[str, str], Counter[str]] = {}
    for decision in decisions:
        entry = decision.entry
        if entry.part == 0:
            by_source.setdefault((entry.source, decision.split), Counter())[entry.format] += 1
    return [
        {"source": source, "split": split, "records": counts.total(), "formats": dict(counts)}
        for (source, split), counts in by_source.items()
    ]


def lengths(decisions: Sequence[Decision]) -> list[list[int]]:
    """[tokens, rows, labelled tokens] of the training rows by rising length, before rows were cut or dropped for their length."""
    by_length: dict[int, list[int]] = {}
    for decision in decisions:
        entry = decision.entry
        if decision.split == "train" and entry.tokens and decision.rule in ("", "length"):
            counts = by_length.setdefault(entry.tokens + entry.truncated_by, [0, 0])
            counts[0] += 1
            counts[1] += entry.labelled_tokens
    return [[tokens, *counts] for tokens, counts in sorted(by_length.items())]


# --- in words ---------------------------------------------------------------------------------------------------------


def warnings(summary: Mapping[str, Any]) -> Iterator[str]:
    """Warnings to show before training: in full where text would be lost, else the names of the checks."""
    warned = {check["name"]: check for check in summary["checks"] if check["status"] == "warn"}
    yield from (f"data: {name}: {warned[name]['message']}" for name in ("unused", "content") if name in warned)
    if others := [name for name in warned if name not in ("unused", "content")]:
        yield f"data: warnings, see `qkit inspect`: {', '.join(others)}"


def sums(summary: Mapping[str, Any]) -> str:
    """One line that accounts for every training record."""
    train = summary["splits"]["train"]
    return (
        f"data: {train['records']:,} records = {train['kept']:,} trained + {train['dropped']:,} dropped; "
        f"{train['rows']:,} rows, {train['tokens']:,} tokens, {train['labelled_tokens']:,} with loss"
    )


def left_out(summary: Mapping[str, Any], split: str) -> str:
    """Which of a user's own records are dropped, by rule; "" if all are used."""
    counts = summary["splits"][split]
    if not counts["dropped"]:
        return ""
    rules = ", ".join(f"{rule} {count:,}" for rule, count in summary["dropped"].items())
    return f"{counts['dropped']:,} of {counts['records']:,} records are dropped ({rules}): see `qkit inspect`"
