"""The stage `data`: records in, token ids and the ledger out. From here on a row is its token ids; nobody reads the raw text again.

data/train.parquet validation.parquet test.parquet    input_ids, labels, start (where the last completion begins), pack, position, and texts
data/ledger.parquet                                   what became of every record
data/summary.json                                     counts per source and split, lengths, the token budget, and every check
data/tokens.json                                      the tokens that end a turn, and the padding token
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qkit.chat import template
from qkit.core.device import detect
from qkit.core.errors import DataError, short
from qkit.core.files import write_json
from qkit.core.progress import Progress
from qkit.data import prepare as data_prepare
from qkit.data import select, setup_checks, unused
from qkit.data.checks import Findings, failures, refusal
from qkit.data.entry import Entry, Sourced
from qkit.data.ledger import batch_budget, check_packs, check_sums, make_ledger, write_ledger
from qkit.data.prepare import Worker
from qkit.data.read import Record, read
from qkit.recipe.schema import SPLITS, Recipe
from qkit.run.directory import Run
from qkit.tasks._conversation import formats

if TYPE_CHECKING:
    import pyarrow as pa

    from qkit.data.ledger import LedgerRow


CANDIDATES = ".candidates.arrow"


def run(run: Run, out: Path) -> None:
    """Read, look at and tokenize every row.

    Raises:
        DataError: a check failed; all that did are named.
    """
    summary = prepare(run.recipe, out, run.progress)
    if failed := failures(summary["checks"]):
        raise DataError(refusal(failed))
    for line in (sums(summary), *warnings(summary)):
        run.progress.say(line)


def warnings(summary: Mapping[str, Any]) -> Iterator[str]:
    """Before training: what of a text would not be learnt, in full, and which other checks have a word to say."""
    warned = {check["name"]: check for check in summary["checks"] if check["status"] == "warn"}
    yield from (f"data: {name}: {warned[name]['message']}" for name in ("unused", "content") if name in warned)
    if others := [name for name in warned if name not in ("unused", "content")]:
        yield f"data: worth a look with `qkit inspect`: {', '.join(others)}"


def sums(summary: Mapping[str, Any]) -> str:
    """In one line: where every training record went."""
    train = summary["splits"]["train"]
    return (
        f"data: {train['records']:,} records = {train['kept']:,} trained + {train['dropped']:,} dropped; "
        f"{train['rows']:,} rows, {train['tokens']:,} tokens, {train['labelled_tokens']:,} of them carry loss"
    )


def left_out(summary: Mapping[str, Any], split: str) -> str:
    """Which records of somebody's own rows are not used, by the rule that left them out; "" where all are."""
    counts = summary["splits"][split]
    if not counts["dropped"]:
        return ""
    rules = ", ".join(f"{rule} {count:,}" for rule, count in summary["dropped"].items())
    return f"{counts['dropped']:,} of {counts['records']:,} records are left out ({rules}): `qkit inspect` names them"


def prepare(how: Recipe, out: Path, progress: Progress) -> dict[str, Any]:
    """Write everything that `data/` holds to `out`; returns summary.json. Checks that fail are in it and raise nothing.

    Raises:
        DataError, ModelError: a source, or the tokenizer, cannot be read at all; or data.columns has a name that is nobody's.
    """
    own = data_prepare.worker(how)
    if wrong := formats.unknown_column(how.data, own.reads):
        raise DataError(wrong)
    tokens = template.special_tokens(own.reader, how.model.pad_token, own.facts.vocabulary)
    entries = list(_candidates(own, out / CANDIDATES, progress))
    findings = Findings()
    fates, overlap = select.decide(entries, how, findings)
    ledger = list(make_ledger(entries, fates, how))
    _write_splits(ledger, entries, out)
    write_ledger(ledger, out / "ledger.parquet")
    counts = select.split_counts(entries, fates)
    of_rows = (setup_checks.held_together(own, tokens, check) for check in findings.checks(how.data))
    found = [
        *of_rows,
        unused.check(entries, own.reads, how.data.ignore),
        *overlap,
        *setup_checks.checks(own, entries, fates, tokens, counts),
    ]
    summary = {
        "sources": select.source_counts(entries, fates),
        "template": _template(own, tokens),
        "splits": counts,
        "dropped": select.dropped_by_rule(fates),
        "lengths": select.lengths(entries, fates),
        "budget": batch_budget(ledger, how),
        "checks": [asdict(check) for check in found],
    }
    check_sums(summary, ledger)
    check_packs(ledger, how.data.batch_tokens)
    write_json(out / "summary.json", summary)
    write_json(out / "tokens.json", tokens)
    return summary


