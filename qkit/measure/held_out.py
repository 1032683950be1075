"""The held-out rows of a run, and the scores on their true tokens."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qkit.plugins.runtime import Runtime, TokenRow

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True)
class HeldOut:
    """The held-out rows as the stage `data` wrote them. `calls`: the tool calls of each answer; `variables`: the template's variables."""

    rows: tuple[TokenRow, ...]
    messages: tuple[list[dict[str, Any]], ...]
    tools: tuple[list[dict[str, Any]], ...]
    references: tuple[Any, ...]
    answers: tuple[str, ...]
    calls: tuple[list[dict[str, Any]], ...]
    variables: tuple[dict[str, Any], ...]


def read_held_out(file: Path) -> HeldOut:
    """The rows of a test.parquet."""
    import pyarrow.parquet

    records = pyarrow.parquet.read_table(file).to_pylist()
    return HeldOut(
        rows=tuple(TokenRow(r["input_ids"], r["start"]) for r in records),
        messages=tuple(json.loads(r["messages"]) for r in records),
        tools=tuple(json.loads(r["tools"]) for r in records),
        references=tuple(json.loads(r["reference"]) for r in records),
        answers=tuple(r["answer"] for r in records),
        calls=tuple(json.loads(r.get("calls") or "[]") for r in records),
        variables=tuple(json.loads(r.get("variables") or "{}") for r in records),
    )


def heldout_targets(runtime: Runtime, held_out: HeldOut, tick: Callable[[], None]) -> list[NDArray[np.float32]]:
    """The log-probability of every token of every reference answer, [T] per row. `tick` is called after each row."""
    targets = []
    for scores in runtime.score(held_out.rows):
        targets.append(scores.targets)
        tick()
    return targets
