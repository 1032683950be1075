"""Files of ours: JSON and texts written whole or not at all, hashes, folders, room on the disk."""

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
    """Write a file by rename: a reader sees the old text or the new, never half of it.

    Raises:
        MissingArtifact: its folder cannot be written.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    with writing(path.parent):
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON document by rename."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False))


def read_json(path: Path) -> Any:
    """Read a JSON document."""
    return json.loads(path.read_text(encoding="utf-8"))


def make_folder(path: Path) -> None:
    """Make a folder and those above it.

    Raises:
        MissingArtifact: a file is in the way, or the place cannot be written.
    """
    try:
        with writing(path):
            path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise MissingArtifact(f"{path}: cannot make this folder: {error.strerror}") from None


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """For what writes to `path`.

    Raises:
        MissingArtifact: the system does not let this user, or lets nobody, write there.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        raise MissingArtifact(
            f"{path}: cannot be written: {error.strerror}; make it writable, or give --out another folder"
        ) from None


def need_disk(folder: Path, wanted_bytes: int, what: str) -> None:
    """Raise DoesNotFit when the disk below `folder` has less than `wanted_bytes` free."""
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < wanted_bytes:
        raise DoesNotFit(
            f"{what} needs {wanted_bytes / 2**30:.1f} GiB on the disk of {folder}, which has {free_bytes / 2**30:.1f} GiB free; "
            "free some, or give --out a folder on another disk"
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
    """A file to write that takes the target's place when all went well. This process's own: two may want the same target at once."""
    partial = target.with_name(f"{target.name}.{os.getpid()}.part")
    try:
        yield partial
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def sha256_of(path: Path) -> str:
    """sha256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read(path: Path) -> Any:
    """A JSON document, None when it is absent. NaN and infinities become null: no JSON reader but Python's takes them.

    Raises:
        MissingArtifact: it is not JSON.
    """
    return _parse(path.read_text(encoding="utf-8"), path) if path.exists() else None


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The documents of a JSON lines file, as `read` reads them; none when it is absent.

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
