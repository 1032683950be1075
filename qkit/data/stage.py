"""The stage `data`: records in, token ids and the ledger out. From here on a row is its token ids; nobody reads the raw text again.

data/train.parquet validation.parquet test.parquet    input_ids, labels, start (where the last completion begins), pack, position, and texts
data/ledger.parquet                                   what became of every record
data/summary.json                                     counts per source and split, lengths, the token budget, and every check
data/tokens.json                                      the tokens that end a turn, and the padding token
data/labels.json                                      names by label id, and rows of each by split (tasks with labels)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qkit.core.device import detect
from qkit.core.errors import DataError, listed, short
from qkit.core.files import write_json
from qkit.core.progress import Progress
from qkit.data import prepare as data_prepare
from qkit.data import setup_checks, unused
from qkit.data import summary as data_summary
from qkit.data.checks import Findings, failures, refusal
from qkit.data.entry import Entry, Sourced
from qkit.data.ledger import batch_budget, check_packs, check_sums, make_ledger, write_ledger
from qkit.data.prepare import Worker
from qkit.data.read import Record, read
from qkit.data.select import Decision, select
from qkit.plugins.checks import Place, SetRow
from qkit.plugins.task import LABELS, Task
from qkit.recipe.schema import SPLITS, Data, Recipe
from qkit.run.directory import Run

if TYPE_CHECKING:
    import pyarrow as pa

    from qkit.data.ledger import LedgerRow
    from qkit.plugins.checks import Check


CANDIDATES = ".candidates.arrow"


def run(run: Run, out: Path) -> None:
    """Read, check and tokenize every row.

    Raises:
        DataError: a check failed; all that did are named.
    """
    summary = prepare(run.recipe, out, run.progress)
    if failed := failures(summary["checks"]):
        raise DataError(refusal(failed))
    for line in (data_summary.sums(summary), *data_summary.warnings(summary)):
        run.progress.notify(line)


def prepare(recipe: Recipe, out: Path, progress: Progress) -> dict[str, Any]:
    """Write everything that `data/` holds to `out`; returns summary.json. Checks that fail are in it and raise nothing.

    Raises:
        DataError, ModelError: a source, or the tokenizer, cannot be read at all; or data.columns has a name that is nobody's.
    """
    worker = data_prepare.open_worker(recipe)
    if wrong := worker.task.unknown_column(recipe.data, worker.encoder.reads):
        raise DataError(wrong)
    tokens = worker.encoder.special_tokens()
    entries = list(_candidates(worker, out / CANDIDATES, progress))
    decisions, overlap = select(entries, recipe, findings := Findings())
    ledger = make_ledger(decisions, recipe)
    labelled = _set_rows(decisions)
    labels = worker.task.labels(labelled)
    _write_splits(ledger, entries, worker.task, labels.get("names", ()), recipe.data, out)
    write_ledger(ledger, out / "ledger.parquet")
    counts = data_summary.split_counts(decisions)
    checks: list[Check] = [
        *(setup_checks.with_embedding(worker, tokens, check) for check in findings.checks(worker.task, recipe.data)),
        unused.check(entries, worker.task, worker.encoder.reads, recipe.data.ignore),
        *overlap,
        *worker.task.set_checks(labelled, recipe),
        *setup_checks.checks(worker, decisions, tokens, counts),
    ]
    summary = {
        "sources": data_summary.source_counts(decisions),
        "template": worker.encoder.description(tokens),
        "splits": counts,
        "dropped": data_summary.dropped_by_rule(decisions),
        "lengths": data_summary.lengths(decisions),
        "budget": batch_budget(ledger, recipe),
        "checks": [asdict(check) for check in checks],
    }
    check_sums(summary, ledger)
    check_packs(ledger, recipe.data.batch_tokens)
    for name, content in (("summary.json", summary), ("tokens.json", tokens), (LABELS, labels)):
        if content:
            write_json(out / name, content)
    return summary


def _set_rows(decisions: Sequence[Decision]) -> list[SetRow]:
    """The rows that are used, for checks of the whole set."""
    return [
        SetRow(decision.split, entry.key, entry.names, Place(entry.source, entry.line), entry.format, entry.about)
        for decision in decisions
        if decision.used and (entry := decision.entry).part == 0
    ]


# --- reading ----------------------------------------------------------------------------------------------------------


def _candidates(worker: Worker, file: Path, progress: Progress) -> Iterator[Entry]:
    """Every record's entries; the rows themselves go to a file as they come."""
    import pyarrow as pa

    candidate, record = 0, -1
    with progress.bar("tokenize", None) as bar, pa.OSFile(str(file), "wb") as sink:
        options = pa.ipc.IpcWriteOptions(compression="lz4")
        with pa.ipc.new_file(sink, data_prepare.schema(worker.task, worker.recipe.data), options=options) as writer:
            for chunk in data_prepare.prepared(worker, _records(worker.recipe), detect().cores):
                writer.write_batch(chunk.batch)
                for entry in chunk.entries:
                    record += entry.part == 0
                    entry.record = record
                    if not entry.rule:
                        entry.candidate, candidate = candidate, candidate + 1
                    yield entry
                bar.advance(len(chunk.entries))


