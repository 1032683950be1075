"""What an exporter is given."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from qkit.recipe import Recipe


@dataclass(frozen=True)
class Job:
    """One artifact to make, and what it is made from."""

    merged: Path  # the merged model's folder: 16 bit, complete
    base: Path
    adapter: Path
    rows: Path  # the run's data/train.parquet: input_ids and labels (-100 where no loss is taken)
    recipe: Recipe
    log: Path
