"""Records to candidates: each record read as an example, tokenized, looked at. Work for one process, on one chunk at a time.

What takes memory (ids, texts) leaves as an Arrow batch; what decisions need (digests, counts, findings) as entries.
"""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from typing import TYPE_CHECKING, Any

from qkit.core.errors import short
from qkit.core.process import kill_when_parent_dies
from qkit.data import near_duplicates
from qkit.data.entry import Entry, Sourced
from qkit.data.read import Broken, Record
from qkit.plugins.example import Example, RowError
from qkit.plugins.task import Encoder, Task, open_task
from qkit.recipe.schema import Data, Recipe

if TYPE_CHECKING:
    import pyarrow as pa


LABEL = "label"  # in data.stratify: the labels that the task reads
CHUNK = 256  # records that travel together
ALONE = 32  # chunks that are worked on here before more processes are worth their start: each takes as long as some 5,000 rows
CLOSELY = 32  # one row in so many is decoded again ...
CLOSELY_FIRST = 256  # ... and all of the first ones


@dataclass
class Prepared:
    """The candidates of a chunk: `batch` has one row for each entry whose rule is empty, in their order."""

    batch: pa.RecordBatch
    entries: list[Entry] = field(default_factory=list)


@dataclass(frozen=True)
class Worker:
    """What a process needs to work on chunks: the task, and its encoder with the tokenizer."""

    recipe: Recipe
    task: Task
    encoder: Encoder

    def prepare(self, chunk: Sequence[Sourced]) -> Prepared:
        """A chunk of records along the chain: recognise, encode, check."""
        examples = [self._recognise(sourced) for sourced in chunk]
        results = self.encoder.encode(examples)
        entries: list[Entry] = []
        columns: dict[str, list[Any]] = {name: [] for name in schema(self.task, self.recipe.data).names}
        for sourced, example, result in zip(chunk, examples, results, strict=True):
            entry = _entry(sourced, example, self.recipe, self.task)
            if isinstance(example, RowError) or result.error is not None:
                assert result.error is not None
                entries.append(_dropped(entry, result.error))
                continue
            weight = {} if self.recipe.data.weight is None else {WEIGHT: weight_of(sourced, self.recipe)}
            for part, row in enumerate(result.rows):
                entries.append(self._checked(entry, part, row))
                for name, value in {**self.encoder.columns(row, example), PLACE: entry.place, **weight}.items():
                    columns[name].append(value)
        return Prepared(_batch(columns, schema(self.task, self.recipe.data)), entries)

    def _recognise(self, sourced: Sourced) -> Example | RowError:
        record = sourced.record
        if isinstance(record, Broken):
            return RowError(record.reason)
        try:
            weight_of(sourced, self.recipe)
            return self.task.example(record.value, record.accepted, record.format, self.recipe.data, self.encoder.reads)
        except RowError as error:
            return error

    def _checked(self, entry: Entry, part: int, row: Any) -> Entry:
        """The entry of a row, with what the checks find in it."""
        closely = entry.line <= CLOSELY_FIRST or entry.line % CLOSELY == 0
        findings: dict[str, str] = {}  # a check counts a row once, however much it finds there
        for name, message in self.encoder.examine(row, closely):
            findings.setdefault(name, message)
        return replace(
            entry,
            part=part,
            near=entry.near if part == 0 else None,
            tokens=len(row.input_ids),
            labelled_tokens=row.labelled,
            names=row.names,
            truncated_by=row.whole_tokens - len(row.input_ids),
            findings=tuple(findings.items()),
            about=getattr(row, "about", None),
        )


def open_worker(recipe: Recipe) -> Worker:
    """Load what is needed to work on a recipe's records. Each process opens the tokenizer here, once."""
    task = open_task(recipe.task)
    return Worker(recipe, task, task.encoder(recipe))


def _entry(sourced: Sourced, example: Example | RowError, recipe: Recipe, task: Task) -> Entry:
    record = sourced.record
    entry = Entry(sourced.pool, sourced.source, record.source, record.line, "")
    if isinstance(record, Broken):
        return entry
    entry.format = _format(record, recipe, task)
    if isinstance(example, RowError):
        return entry
    entry.ignored = (*example.ignored, *(name for name in record.unread if name in recipe.data.ignore))
    entry.unread = (*example.unread, *(name for name in record.unread if name not in recipe.data.ignore))
    identity = task.identity(example)
    value = record.value
    entry.sha256 = near_duplicates.digest(identity.content)
    entry.key = near_duplicates.digest(near_duplicates.normalized(identity.question))
    group = value_of(value, recipe.data.group, recipe)
    together = (
        entry.key if identity.group is None else near_duplicates.digest(near_duplicates.normalized(identity.group))
    )
    entry.group = together if group is None else near_duplicates.digest(str(group))
    by_label = recipe.data.stratify == LABEL
    own = by_label and not task.HEAD.generates  # the task knows its labels: numbers, for one, are not stratified by
    entry.label = (None if own else _label(value, recipe)) or (identity.label if by_label else None)
    entry.near = near_duplicates.signature(identity.distinctive)
    return entry


