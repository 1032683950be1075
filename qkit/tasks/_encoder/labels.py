"""The labels of a data set: their names by id, how many rows have them, and a model that knows only that."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from qkit.plugins.checks import SetRow
from qkit.plugins.runtime import Encodes, TextRow
from qkit.recipe.schema import SPLITS

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    from numpy.typing import NDArray


def names_in(rows: Sequence[SetRow]) -> list[str]:
    """The labels of the training rows: numbers in their order, names by the alphabet."""
    names = {name for row in rows if row.split == "train" for name in row.names}
    return sorted(sorted(names), key=int if all(name.isdecimal() for name in names) else None)  # "01" before "1"


def counts(rows: Sequence[SetRow], names: Sequence[str]) -> dict[str, dict[str, int]]:
    """By split: rows with each label; labels that only held-out rows have come last."""
    by_split: dict[str, dict[str, int]] = {split: dict.fromkeys(names, 0) for split in SPLITS}
    for row in rows:
        for name in row.names:
            by_split[row.split][name] = by_split[row.split].get(name, 0) + 1
    return by_split


def with_lists(batch: pa.RecordBatch, name: str, lists: Sequence[Sequence[Any]]) -> pa.RecordBatch:
    """The rows of a batch with a list for each in the column `name`, whose type stays as it is."""
    import pyarrow as pa

    place = batch.schema.get_field_index(name)
    field = batch.schema.field(place)
    return batch.set_column(place, field, pa.array(lists, field.type))


class Constant(Encodes):
    """A model without an input: each row has the same logits, [labels]."""

    def __init__(self, values: NDArray[np.float32]):
        self.values = values

    def logits(self, rows: Sequence[TextRow]) -> Iterator[NDArray[np.float32]]:
        return (self.values for _ in rows)

    def memory_bytes(self) -> int:
        return 0


def log_counts(counts: Sequence[int]) -> NDArray[np.float32]:
    """The logits of a model that knows how many training rows or words have each label, and nothing else."""
    import numpy as np

    logits: NDArray[np.float32] = np.log(np.maximum(np.array(counts, np.float32), 1e-3))
    return logits
