"""Progress of a stage. The command line decides how it is shown; stages never print."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Protocol, TypeVar

T = TypeVar("T")


class Bar(Protocol):
    """One progress bar."""

    def advance(self, steps: float = 1, **figures: float) -> None:
        """Advance by `steps`; `figures` (loss, tokens_per_second ...) are shown next to the bar."""


class Progress:
    """Shows nothing; the base of the classes that do."""

    def notify(self, text: str) -> None:
        """Show one line."""

    @contextmanager
    def bar(self, name: str, total: float | None, start: float = 0) -> Iterator[Bar]:
        """A bar over `total` steps (None if unknown), of which `start` are already done."""
        yield _Silent()

    def track(self, items: Iterable[T], name: str, total: int) -> Iterator[T]:
        """Yield `items` and advance a bar."""
        with self.bar(name, total) as bar:
            for item in items:
                yield item
                bar.advance()


class _Silent:
    def advance(self, steps: float = 1, **figures: float) -> None:
        return None