def _format(record: Record, recipe: Recipe, task: Task) -> str:
    """The format that a record was read in; a task's own has the task's name."""
    if record.format != "auto":
        return record.format
    return task.data_format(record.value, recipe.data) or recipe.task


def _label(value: Mapping[str, Any], recipe: Recipe) -> str | None:
    label = value_of(value, recipe.data.stratify, recipe)
    return str(label) if isinstance(label, str | int | bool) else None


def value_of(value: Mapping[str, Any], column: str | None, recipe: Recipe) -> Any:
    """What a record has in a column, by the name that data.columns gives it; None where there is none, or an empty field."""
    field_value = value.get(recipe.data.columns.get(column, column)) if column else None
    return None if field_value == "" else field_value


def weight_of(sourced: Sourced, recipe: Recipe) -> float:
    """How much a record counts in the loss; 1 without data.weight, or where a held-out record has no number.

    Raises:
        RowError: a training record has none, or one that is not above 0.
    """
    column, record = recipe.data.weight, sourced.record
    if column is None or isinstance(record, Broken):
        return 1.0
    given = value_of(record.value, column, recipe)
    if given is None and sourced.pool != "train":
        return 1.0
    with suppress(TypeError, ValueError, OverflowError):
        number = math.nan if isinstance(given, bool) else float(given)
        if 0 < number < math.inf:
            return number
    raise RowError(f"data.weight={short(column)}: must be a number above 0, and is {short(repr(given))}")


def _dropped(entry: Entry, error: RowError) -> Entry:
    """An entry that is not used; its length is known where that is the reason."""
    row = getattr(error, "row", None)
    if row is not None:
        entry = replace(entry, tokens=row.whole_tokens, labelled_tokens=row.labelled)
    return replace(entry, rule=error.rule, reason=str(error), findings=((error.rule, str(error)),))


# --- Arrow ------------------------------------------------------------------------------------------------------------

PLACE = "place"  # source and line of a row
WEIGHT = "weight"  # with data.weight


def schema(task: Task, section: Data) -> pa.Schema:
    """What a split's Parquet file holds besides `pack` and `position`."""
    import pyarrow as pa

    types = {"int32": pa.int32(), "string": pa.string(), "float": pa.float32()}
    types |= {f"list<{name}>": pa.list_(kind) for name, kind in types.items()}
    columns = {**task.columns(), PLACE: "string", **({} if section.weight is None else {WEIGHT: "float"})}
    return pa.schema([(name, types[kind]) for name, kind in columns.items()])


def _batch(columns: dict[str, list[Any]], fields: pa.Schema) -> pa.RecordBatch:
    import pyarrow as pa

    arrays = [
        _list_array(columns[field.name])
        if field.type == pa.list_(pa.int32())
        else pa.array(columns[field.name], field.type)
        for field in fields
    ]
    return pa.RecordBatch.from_arrays(arrays, schema=fields)


def _list_array(rows: Sequence[Sequence[int]]) -> pa.ListArray:
    """Lists of integers as Arrow: much quicker than one list at a time."""
    import numpy as np
    import pyarrow as pa

    ends = np.cumsum([0, *map(len, rows)], dtype=np.int32)
    flat = np.fromiter(chain.from_iterable(rows), np.int32, count=int(ends[-1]))
    return pa.ListArray.from_arrays(pa.array(ends), pa.array(flat))


# --- processes --------------------------------------------------------------------------------------------------------

_workers: list[Worker] = []  # a process of the pool has one


def prepared(worker: Worker, records: Iterable[Sourced], processes: int) -> Iterator[Prepared]:
    """The chunks' candidates in order; by several processes once it turns out that there is much to do."""
    chunks = _chunks(records)
    yield from (worker.prepare(chunk) for chunk in islice(chunks, ALONE))
    rest = next(chunks, None)
    if rest is None:
        return
    if processes < 2:
        yield from (worker.prepare(chunk) for chunk in chain([rest], chunks))
        return
    with _pool(worker.recipe, processes) as pool:
        yield from _ordered(pool, chain([rest], chunks), ahead=2 * processes)


def _chunks(records: Iterable[Sourced]) -> Iterator[list[Sourced]]:
    source = iter(records)
    while chunk := list(islice(source, CHUNK)):
        yield chunk


@contextmanager
def _pool(recipe: Recipe, processes: int) -> Iterator[ProcessPoolExecutor]:
    from multiprocessing import get_context

    with ProcessPoolExecutor(processes, get_context("spawn"), _start, (recipe,)) as pool:
        try:
            yield pool
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _start(recipe: Recipe) -> None:
    """Runs once in each process of the pool."""
    if request := kill_when_parent_dies():
        request()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one process a core, and no more threads than that
    _workers.append(open_worker(recipe))


def _work(chunk: Sequence[Sourced]) -> Prepared:
    return _workers[0].prepare(chunk)


def _ordered(pool: ProcessPoolExecutor, chunks: Iterable[list[Sourced]], ahead: int) -> Iterator[Prepared]:
    """Results in the order of the chunks; no more than `ahead` are read before they are wanted."""
    waiting: deque[Future[Prepared]] = deque()
    for chunk in chunks:
        waiting.append(pool.submit(_work, chunk))
        if len(waiting) > ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()
