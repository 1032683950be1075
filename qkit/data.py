"""The stage `data`: records in, token ids and the ledger out. From here on a row is its token ids; nobody reads the raw text again.

data/train.parquet validation.parquet test.parquet    input_ids, labels, start (where the last completion begins), pack, position, and texts
data/ledger.parquet                                   what became of every record
data/summary.json                                     counts per source and split, lengths, the token budget, and every check
data/tokens.json                                      the tokens that end a turn, and the padding token
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qkit import decisions, formats, preconditions, preparation, template, unused
from qkit.checks import Findings, failures, refusal
from qkit.decisions import Fate
from qkit.device import detect
from qkit.errors import DataError, short
from qkit.fast.batches import TokenBudgetBatches, padded_length
from qkit.fast.packs import packed
from qkit.preparation import Entry, Sourced, Worker
from qkit.progress import Progress
from qkit.recipe import Recipe
from qkit.rows import Record, read
from qkit.run import Run, write_json
from qkit.splits import SPLITS

if TYPE_CHECKING:
    import pyarrow as pa

CANDIDATES = ".candidates.arrow"


@dataclass(frozen=True)
class LedgerRow:
    """What became of a record, or of one of the rows that it makes (`part`).

    `status`: trained, held_out or dropped; `reason`: why it is dropped. `tokens`: as used, after `truncated_by` were cut off; all of them
    where it is dropped for its length. `row`: its number in the split's parquet file. `pack` and `position`: which pack it is in and where
    it begins there. Null where it has none.
    """

    split: str
    source: str
    line: int
    part: int
    format: str
    sha256: str
    tokens: int
    labelled_tokens: int
    truncated_by: int
    status: str
    reason: str
    row: int | None = None
    pack: int | None = None
    position: int | None = None


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
    own = preparation.worker(how)
    if wrong := formats.unknown_column(how.data, own.reads):
        raise DataError(wrong)
    tokens = template.special_tokens(own.reader, how.model.pad_token, own.facts.vocabulary)
    entries = list(_candidates(own, out / CANDIDATES, progress))
    findings = Findings()
    fates, overlap = decisions.decide(entries, how, findings)
    ledger = list(_ledger(entries, fates, how))
    _write_splits(ledger, entries, out)
    _write_ledger(ledger, out / "ledger.parquet")
    counts = decisions.split_counts(entries, fates)
    of_rows = (preconditions.held_together(own, tokens, check) for check in findings.checks(how.data))
    found = [
        *of_rows,
        unused.check(entries, own.reads, how.data.ignore),
        *overlap,
        *preconditions.checks(own, entries, fates, tokens, counts),
    ]
    summary = {
        "sources": decisions.source_counts(entries, fates),
        "template": _template(own, tokens),
        "splits": counts,
        "dropped": decisions.dropped_by_rule(fates),
        "lengths": decisions.lengths(entries, fates),
        "budget": _budget(ledger, how),
        "checks": [asdict(check) for check in found],
    }
    _check_sums(summary, ledger)
    _check_packs(ledger, how.data.batch_tokens)
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
        with pa.ipc.new_file(sink, preparation.schema(), options=options) as writer:
            for chunk in preparation.prepared(own, _records(own.how), detect().cores):
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
                    grouped = preparation.value_of(record.value, how.data.group, how) is not None
    if columns and not grouped:
        raise DataError(
            f"data.group={short(how.data.group)}: no row has a value there; there are: {formats.listed(columns)}"
        )


# --- the ledger -------------------------------------------------------------------------------------------------------


def _ledger(entries: Sequence[Entry], fates: Sequence[Fate], how: Recipe) -> Iterator[LedgerRow]:
    """One row for each entry, in their order; rows are numbered and packed as they will be trained on."""
    used = dict.fromkeys(SPLITS, 0)
    packs = iter(_packs(entries, fates, how))
    for entry, fate in zip(entries, fates, strict=True):
        row, pack, position = None, None, None
        if not fate.rule:
            row = used[fate.split]
            used[fate.split] += 1
            pack, position = next(packs) if fate.split == "train" else (None, None)
        yield LedgerRow(
            split=fate.split,
            source=entry.source,
            line=entry.line,
            part=entry.part,
            format=entry.format,
            sha256=entry.sha256,
            tokens=entry.tokens,
            labelled_tokens=entry.labelled_tokens,
            truncated_by=entry.truncated_by,
            status="dropped" if fate.rule else "trained" if fate.split == "train" else "held_out",
            reason=fate.reason,
            row=row,
            pack=pack,
            position=position,
        )


def _packs(entries: Sequence[Entry], fates: Sequence[Fate], how: Recipe) -> Iterator[tuple[int | None, int | None]]:
    """(pack, position) of each training row, in order."""
    lengths = [e.tokens for e, f in zip(entries, fates, strict=True) if not f.rule and f.split == "train"]
    if how.data.packing:
        yield from packed(lengths, how.data.batch_tokens)
    else:
        yield from [(None, None)] * len(lengths)


def _budget(ledger: Sequence[LedgerRow], how: Recipe) -> dict[str, int]:
    """Tokens that one epoch computes: real ones, padding, and those that carry loss."""
    rows = [row for row in ledger if row.status == "trained"]
    lengths = [row.tokens for row in rows]
    if how.data.packing:
        ends: dict[int, int] = {}
        for row in rows:
            assert row.pack is not None and row.position is not None
            ends[row.pack] = max(ends.get(row.pack, 0), row.position + row.tokens)
        computed, batches = sum(map(padded_length, ends.values())), len(ends)
    else:
        made = list(TokenBudgetBatches(lengths, how.data.batch_tokens, how.seed)) if lengths else []
        computed = sum(len(batch) * padded_length(max(lengths[i] for i in batch)) for batch in made)
        batches = len(made)
    return {
        "batches": batches,
        "computed": computed,
        "real": sum(lengths),
        "padding": computed - sum(lengths),
        "labelled": sum(row.labelled_tokens for row in rows),
    }


def _check_sums(summary: Mapping[str, Any], ledger: Sequence[LedgerRow]) -> None:
    """Every record is accounted for: in = used + dropped, and the ledger's tokens are the splits'."""
    for split, counts in summary["splits"].items():
        rows = [row for row in ledger if row.split == split]
        records = sum(row.part == 0 for row in rows)
        labelled = sum(row.labelled_tokens for row in rows if row.status != "dropped")
        assert counts["records"] == counts["kept"] + counts["dropped"] == records, (split, counts, records)
        assert counts["labelled_tokens"] == labelled, (split, counts, labelled)


def _check_packs(ledger: Sequence[LedgerRow], capacity: int) -> None:
    """In a pack rows follow each other without a gap, from 0 to at most its capacity: every token is computed once."""
    ends: dict[int, int] = {}
    placed = [(row.pack, row.position, row.tokens) for row in ledger if row.pack is not None]
    for pack, position, tokens in sorted(placed):
        assert position == ends.get(pack, 0), (pack, position, ends)
        ends[pack] = position + tokens
        assert ends[pack] <= capacity, (pack, ends[pack], capacity)


# --- writing ----------------------------------------------------------------------------------------------------------


def _write_ledger(ledger: Sequence[LedgerRow], file: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    names = list(LedgerRow.__dataclass_fields__)
    columns = {name: [getattr(row, name) for row in ledger] for name in names}
    numbers = {"row": pa.int64(), "pack": pa.int32(), "position": pa.int32()}
    arrays = [pa.array(columns[name], numbers.get(name)) for name in names]
    pq.write_table(pa.Table.from_arrays(arrays, names=names), file, compression="zstd")


def _write_splits(ledger: Sequence[LedgerRow], entries: Sequence[Entry], out: Path) -> None:
    """The rows of each split, batch by batch, out of the file of all candidates."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    by_candidate = [fate for fate, entry in zip(ledger, entries, strict=True) if entry.row >= 0]
    packs = [pa.field("pack", pa.int32()), pa.field("position", pa.int32())]
    schema = pa.schema([*preparation.schema(), *packs])
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
