"""File helpers: JSON and text written atomically, hashes, folders, disk space."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qkit.core.errors import DoesNotFit, MissingArtifact


def write_text(path: Path, text: str) -> None:
    """Write a file atomically, by rename: a reader sees the old text or the new one.

    Raises:
        MissingArtifact: its folder is not writable.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    with writing(path.parent):
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON document atomically."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False))


def read_json(path: Path) -> Any:
    """Read a JSON document."""
    return json.loads(path.read_text(encoding="utf-8"))


def make_folder(path: Path) -> None:
    """Create a folder and its parents.

    Raises:
        MissingArtifact: a file of that name exists, or the parent is not writable.
    """
    try:
        with writing(path):
            path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise MissingArtifact(f"{path}: cannot create this folder: {error.strerror}") from None


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Translate permission errors of a block that writes to `path`.

    Raises:
        MissingArtifact: the path is not writable.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        raise MissingArtifact(
            f"{path}: cannot be written: {error.strerror}; make it writable, or set --out to another folder"
        ) from None


def need_disk(folder: Path, needed_bytes: int, what: str) -> None:
    """Raise DoesNotFit when the disk of `folder` has less than `needed_bytes` free."""
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < needed_bytes:
        raise DoesNotFit(
            f"{what} needs {needed_bytes / 2**30:.1f} GiB on the disk of {folder}, which has {free_bytes / 2**30:.1f} GiB free; "
            "free some space, or set --out to a folder on another disk",
            needed_bytes=needed_bytes,
            free_bytes=free_bytes,
        )


def link_or_copy(source: Path, target: Path, what: str) -> None:
    """Hard-link a file, following a symbolic link; copy it where links do not work, such as on another file system.

    Raises:
        DoesNotFit: a copy does not fit on the disk. `what`: what needs the file, for the message.
    """
    try:
        os.link(source.resolve(), target)
    except OSError:
        need_disk(target.parent, source.stat().st_size, what)
        shutil.copyfile(source, target)


@contextmanager
def put_in_place(target: Path) -> Iterator[Path]:
    """A temporary file that replaces the target if the block succeeds. Its name has the process id: two processes may write one target."""
    partial = target.with_name(f"{target.name}.{os.getpid()}.part")
    try:
        yield partial
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def sha256_of(path: Path) -> str:
    """The sha256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read(path: Path) -> Any:
    """A JSON document, or None if the file is missing. NaN and infinities become None: only Python's JSON reader accepts them.

    Raises:
        MissingArtifact: it is not JSON.
    """
    return _parse(path.read_text(encoding="utf-8"), path) if path.exists() else None


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The documents of a JSON Lines file, read as by `read`; empty if the file is missing.

    Raises:
        MissingArtifact: a line is not JSON.
    """
    if not path.exists():
        return []
    return [_parse(line, path) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]


def _parse(text: str, path: Path) -> Any:
    try:
        return json.loads(text, parse_constant=lambda _: None)
    except json.JSONDecodeError as error:
        raise MissingArtifact(f"{path} is damaged ({error}); delete its folder and run the stage again") from None
