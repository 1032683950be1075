"""One line of a memory plan."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class MemoryItem:
    """A share of the peak in bytes, and its parts. `exact`: correct to the byte; else `formula` says how it is estimated."""

    name: str
    bytes: int
    exact: bool
    formula: str
    parts: tuple[MemoryItem, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)
