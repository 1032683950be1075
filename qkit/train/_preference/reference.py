"""The log-probabilities of the reference model: the base with the adapter off. Computed once, before the first step.

reference.parquet        row, chosen, rejected: of each training pair, in nats, summed over labelled tokens (weighted by preference.ld_alpha)
reference_*.parquet      the same of the validation pairs, where training evaluates them; and of the held-out pairs (reference_test), by the
                         runtime that evaluates

A run that is killed meanwhile goes on from the last part that was written.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qkit.core.batching import TokenBudgetBatches
from qkit.core.progress import Progress
from qkit.tasks._preference.collate import REFERENCE
from qkit.tasks._preference.scoring import log_probabilities
from qkit.train._preference.trainer import side_sums
from qkit.train.trainer import lengths

if TYPE_CHECKING:
    from datasets import Dataset

BATCHES_A_PART = 64  # batches between two writes
NAMES = ("chosen", "rejected")


def with_reference(rows: Dataset, file: Path, trainer: Any, progress: Progress) -> Dataset:
    """Pairs with the columns that collate_pairs reads. They come from the file, or are computed with the trainer's model and written there."""
    sums = _of_pairs(rows, file, trainer, progress)
    for place, name in enumerate(REFERENCE):
        rows = rows.add_column(name, [one[place] for one in sums])
    return rows


def _of_pairs(rows: Dataset, file: Path, trainer: Any, progress: Progress) -> list[tuple[float, float]]:
    """Those of some pairs, by row."""
    known = _read(file, len(rows))
    missing = [row for row in range(len(rows)) if row not in known]
    if not missing:
        return [known[row] for row in range(len(rows))]
    sizes = lengths(rows)
    budget = trainer.batch_tokens // trainer.micro_batches  # no more at once than a training step holds
    sampler = TokenBudgetBatches([sizes[row] for row in missing], budget, 0, trainer.length_step)
    batches = [[missing[place] for place in batch] for batch in sampler]
    with _as_reference(trainer.model):
        for number, batch in enumerate(progress.track(batches, "reference", len(batches)), start=1):
            known.update(zip(batch, _sums(trainer, [rows[row] for row in batch]), strict=True))
            if number % BATCHES_A_PART == 0 or number == len(batches):
                _write(file, known)
    return [known[row] for row in range(len(rows))]


def _sums(trainer: Any, rows: Sequence[Mapping[str, Any]]) -> list[tuple[float, float]]:
    import torch

    batch = {key: value.to(trainer.args.device) for key, value in trainer.collator(rows, trainer.pad).items()}
    with torch.no_grad(), trainer.accelerator.autocast():
        tokens = trainer.tokens(batch)
    return [(one, other) for one, other in side_sums(tokens, len(rows), trainer.ld_alpha).tolist()]


@contextmanager
def _as_reference(model: Any) -> Iterator[None]:
    """The adapter off; no dropout and no checkpointing."""
    was_training = model.training
    model.eval()
    try:
        with adapter_off(model):
            yield
    finally:
        model.train(was_training)


def adapter_off(model: Any) -> AbstractContextManager[Any]:
    """The base of a model with an adapter; a model without one is its own reference before it is trained."""
    off: AbstractContextManager[Any] = model.disable_adapter() if hasattr(model, "disable_adapter") else nullcontext()
    return off


def of_held_out_pairs(file: Path, trainer: Any, rows: Sequence[Any], runtime: Any, progress: Progress) -> None:
    """Write those of the held-out pairs, unless a killed run already has. `runtime`: on the trainer's model; `rows`: what it scores."""
    if len(_read(file, len(rows))) == len(rows):
        return
    with _as_reference(trainer.model), progress.bar("reference of held-out pairs", len(rows)) as bar:
        _write(file, dict(enumerate(log_probabilities(runtime, rows, bar.advance))))


def _read(file: Path, rows: int) -> dict[int, tuple[float, float]]:
    """What was written, by row; nothing if the file is missing or damaged."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        records = pq.read_table(file).to_pylist()
    except (OSError, pa.ArrowException):
        return {}
    return {record["row"]: (record["chosen"], record["rejected"]) for record in records if record["row"] < rows}


def _write(file: Path, known: Mapping[int, tuple[float, float]]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    order = sorted(known)
    columns = {name: pa.array([known[row][place] for row in order], pa.float64()) for place, name in enumerate(NAMES)}
    partial = file.with_suffix(".part")
    pq.write_table(pa.table({"row": pa.array(order, pa.int64()), **columns}), partial)
    partial.replace(file)
