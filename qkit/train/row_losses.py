"""Each training row's loss before the first step and after the last: train/losses.parquet.

row           its number in data/train.parquet
loss_before   mean nats per labelled token (of a pair of answers: its loss) with the untrained adapter, which has no effect yet
loss_after    the same with the trained adapter; null until training is complete

Rows are never packed here, and logits exist for a part of a batch at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qkit.core.batching import TokenBudgetBatches
from qkit.core.progress import Progress
from qkit.train.trainer import lengths

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel


def write_before(file: Path, trainer: Any, progress: Progress) -> None:
    """Write the losses before the first step, unless a killed run already has. The adapter is still untrained, even with a checkpoint."""
    if not _readable(file):
        before = mean_losses(trainer, progress, "losses before")
        _write(file, before, [None] * len(before))


def _readable(file: Path) -> bool:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return bool(pq.read_table(file).num_rows)
    except (OSError, pa.ArrowException):  # missing or damaged
        return False


def write_after(file: Path, trainer: Any, progress: Progress) -> None:
    """Add the losses after the last step."""
    import pyarrow.parquet as pq

    before = pq.read_table(file)["loss_before"].to_pylist()
    _write(file, before, mean_losses(trainer, progress, "losses after"))


def mean_losses(trainer: Any, progress: Progress, name: str) -> list[float | None]:
    """Mean nats per labelled token of each row of the trainer's data set; None for a row without labels."""
    sums = loss_sums(trainer, trainer.train_dataset, lambda batches: progress.track(batches, name, len(batches)))
    counts = trainer.items(trainer.train_dataset)
    return [total / count if count else None for total, count in zip(sums, counts, strict=True)]


def loss_sums(
    trainer: Any, rows: Dataset, track: Callable[[list[list[int]]], Iterable[list[int]]] = iter
) -> list[float]:
    """The sum of each row's losses in nats, without gradients, dropout or packing. `track`: yields the batches as they are computed."""
    import torch

    sums = [0.0] * len(rows)
    budget = trainer.batch_tokens // trainer.micro_batches  # no more at once than a training step holds
    batches = list(TokenBudgetBatches(lengths(rows), budget, 0, trainer.length_step))
    with inference(trainer.model), torch.no_grad(), trainer.accelerator.autocast():
        for indices in track(batches):
            batch = trainer.collator([rows[index] for index in indices], trainer.pad)
            inputs = {key: value.to(trainer.args.device) for key, value in batch.items()}
            for index, total in zip(indices, trainer.row_losses(inputs).tolist(), strict=True):
                sums[index] = total
    return sums


@contextmanager
def inference(model: PreTrainedModel) -> Iterator[None]:
    """No dropout and no checkpointing."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _write(file: Path, before: list[float | None], after: list[float | None]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    numbers = pa.array(range(len(before)), pa.int64())
    table = pa.table(
        {"row": numbers, "loss_before": pa.array(before, pa.float64()), "loss_after": pa.array(after, pa.float64())}
    )
    partial = file.with_suffix(".part")
    pq.write_table(table, partial)
    partial.replace(file)
