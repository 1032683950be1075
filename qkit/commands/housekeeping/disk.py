"""What takes space on the disk, and how it is deleted."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from qkit.core.files import writing


def files_below(path: Path) -> Iterator[os.DirEntry[str]]:
    """Every file below a folder; links are not followed."""
    try:
        entries = list(os.scandir(path))
    except FileNotFoundError:  # deleted by whoever works there
        return
    for entry in entries:
        if entry.is_dir(follow_symlinks=False):
            yield from files_below(Path(entry.path))
        else:
            yield entry


def size_of(*paths: Path) -> int:
    """Bytes that files and folders take together. A file with several names counts once, a link as itself."""
    sizes: dict[tuple[int, int], int] = {}
    for path in paths:
        if path.is_symlink() or path.is_file():
            statuses = [path.lstat()]
        else:
            statuses = [status for entry in files_below(path) if (status := _status(entry))]
        sizes |= {(status.st_dev, status.st_ino): status.st_size for status in statuses}
    return sum(sizes.values())


def freed_by(path: Path) -> int:
    """Bytes that deleting a folder frees: a file that has a name elsewhere too stays on the disk."""
    names: dict[tuple[int, int], list[os.stat_result]] = {}
    for entry in files_below(path):
        if status := _status(entry):
            names.setdefault((status.st_dev, status.st_ino), []).append(status)
    return sum(same[0].st_size for same in names.values() if len(same) >= same[0].st_nlink)


def _status(entry: os.DirEntry[str]) -> os.stat_result | None:
    try:
        return entry.stat(follow_symlinks=False)
    except FileNotFoundError:
        return None


def delete(path: Path) -> None:
    """Delete a file or a folder.

    Raises:
        MissingArtifact: it, or something in it, cannot be written.
    """
    with writing(path):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
