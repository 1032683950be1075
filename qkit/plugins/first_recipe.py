"""What a first recipe is made of: a data set as a table of columns, how a task would read it, and values that a task starts with."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from qkit.recipe.schema import Method

# How sure a task is that a data set is its own; ONLY: it has columns that no other task reads.
ONLY, CERTAIN, LIKELY, POSSIBLE = 4, 3, 2, 1


@dataclass(frozen=True)
class Column:
    """A column of a data set: `values` of the records that have one, and how many are `empty`."""

    name: str
    values: Sequence[Any]
    empty: int

    @cached_property
    def counts(self) -> Counter[str]:
        """How often each value is there, as text; of lists, each item."""
        items = (item for value in self.values for item in (value if isinstance(value, list) else [value]))
        return Counter(str(item).strip() for item in items)

    @cached_property
    def is_text(self) -> bool:
        return bool(self.values) and all(isinstance(value, str) for value in self.values)

    @cached_property
    def is_list(self) -> bool:
        return bool(self.values) and all(isinstance(value, list) for value in self.values)

    @cached_property
    def is_label(self) -> bool:
        """Whether each value could be the name of a label: a text, a whole number or true and false."""
        return bool(self.values) and all(isinstance(value, str | int) for value in self.values)

    @cached_property
    def numbers(self) -> Sequence[float] | None:
        """The values as numbers, whether written as such or as text; None if one is no number."""
        numbers = [_number(value) for value in self.values]
        finite = [number for number in numbers if number is not None]
        return finite if numbers and len(finite) == len(numbers) else None

    @property
    def is_whole(self) -> bool:
        """Whether all values are whole numbers, written without a decimal point."""
        return self.numbers is not None and not any("." in str(value) or "e" in str(value) for value in self.values)

    @property
    def repeats(self) -> bool:
        """Whether there are few distinct values: two of three records, at least, have one that others have too."""
        return len(self.counts) * 3 <= len(self.values) or (len(self.counts) * 2 <= len(self.values) < 20)

    @cached_property
    def characters(self) -> float:
        """The mean length of the values as text."""
        return sum(len(str(value)) for value in self.values) / len(self.values) if self.values else 0.0


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


@dataclass(frozen=True)
class Table:
    """The records of a data set, or its first ones, and their columns."""

    records: Sequence[Mapping[str, Any]]

    @cached_property
    def columns(self) -> Mapping[str, Column]:
        """Every column by name, in the order in which the records have them."""
        names = dict.fromkeys(name for record in self.records for name in record)
        return {name: self._column(name) for name in names}

    def _column(self, name: str) -> Column:
        values = [record.get(name) for record in self.records]
        filled = [value for value in values if not is_empty(value)]
        return Column(name, filled, len(values) - len(filled))

    def named(self, names: Sequence[str]) -> Column | None:
        """The column with the first of these names that is there, as data sets write them: Label and label are the same."""
        by_name = {name.lower().strip(): column for name, column in self.columns.items()}
        return next((by_name[name] for name in names if name in by_name and by_name[name].values), None)


def is_empty(value: Any) -> bool:
    """Whether a cell has nothing in it; an empty list is a value: that of no label."""
    return value is None or (isinstance(value, str) and not value.strip())


@dataclass(frozen=True)
class Suggestion:
    """How a task would read a data set.

    `sure`: ONLY, CERTAIN ...; `why`: what of the data says so; `columns`: our name -> the data set's column, of all that are read;
    `label`: the column that is learned, where it has labels to count; `data`: further settings of the section data, each with its reason.
    """

    sure: int
    why: str
    columns: Mapping[str, str]
    label: str | None = None
    data: Mapping[str, tuple[Any, str]] = field(default_factory=dict)


@dataclass(frozen=True)
class Base:
    """A base model to start with, and why. `sha256`: of its wheel, for a pypi: source; `parameters`: how many, where that is known."""

    source: str
    why: str
    sha256: str | None = None
    parameters: int | None = None


@dataclass(frozen=True)
class Size:
    """What is known when the values of a first recipe are chosen: training rows, parameters of the model, and whether there is a GPU."""

    rows: int
    parameters: int | None
    has_gpu: bool


Chosen = tuple[Any, str]  # a value, and the reason for it


@dataclass(frozen=True)
class Start:
    """What a task starts with. `base`: on any machine; `larger`: hub ids for a GPU, the largest first.

    `longest`: the most tokens of a row that a first recipe allows; `batches`: tokens in a batch, the most first, of which the first that fits
    is taken; `settings`: values by section and key, with their reasons; `too_long`: what happens to longer rows, in words.
    """

    base: Base
    larger: Sequence[str]
    longest: int
    batches: Sequence[int]
    too_long: str
    method: Callable[[Size], tuple[Method, str]]
    settings: Callable[[Size], Mapping[str, Mapping[str, Chosen]]]
