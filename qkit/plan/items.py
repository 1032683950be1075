"""One line of a plan: what is in memory, and how much of it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class MemoryItem:
    """A part of the peak, `parts` what it is made of. `exact`: to the byte; else a bound or an estimate, as `formula` says."""

    name: str
    bytes: int
    exact: bool
    formula: str
    parts: tuple[MemoryItem, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)
