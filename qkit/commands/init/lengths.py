"""How long rows are, in tokens of the model's tokenizer; or, if the model cannot be had, an estimate by their characters."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qkit.commands.init.reading import Reading, texts_in
from qkit.core.batching import IGNORED
from qkit.core.errors import DataError, MissingExtra, ModelError
from qkit.core.progress import Progress
from qkit.plan.solve import percentile
from qkit.recipe.load import from_dict

UNLIMITED = 10**6  # tokens of a row
CHARACTERS = 4  # to a token, in an estimate
SHARES = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}


@dataclass(frozen=True)
class Lengths:
    """`rows`: [tokens, rows, labelled tokens], by rising length; `reason`: why they are estimates, "" for tokens of the tokenizer.

    `longest_answer`: the most labelled tokens of a row; 0: unknown.
    """

    rows: Sequence[Sequence[int]]
    reason: str = ""
    longest_answer: int = 0

    @property
    def count(self) -> int:
        return sum(entry[1] for entry in self.rows)

    @property
    def tokens(self) -> int:
        return sum(entry[0] * entry[1] for entry in self.rows)

    def percentiles(self) -> dict[str, int]:
        """The lengths that half, 90 %, 99 % and all of the rows do not exceed."""
        return {name: percentile(self.rows, share) for name, share in SHARES.items()}

    def within(self, limit: int) -> int:
        """How many rows have at most so many tokens."""
        return sum(entry[1] for entry in self.rows if entry[0] <= limit)


def measure(raw: Mapping[str, Any], reading: Reading, progress: Progress) -> Lengths:
    """The lengths of all rows of a recipe, before any is cut; estimates if its tokenizer cannot be had."""
    from qkit.data.inspection import view as inspection_view

    data = {**raw["data"], "max_length": UNLIMITED, "batch_tokens": UNLIMITED, "split": {"train": 1.0}}
    data = {name: value for name, value in data.items() if name not in ("validation", "test", "too_long")}
    try:
        recipe = from_dict({**raw, "data": data}, (), "qkit init")
        inspection = inspection_view.inspect(recipe, progress)
    except (ModelError, MissingExtra) as error:
        return estimate(reading, str(error))
    except ModuleNotFoundError as error:
        return estimate(reading, f"{error.name} is not installed: pip install 'qkit[train]'")
    summary = inspection.summary
    if not summary["lengths"]:
        raise DataError(f"{data['train'][0]['source']}: no row is left to train on; see `qkit inspect`")
    return Lengths(summary["lengths"], longest_answer=_most_labels(inspection.folder / "train.parquet"))


def _most_labels(rows: Path) -> int:
    """The most labels with loss of a row; 0 if its labels are none of tokens."""
    import numpy as np
    import pyarrow.parquet as pq

    if "labels" not in pq.read_schema(rows).names:
        return 0
    most = 0
    for chunk in pq.read_table(rows, columns=["labels"])["labels"].chunks:
        labelled = np.concatenate([[0], np.cumsum(chunk.values.to_numpy() != IGNORED)])
        offsets = chunk.offsets.to_numpy()
        most = max(most, int((labelled[offsets[1:]] - labelled[offsets[:-1]]).max(initial=0)))
    return most


def estimate(reading: Reading, reason: str) -> Lengths:
    """A token for every CHARACTERS characters of a row."""
    counted = Counter(-(-texts_in(_content(example)) // CHARACTERS) or 1 for example in reading.examples)
    return Lengths([[tokens, rows, 0] for tokens, rows in sorted(counted.items())], reason)


def _content(example: Any) -> Any:
    beside = ("unread", "ignored", "trained")
    return {name: getattr(example, name) for name in example.__dataclass_fields__ if name not in beside}
