"""Asks every task how it would read a data set, and checks the answer on its records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qkit.commands.init.dataset import Dataset
from qkit.core.errors import DataError, listed, nearest, short
from qkit.plugins.example import Example, RowError
from qkit.plugins.first_recipe import Suggestion, Table
from qkit.plugins.task import Task, open_task
from qkit.recipe import registry
from qkit.recipe.schema import Data

VARIABLES = ("enable_thinking", "documents")  # columns that a chat template may read


@dataclass(frozen=True)
class Candidate:
    """A task that could read a data set, and how."""

    task: str
    suggestion: Suggestion


@dataclass(frozen=True)
class Unread:
    """A record that a task cannot read: its place, counted from 0, the reason, and the rule of data.clean that it falls under."""

    place: int
    reason: str
    rule: str


@dataclass(frozen=True)
class Reading:
    """How a task reads a data set: the section data's `columns` and `ignore`; and what it could not read.

    `format`: of its first record, as the task names it; None for the task's own.

    `examples`: of the records that it reads, as the task makes them.
    """

    candidate: Candidate
    format: str | None
    columns: Mapping[str, str]
    ignore: Sequence[str]
    examples: Sequence[Example]
    unread: Sequence[Unread]

    @property
    def task(self) -> Task:
        return open_task(self.candidate.task)


def candidates(table: Table) -> list[Candidate]:
    """The tasks that could read a table, the surest first."""
    asked = ((name, open_task(name).suggestion(table)) for name in registry.names(registry.TASKS))
    able = [Candidate(name, suggestion) for name, suggestion in asked if suggestion is not None]
    return sorted(able, key=lambda candidate: -candidate.suggestion.sure)


def equally_sure(able: Sequence[Candidate]) -> list[Candidate]:
    """Those that are as sure as the first."""
    return [one for one in able if one.suggestion.sure == able[0].suggestion.sure] if able else []


def choose(dataset: Dataset, able: Sequence[Candidate], task: str | None) -> Candidate:
    """The candidate of a task, or else the surest.

    Raises:
        DataError: no task can read the data, the named one cannot, or several are equally sure.
    """
    if task is not None and task not in (known := registry.names(registry.TASKS)):
        raise DataError(f"--task {short(task)}: unknown{nearest(task, known)}; there are {', '.join(known)}")
    for one in able:
        if one.task == task:
            return one
    where = f"{dataset.name} has the columns {listed(dataset.table.columns)}"
    if task is not None:
        others = f"; as it is, {_names(able)} can" if able else ""
        raise DataError(f"{where}: task={task} cannot read them{others}; rename the columns as docs/labels.md has them")
    if not able:
        raise DataError(
            f"{where}: no task reads them. Chats need messages, conversations, instruction and output, or prompt and completion; "
            "texts with labels a text and a label; tags tokens and tags, or text and spans; answers question, context and answers: "
            "rename the columns"
        )
    first = equally_sure(able)
    if len(first) > 1:
        reasons = "; ".join(f"--task {one.task}: {one.suggestion.why}" for one in first)
        raise DataError(f"{where}, which several tasks read: choose one ({reasons})")
    return able[0]


def _names(able: Sequence[Candidate]) -> str:
    return " or ".join(f"task={one.task}" for one in able)


def read_as(dataset: Dataset, candidate: Candidate) -> Reading:
    """Read the records as a task does.

    Raises:
        DataError: it can read none of them.
    """
    columns = {ours: theirs for ours, theirs in candidate.suggestion.columns.items() if ours != theirs}
    given = {name: value for name, (value, _) in candidate.suggestion.data.items()}
    section = Data.model_construct(**{**Data().model_dump(), "clean": Data().clean, "columns": columns, **given})
    task, examples, unread = open_task(candidate.task), [], []
    for place, record in enumerate(dataset.table.records):
        try:
            examples.append(task.example(record, None, "auto", section))
        except RowError as error:
            unread.append(Unread(place, str(error), error.rule))
    if not examples:
        raise DataError(
            f"{dataset.name}: task={candidate.task} can read no record: the first {short(unread[0].reason)}"
        )
    names = dict.fromkeys(name for example in examples for name in example.unread)
    ignored = [name for name in names if name in dataset.table.columns and name not in VARIABLES]
    data_format = task.data_format(dataset.table.records[0], section)
    return Reading(candidate, data_format, columns, ignored, examples, unread)


def texts_in(value: Any) -> int:
    """Characters of all texts in a value, however nested."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, Mapping):
        return sum(map(texts_in, value.values()))
    return sum(map(texts_in, value)) if isinstance(value, list | tuple) else 0