def _records(recipe: Recipe) -> Iterator[Sourced]:
    """Every record of every source.

    Raises:
        DataError: there are some, and none has a value in the column data.group.
    """
    columns: dict[str, None] = {}
    group = recipe.data.group
    grouped = group is None
    for pool in SPLITS:
        for number, source in enumerate(getattr(recipe.data, pool)):
            for record in read(source):
                yield Sourced(pool, number, record)
                if not grouped and isinstance(record, Record):
                    columns.update(dict.fromkeys(record.value))
                    grouped = data_prepare.value_of(record.value, group, recipe) is not None
    if columns and not grouped:
        raise DataError(f"data.group={short(group)}: no row has a value there; there are: {listed(columns)}")


# --- writing ----------------------------------------------------------------------------------------------------------


def _write_splits(
    ledger: Sequence[LedgerRow], entries: Sequence[Entry], task: Task, names: Sequence[str], section: Data, out: Path
) -> None:
    """The rows of each split, batch by batch, out of the file of all candidates."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [row for row, entry in zip(ledger, entries, strict=True) if entry.candidate >= 0]
    packs = [pa.field("pack", pa.int32()), pa.field("position", pa.int32())]
    schema = pa.schema([*data_prepare.schema(task, section), *packs])
    with ExitStack() as stack:
        writers = {
            split: stack.enter_context(pq.ParquetWriter(out / f"{split}.parquet", schema, compression="zstd"))
            for split in SPLITS
        }
        source = stack.enter_context(pa.memory_map(str(out / CANDIDATES)))
        candidates = stack.enter_context(pa.ipc.open_file(source))
        begin = 0
        for number in range(candidates.num_record_batches):
            batch = task.with_label_ids(candidates.get_batch(number), names)
            batch_rows = rows[begin : begin + batch.num_rows]
            begin += batch.num_rows
            for split, writer in writers.items():
                if (chosen := _chosen(batch, batch_rows, split, schema)).num_rows:
                    writer.write_batch(chosen)
    (out / CANDIDATES).unlink()


def _chosen(batch: pa.RecordBatch, rows: Sequence[LedgerRow], split: str, schema: pa.Schema) -> pa.RecordBatch:
    """The rows of a batch that a split uses, with their packs. `rows`: their ledger rows."""
    import pyarrow as pa

    places = [i for i, row in enumerate(rows) if row.split == split and row.status != "dropped"]
    taken = batch.take(pa.array(places, pa.int64()))
    packs = [pa.array([getattr(rows[i], name) for i in places], pa.int32()) for name in ("pack", "position")]
    return pa.RecordBatch.from_arrays([*taken.columns, *packs], schema=schema)
