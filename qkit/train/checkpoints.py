"""Checkpoints that training resumes from. Each is sealed last, with the sizes and hashes of its files, and only complete ones are used.

A kill during a save, a full disk or a power cut leaves truncated files, on which every resume would fail.
"""

from __future__ import annotations

import functools
import json
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qkit.core.files import sha256_of, write_json

ONE_FILE = "100TB"
SEAL = "files.json"  # in a checkpoint: each of its files with size and sha256


def seal(checkpoint: Path) -> None:
    """Write the list of a checkpoint's files, atomically. Nothing may be written to the checkpoint afterwards."""
    listed = {
        str(file.relative_to(checkpoint)): {"bytes": file.stat().st_size, "sha256": sha256_of(file)}
        for file in sorted(checkpoint.rglob("*"))
        if file.is_file() and file.name != SEAL
    }
    write_json(checkpoint / SEAL, listed)


@contextmanager
def readable(model: Any) -> Iterator[None]:
    """Inside, `model` is saved as transformers' Trainer reads it back: in one file, by the names that it has in memory.

    By default it is saved by the names of published checkpoints, such as one tensor for each expert; the Trainer would find none of these,
    and go on with the experts of the base without an error. An adapter is saved as PEFT does.
    """
    if hasattr(model, "peft_config"):
        yield
        return
    options = {"save_original_format": False, "max_shard_size": ONE_FILE}
    model.save_pretrained = functools.partial(type(model).save_pretrained, model, **options)
    try:
        yield
    finally:
        del model.save_pretrained


def thin(folder: Path, keep: int) -> None:
    """Delete all but the newest `keep` sealed checkpoints; one that is still being written is not sealed and does not count."""
    kept = sealed(folder)[:keep]
    for path in _newest_first(folder):
        if path not in kept:
            shutil.rmtree(path)


def sealed(folder: Path) -> list[Path]:
    """The checkpoints that were written to their end, the newest first."""
    return [path for path in _newest_first(folder) if (path / SEAL).is_file()]


def newest_whole(folder: Path, notify: Callable[[str], None] = lambda _: None) -> Path | None:
    """The newest checkpoint whose files match their seal; None if there is none.

    `notify` gets a message about each newer, damaged one.
    """
    for path in _newest_first(folder):
        if not (why := damage(path)):
            return path
        notify(f"{path.name} is incomplete ({why}); training does not resume from it")
    return None


def drop_after(folder: Path, checkpoint: Path | None) -> None:
    """Delete the checkpoints after the one that training resumes from: they are damaged, and their steps run again."""
    for path in _newest_first(folder):
        if step_of(path) > step_of(checkpoint):
            shutil.rmtree(path)


def step_of(checkpoint: Path | None) -> int:
    """The number of optimizer steps before a checkpoint; 0 for None."""
    return int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0


def _newest_first(folder: Path) -> list[Path]:
    """Checkpoints that training wrote. Other folders, such as checkpoint-4-backup, are ignored."""
    folders = [
        path for path in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name) and path.is_dir()
    ]
    return sorted(folders, key=step_of, reverse=True)


def _is_seal(listed: Any) -> bool:
    entries = listed.values() if isinstance(listed, dict) else ()
    return bool(entries) and all(isinstance(entry, dict) and {"bytes", "sha256"} <= entry.keys() for entry in entries)


def damage(checkpoint: Path) -> str:
    """What is wrong with a checkpoint; empty if it is complete."""
    try:
        listed = json.loads((checkpoint / SEAL).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return f"{SEAL}, which is written last, is missing"
    except ValueError:  # not JSON, or not text
        return f"{SEAL} is not readable"
    if not _is_seal(listed):
        return f"{SEAL} lists no files"
    for name, then in listed.items():
        file = checkpoint / name
        if not file.is_file():
            return f"{name} is missing"
        if (size := file.stat().st_size) != then["bytes"]:
            return f"{name} has {size:,} of {then['bytes']:,} bytes"
        if sha256_of(file) != then["sha256"]:
            return f"the content of {name} has changed"
    return ""