def _template(own: Worker, tokens: Mapping[str, Any]) -> dict[str, str]:
    """Which chat template it is, and the tokens that end a turn and pad."""
    name = own.reader.tokenizer.convert_ids_to_tokens
    chosen = own.how.model.chat_template or "the tokenizer's"
    return {"name": chosen, "end_of_turn": name(tokens["end_of_turn"]), "pad": name(tokens["pad"])}


# --- reading ----------------------------------------------------------------------------------------------------------


def _candidates(own: Worker, file: Path, progress: Progress) -> Iterator[Entry]:
    """Every record's entries; the rows themselves go to a file as they come."""
    import pyarrow as pa

    row, record = 0, -1
    with progress.bar("tokenize", None) as bar, pa.OSFile(str(file), "wb") as sink:
        options = pa.ipc.IpcWriteOptions(compression="lz4")
        with pa.ipc.new_file(sink, data_prepare.schema(), options=options) as writer:
            for chunk in data_prepare.prepared(own, _records(own.how), detect().cores):
                writer.write_batch(chunk.batch)
                for entry in chunk.entries:
                    record += entry.part == 0
                    entry.record = record
                    if not entry.rule:
                        entry.row, row = row, row + 1
                    yield entry
                bar.advance(len(chunk.entries))


def _records(how: Recipe) -> Iterator[Sourced]:
    """Every record.

    Raises:
        DataError: there are some, and none has a value in the column data.group.
    """
    columns: dict[str, None] = {}
    grouped = how.data.group is None
    for pool in SPLITS:
        for number, source in enumerate(getattr(how.data, pool)):
            for record in read(source):
                yield Sourced(pool, number, record)
                if not grouped and isinstance(record, Record):
                    columns.update(dict.fromkeys(record.value))
                    grouped = data_prepare.value_of(record.value, how.data.group, how) is not None
    if columns and not grouped:
        raise DataError(
            f"data.group={short(how.data.group)}: no row has a value there; there are: {formats.listed(columns)}"
        )


def _write_splits(ledger: Sequence[LedgerRow], entries: Sequence[Entry], out: Path) -> None:
    """The rows of each split, batch by batch, out of the file of all candidates."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    by_candidate = [fate for fate, entry in zip(ledger, entries, strict=True) if entry.row >= 0]
    packs = [pa.field("pack", pa.int32()), pa.field("position", pa.int32())]
    schema = pa.schema([*data_prepare.schema(), *packs])
    writers = {split: pq.ParquetWriter(out / f"{split}.parquet", schema, compression="zstd") for split in SPLITS}
    with pa.memory_map(str(out / CANDIDATES)) as source, pa.ipc.open_file(source) as candidates:
        begin = 0
        for number in range(candidates.num_record_batches):
            batch = candidates.get_batch(number)
            fates = by_candidate[begin : begin + batch.num_rows]
            begin += batch.num_rows
            for split, writer in writers.items():
                if (chosen := _chosen(batch, fates, split, schema)).num_rows:
                    writer.write_batch(chosen)
    for writer in writers.values():
        writer.close()
    (out / CANDIDATES).unlink()


def _chosen(batch: pa.RecordBatch, fates: Sequence[LedgerRow], split: str, schema: pa.Schema) -> pa.RecordBatch:
    """The rows of a batch that a split uses, with their packs."""
    import pyarrow as pa

    rows = [i for i, fate in enumerate(fates) if fate.split == split and fate.status != "dropped"]
    taken = batch.take(pa.array(rows, pa.int64()))
    packs = [pa.array([getattr(fates[i], name) for i in rows], pa.int32()) for name in ("pack", "position")]
    return pa.RecordBatch.from_arrays([*taken.columns, *packs], schema=schema)
