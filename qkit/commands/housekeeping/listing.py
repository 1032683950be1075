"""The runs below folders, newest first: `qkit ls`."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from qkit.commands.housekeeping import disk, state
from qkit.core.errors import UserError
from qkit.core.figures import ABSENT, trimmed
from qkit.measure.evidence import read_evidence
from qkit.recipe.registry import TRAINED
from qkit.run.directory import Run

if TYPE_CHECKING:
    from rich.table import Table

RUNS = Path("runs")
SIGNS = ("run.json", "recipe.yaml", "logs", ".work")  # what changes while a run is worked on
HEADERS = ("run", "task", "model", "state", "score", "disk", "age")
NARROW = {
    "run": 16,
    "task": 8,
    "model": 9,
}  # characters that these keep where the screen is narrow; the others are shown in full
UNITS = (("y", 365 * 86400), ("d", 86400), ("h", 3600), ("min", 60), ("s", 1))


@dataclass(frozen=True)
class Listed:
    """A run in the list. `score`: of what was trained, {score, low, high}, of 100; `changed_at`: seconds since 1970."""

    path: str
    task: str | None
    model: str | None
    state: state.State
    metric: str | None
    score: Mapping[str, Any] | None
    bytes: int
    changed_at: float

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "score": dict(self.score) if self.score else None}


def roots(folders: Sequence[Path]) -> list[Path]:
    """The run directories below these folders, or below runs/; a folder may be one itself.

    Raises:
        UserError: a folder does not exist.
    """
    if missing := [folder for folder in folders if not folder.is_dir()]:
        raise UserError(f"{missing[0]}: no such folder; `qkit run RECIPE` makes runs below {RUNS}")
    below = [root for folder in folders or ([RUNS] if RUNS.is_dir() else []) for root in _below(folder)]
    return list({root.resolve(): root for root in below}.values())


def _below(folder: Path) -> Iterator[Path]:
    """Run directories, which contain no others; hidden folders and links are passed over."""
    if state.is_run(folder):
        yield folder
        return
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if entry.is_dir(follow_symlinks=False) and not entry.name.startswith("."):
            yield from _below(Path(entry.path))


def listed(folders: Sequence[Path]) -> list[Listed]:
    """The runs below these folders, the one that changed last first."""
    return sorted((describe(root) for root in roots(folders)), key=lambda run: -run.changed_at)


def describe(root: Path) -> Listed:
    """What the list says of a run."""
    changed, size = _changed_at(root), disk.size_of(root)
    run = state.opened(root)
    if isinstance(run, state.State):
        return Listed(str(root), None, None, run, None, None, size, changed)
    try:
        evidence, reached = read_evidence(root), state.state_of(run)
    except UserError as error:
        broken = state.State(state.UNREADABLE, why=str(error))
        return Listed(str(root), run.recipe.task, short_name(run), broken, None, None, size, changed)
    entry = next((evidence.scores[name] for name in TRAINED if name in evidence.scores), None)
    score = {key: entry.get(key) for key in ("score", "low", "high")} if entry else None
    return Listed(str(root), run.recipe.task, short_name(run), reached, evidence.metric, score, size, changed)


def short_name(run: Run) -> str:
    """The last part of where the model comes from, without its suffix if that is of a file."""
    name = PurePosixPath(run.recipe.model.source.rpartition("!")[2].replace("\\", "/")).name
    return name.removesuffix(".gguf").removesuffix(".zip")


def _changed_at(root: Path) -> float:
    return max(path.stat().st_mtime for name in SIGNS if (path := root / name).exists())


# --- on the screen ----------------------------------------------------------------------------------------------------


def table(runs: Sequence[Listed], now: float | None = None) -> Table | str:
    """The list for a terminal, of 80 columns or more."""
    from rich.table import Table
    from rich.text import Text

    if not runs:
        return f"no runs below {RUNS}/: `qkit run RECIPE` makes one"
    rows = [_cells(run, time.time() if now is None else now) for run in runs]
    drawn = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="dim")
    for name, width in _widths(rows, shutil.get_terminal_size().columns).items():
        side: Any = "right" if name in HEADERS[4:] else "left"
        drawn.add_column(name, no_wrap=True, overflow="ellipsis", min_width=width, max_width=width, justify=side)
    width = drawn.columns[0].max_width or 0
    for path, *cells in rows:
        shown = (
            path if len(path) <= width else f"\N{HORIZONTAL ELLIPSIS}{path[len(path) - width + 1 :]}"
        )  # the end of a path tells more than its beginning
        drawn.add_row(*map(Text, (shown, *cells)))
    return drawn


def _cells(run: Listed, now: float) -> tuple[str, ...]:
    known = (run.path, run.task or ABSENT, run.model or ABSENT, run.state.text, score_text(run.score))
    return (*known, size_text(run.bytes), age_text(now - run.changed_at))


def _widths(rows: Sequence[Sequence[str]], screen: int) -> dict[str, int]:
    """Characters of each column: as many as it needs; where the screen has too few, task and model give way, then the run."""
    widths = {
        name: max(map(len, column)) for name, column in zip(HEADERS, zip(HEADERS, *rows, strict=True), strict=True)
    }
    for name in ("task", "model", "run"):
        excess = sum(widths.values()) + len(HEADERS) - 1 - screen
        widths[name] = min(widths[name], max(widths[name] - max(excess, 0), NARROW[name]))
    return widths


def score_text(score: Mapping[str, Any] | None) -> str:
    """`50 (40–60)`."""
    if score is None or score["score"] is None:
        return ABSENT
    interval = "" if score["low"] is None else f" ({score['low']:.0f}–{score['high']:.0f})"
    return f"{trimmed(score['score'])}{interval}"


def size_text(count: float) -> str:
    """Bytes in at most five characters: `1.2G`."""
    for unit in ("B", "K", "M", "G"):
        if count < 1000:
            return f"{count:.0f}{unit}" if unit == "B" or count >= 10 else f"{count:.1f}{unit}"
        count /= 1024
    return f"{count:.1f}T"


def age_text(seconds: float) -> str:
    """`3 h`, in the largest unit that is not zero."""
    unit, size = next(((unit, size) for unit, size in UNITS if seconds >= size), UNITS[-1])
    return f"{max(int(seconds // size), 0)} {unit}"
