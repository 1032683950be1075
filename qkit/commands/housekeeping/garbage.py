"""What no result needs any more, in runs and in qkit's cache: `qkit gc`."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qkit.commands.housekeeping import disk, listing, state
from qkit.core.errors import RunBusy
from qkit.core.sources import cache_dir
from qkit.run.directory import KEY, Run

# Folders of the cache, what is one thing there, and the names that qkit or datasets gives it: the cache may be a folder with other things.
CACHED = {
    "models": ("*", r"(tokens|plain)-[0-9a-f]{24}|.+-[0-9a-f]{12}(-[\w.]+)?"),
    "wheels": ("*", r"[\w.-]+-\d[\w.+!]*"),
    "datasets": ("*/*", r"[\w.-]+-[0-9a-f]{16}"),
    "inspect": ("*", r"[0-9a-f]{12,64}"),
}
RESUMED_FROM = {
    "checkpoints": "checkpoints",
    "best": "the best step",
}  # in the stage's folder: only a killed training needs them
UNFINISHED = (".making-", ".download-", ".made-")  # folders that a killed process was filling
DAY = 86400.0


@dataclass(frozen=True)
class Leftover:
    """Something that can go. `why`: for people; `run`: whose it is, None for the cache; `bytes`: what deleting it frees."""

    path: str
    why: str
    bytes: int
    run: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def leftovers(folders: Sequence[Path], days: float, now: float | None = None) -> list[Leftover]:
    """What can go in the runs below these folders, or below runs/, and in the cache where nothing used it for so many days.

    Runs that are running, or that cannot be read, are left alone.
    """
    of_runs = [one for root in listing.roots(folders) for one in _of_run(root)]
    return [*of_runs, *_of_cache(cache_dir(), days, time.time() if now is None else now)]


def delete(leftover: Leftover) -> bool:
    """Delete it; a run that has begun to run in the meantime is left alone. Returns whether it is gone.

    Raises:
        MissingArtifact: it cannot be written.
    """
    if leftover.run is None:
        disk.delete(Path(leftover.path))
        return True
    try:
        with state.locked(Path(leftover.run)):
            disk.delete(Path(leftover.path))
    except RunBusy:
        return False
    return True


# --- a run ------------------------------------------------------------------------------------------------------------


def _of_run(root: Path) -> Iterator[Leftover]:
    run = state.opened(root)
    if isinstance(run, state.State) or state.is_running(root):
        return
    for name, what in RESUMED_FROM.items():
        if (run.folder("train") / name).is_dir() and _trained(run):
            yield _leftover(run.folder("train") / name, f"{what} of a finished training", run)
    for path in sorted((root / ".work").glob("*")):
        if why := _why(path, run):
            yield _leftover(path, why, run)
    for path in sorted(root.glob(".*.part")):
        yield _leftover(path, "a file that was not written to its end", run)


def _leftover(path: Path, why: str, run: Run) -> Leftover:
    size = disk.freed_by(path) if path.is_dir() else disk.size_of(path)
    return Leftover(str(path), why, size, str(run.root))


def _why(path: Path, run: Run) -> str:
    """Why something in a run's work folder can go; empty if it is still of use: to resume a training, or to the stage verify."""
    recorded = state.stages_recorded(run)
    if path.name == "train":
        note = path / KEY
        finished = note.is_file() and _trained(run) and note.read_text() == recorded["train"]["key"]
        resumable = state.progress_of(path / "checkpoints")[0] is not None
        return "" if resumable and not finished else "what a stopped training left, without a checkpoint to resume from"
    if path.name in ("reference", "live"):
        return "scores of the reference model, which verify has used" if "verify" in recorded else ""
    return f"what a stopped stage left ({path.name})"


def _trained(run: Run) -> bool:
    """Whether the result of a training is in place: a kill may come between the record and the move of the folder."""
    return "train" in state.stages_recorded(run) and run.whole("train")


# --- the cache --------------------------------------------------------------------------------------------------------


def _of_cache(root: Path, days: float, now: float) -> Iterator[Leftover]:
    for name, (pattern, names) in CACHED.items():
        for path in sorted(path for path in (root / name).glob(pattern) if path.is_dir()):
            idle = (now - last_used(path)) / DAY
            if path.name.startswith(UNFINISHED) and idle > 1:
                yield Leftover(str(path), "a folder that a killed process was filling", disk.size_of(path))
            elif re.fullmatch(names, path.name) and idle > days:
                yield Leftover(str(path), f"cached, not used for {idle:.0f} days", disk.size_of(path))


def last_used(path: Path) -> float:
    """When something in the cache was last used: marked, written, or read where the file system notes that. Seconds since 1970."""
    return max([path.stat().st_mtime, *map(_touched, disk.files_below(path))])


def _touched(entry: os.DirEntry[str]) -> float:
    try:
        status = entry.stat(follow_symlinks=False)
    except FileNotFoundError:
        return 0.0
    return max(status.st_mtime, status.st_atime)


def screen(shown: Sequence[Leftover], deleted: bool) -> str:
    """What can go, or is gone, a line each, and how much that is."""
    if not shown:
        return "nothing to delete"
    total = listing.size_text(sum(one.bytes for one in shown))
    lines = [f"{listing.size_text(one.bytes):>6}  {one.path}: {one.why}" for one in shown]
    return "\n".join([*lines, f"deleted: {total}" if deleted else f"{total} in all; --yes deletes it"])
