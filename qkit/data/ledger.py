"""The ledger: what became of each row, and what it gives to the loss."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qkit.core.batching import TokenBudgetBatches, packed, padded_length
from qkit.data.select import Decision
from qkit.plugins.task import open_task
from qkit.recipe.schema import SPLITS, Recipe


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


# --- the ledger -------------------------------------------------------------------------------------------------------


def make_ledger(decisions: Sequence[Decision], recipe: Recipe) -> list[LedgerRow]:
    """One row for each decision, in their order; rows of a split are numbered, and packed as they will be trained on."""
    packs = _packs(decisions, recipe)
    used = dict.fromkeys(SPLITS, 0)
    ledger = []
    for decision in decisions:
        row, pack, position = None, None, None
        if decision.used:
            row = used[decision.split]
            used[decision.split] += 1
            if packs and decision.split == "train":
                pack, position = packs[row]
        ledger.append(_ledger_row(decision, row, pack, position))
    return ledger


def _ledger_row(decision: Decision, row: int | None, pack: int | None, position: int | None) -> LedgerRow:
    entry = decision.entry
    return LedgerRow(
        split=decision.split,
        source=entry.source,
        line=entry.line,
        part=entry.part,
        format=entry.format,
        sha256=entry.sha256,
        tokens=entry.tokens,
        labelled_tokens=entry.labelled_tokens,
        truncated_by=entry.truncated_by,
        status="dropped" if not decision.used else "trained" if decision.split == "train" else "held_out",
        reason=decision.reason,
        row=row,
        pack=pack,
        position=position,
    )


def _packs(decisions: Sequence[Decision], recipe: Recipe) -> list[tuple[int, int]]:
    """(pack, position) of each training row by its number; none without data.packing."""
    if not recipe.data.packing:
        return []
    lengths = [decision.entry.tokens for decision in decisions if decision.used and decision.split == "train"]
    return packed(lengths, recipe.data.batch_tokens)


def batch_budget(ledger: Sequence[LedgerRow], recipe: Recipe) -> dict[str, int]:
    """Tokens that one epoch computes: real ones, padding, and those that carry loss."""
    rows = [row for row in ledger if row.status == "trained"]
    lengths = [row.tokens for row in rows]
    if recipe.data.packing:
        ends: dict[int, int] = {}
        for row in rows:
            assert row.pack is not None and row.position is not None
            ends[row.pack] = max(ends.get(row.pack, 0), row.position + row.tokens)
        computed, count = sum(map(padded_length, ends.values())), len(ends)
    else:
        step, most = open_task(recipe.task).LENGTH_STEP, recipe.data.batch_rows or math.inf
        sampler = TokenBudgetBatches(lengths, recipe.data.batch_tokens, recipe.seed, step, most)
        batches = list(sampler) if lengths else []
        computed = sum(len(batch) * padded_length(max(lengths[i] for i in batch), step) for batch in batches)
        count = len(batches)
    return {
        "batches": count,
        "computed": computed,
        "real": sum(lengths),
        "padding": computed - sum(lengths),
        "labelled": sum(row.labelled_tokens for row in rows),
    }


def check_sums(summary: Mapping[str, Any], ledger: Sequence[LedgerRow]) -> None:
    """Every record is accounted for: in = used + dropped, and the ledger's tokens are the splits'."""
    for split, counts in summary["splits"].items():
        rows = [row for row in ledger if row.split == split]
        records = sum(row.part == 0 for row in rows)
        labelled = sum(row.labelled_tokens for row in rows if row.status != "dropped")
        assert counts["records"] == counts["kept"] + counts["dropped"] == records, (split, counts, records)
        assert counts["labelled_tokens"] == labelled, (split, counts, labelled)


def check_packs(ledger: Sequence[LedgerRow], capacity: int) -> None:
    """In a pack rows follow each other without a gap, from 0 to at most its capacity: every token is computed once."""
    ends: dict[int, int] = {}
    placed = [(row.pack, row.position, row.tokens) for row in ledger if row.pack is not None]
    for pack, position, tokens in sorted(placed):
        assert position == ends.get(pack, 0), (pack, position, ends)
        ends[pack] = position + tokens
        assert ends[pack] <= capacity, (pack, ends[pack], capacity)


# --- writing ----------------------------------------------------------------------------------------------------------


def write_ledger(ledger: Sequence[LedgerRow], file: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    names = list(LedgerRow.__dataclass_fields__)
    columns = {name: [getattr(row, name) for row in ledger] for name in names}
    numbers = {"row": pa.int64(), "pack": pa.int32(), "position": pa.int32()}
    arrays = [pa.array(columns[name], numbers.get(name)) for name in names]
    pq.write_table(pa.Table.from_arrays(arrays, names=names), file, compression="zstd")
