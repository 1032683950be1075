"""Shows the progress of a stage: bars on a terminal, plain lines in a log."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from qkit.core.progress import Bar, Progress

if TYPE_CHECKING:
    from rich.console import Console


class Bars(Progress):
    """Bars on a terminal."""

    def __init__(self, console: Console):
        self.console = console

    def notify(self, text: str) -> None:
        self.console.print(text, highlight=False)

    @contextmanager
    def bar(self, name: str, total: float | None, start: float = 0) -> Iterator[Bar]:
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Rich

        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[figures]}", markup=False),
        )
        with Rich(*columns, console=self.console, transient=True) as rich:
            task = rich.add_task(name, total=total, completed=int(start), figures="")

            class TerminalBar:
                def advance(self, steps: float = 1, **figures: float) -> None:
                    rich.update(task, advance=steps, figures=_figures(figures))

            yield TerminalBar()


class Lines(Progress):
    """Plain lines if stderr is not a terminal, for a bar at most one every few seconds."""

    INTERVAL_SECONDS = 5.0

    def __init__(self, console: Console):
        self.console = console

    def notify(self, text: str) -> None:
        self.console.print(text, highlight=False, soft_wrap=True)

    @contextmanager
    def bar(self, name: str, total: float | None, start: float = 0) -> Iterator[Bar]:
        show, interval = self.notify, self.INTERVAL_SECONDS

        class PlainBar:
            done = start
            begin = last = time.monotonic()

            def advance(self, steps: float = 1, **figures: float) -> None:
                self.done += steps
                now = time.monotonic()
                if now - self.last >= interval:
                    self.last = now
                    show(
                        f"{name}: {_progress_text(self.done - start, start, total, now - self.begin)}  {_figures(figures)}"
                    )

        yield PlainBar()


def _progress_text(steps: float, start: float, total: float | None, seconds: float) -> str:
    """How much is done, and the time left if the total is known."""
    if total is None:
        return f"{start + steps:,.0f}"
    return f"{start + steps:g}/{total:g}  {seconds / steps * (total - start - steps):.0f} s left"


def _figures(figures: dict[str, float]) -> str:
    return "  ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in figures.items())
