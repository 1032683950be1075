"""What a stage says while it works. The command line decides how it looks; stages never print."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Protocol, TypeVar

T = TypeVar("T")


class Bar(Protocol):
    """One thing that takes time."""

    def advance(self, steps: float = 1, **figures: float) -> None:
        """Go on by `steps`; `figures` (loss, tokens_per_second ...) are shown beside the bar."""


class Progress:
    """The silent one, and the base of those that show something."""

    def say(self, text: str) -> None:
        """One line of news."""

    @contextmanager
    def bar(self, name: str, total: float | None, start: float = 0) -> Iterator[Bar]:
        """A bar over `total` steps (None: nobody knows how many), `start` of them done already."""
        yield _Silent()

    def track(self, items: Iterable[T], name: str, total: int) -> Iterator[T]:
        """Yield `items` while a bar moves."""
        with self.bar(name, total) as bar:
            for item in items:
                yield item
                bar.advance()


class _Silent:
    def advance(self, steps: float = 1, **figures: float) -> None:
        return None
