"""Collects what the checks find in rows, and turns it into results, by the kinds of check that a task has."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from qkit.plugins.checks import NAMED_ROWS, Check, Kind, Place
from qkit.plugins.task import Task
from qkit.recipe.schema import Data


@dataclass
class Findings:
    """Collects what is found in rows, by check: how many rows, the first places, and the first message."""

    counts: dict[str, int] = field(default_factory=dict)
    places: dict[str, list[Place]] = field(default_factory=dict)
    messages: dict[str, str] = field(default_factory=dict)

    def add(self, name: str, source: str, line: int, message: str) -> None:
        """Add a row in which check `name` found something."""
        self.counts[name] = self.counts.get(name, 0) + 1
        self.messages.setdefault(name, message)
        named = self.places.setdefault(name, [])
        if len(named) < NAMED_ROWS:
            named.append(Place(source, line))

    def checks(self, task: Task, section: Data, skipped: Iterable[str] = ()) -> Iterator[Check]:
        """Every check over rows that the task has, in its order."""
        left_out = set(skipped)
        lesser = {check: (name, kind) for name, (check, kind) in task.LESSER_CHECKS.items() if name in self.counts}
        for name, kind in task.CHECKS.items():
            if name in self.counts:
                yield self._found(name, kind, section)
            elif name in lesser:
                yield replace(self._found(*lesser[name], section), name=name)
            elif name in left_out:
                yield Check(name, "skipped", "does not apply to these rows")
            else:
                yield Check(name, "pass", kind.passes)

    def _found(self, name: str, kind: Kind, section: Data) -> Check:
        rows = tuple(self.places[name])
        count = self.counts[name]
        message = f"{_rows(count, kind.problem)}: {rows[0]} {self.messages[name]}"
        return Check(name, _status(name, kind, section), message, count, rows, kind.remedy)


def _status(name: str, kind: Kind, section: Data) -> str:
    """The status of what is found; for a rule of data.clean the recipe decides. Rows that it drops still deserve a warning."""
    rule = getattr(section.clean, name, None)
    if rule is None:
        return kind.status
    return "fail" if rule == "fail" else "warn"


def failures(checks: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The checks (as JSON) that failed."""
    return [check for check in checks if check["status"] == "fail"]


def refusal(failed: Iterable[Mapping[str, Any]]) -> str:
    """The error message for failed checks."""
    return "\n".join(f"check {check['name']}: {check['message']}\n  {check['remedy']}" for check in failed)


SINGULAR = {
    "have": "has",
    "are": "is",
    "contain": "contains",
    "lose": "loses",
    "carry": "carries",
    "do": "does",
    "offer": "offers",
}


def _rows(count: int, problem: str) -> str:
    """`3 rows are empty`, `1 row is empty`."""
    verb, _, rest = problem.partition(" ")
    return f"1 row {SINGULAR.get(verb, verb)} {rest}" if count == 1 else f"{count:,} rows {problem}"
