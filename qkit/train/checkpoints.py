"""Checkpoints that training goes on from: each is sealed, last of all, with the sizes and hashes of its files, and only a whole one is used.

A kill in the middle of a save, a full disk or a power cut leaves files that are half there; what reads them fails at every try.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qkit.core.files import sha256_of, write_json

SEAL = "files.json"  # in a checkpoint: each of its files with size and sha256


def seal(checkpoint: Path) -> None:
    """Note in a checkpoint, by rename, what belongs to it; nothing may be written there afterwards."""
    listed = {
        str(file.relative_to(checkpoint)): {"bytes": file.stat().st_size, "sha256": sha256_of(file)}
        for file in sorted(checkpoint.rglob("*"))
        if file.is_file() and file.name != SEAL
    }
    write_json(checkpoint / SEAL, listed)


def thin(folder: Path, keep: int) -> None:
    """Delete all but the newest `keep` sealed checkpoints; one that is being written is not sealed yet, and takes the place of none."""
    kept = [path for path in _newest_first(folder) if (path / SEAL).is_file()][:keep]
    for path in _newest_first(folder):
        if path not in kept:
            shutil.rmtree(path)


def newest_whole(folder: Path, say: Callable[[str], None] = lambda _: None) -> Path | None:
    """The newest checkpoint whose files are all as they were written; None: there is none.

    Newer ones are damaged: `say` is told of each, and what is wrong with it.
    """
    for path in _newest_first(folder):
        if not (why := _damage(path)):
            return path
        say(f"{path.name} is not whole ({why}), so it is not gone on from")
    return None


def drop_after(folder: Path, checkpoint: Path | None) -> None:
    """Delete the checkpoints after the one that is gone on from, which are damaged: the way there is trained again."""
    for path in _newest_first(folder):
        if step_of(path) > step_of(checkpoint):
            shutil.rmtree(path)


def step_of(checkpoint: Path | None) -> int:
    """The optimizer steps that were made before a checkpoint; 0 before the first."""
    return int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0


def _newest_first(folder: Path) -> list[Path]:
    """Those that training has written; what somebody else has put there, such as checkpoint-4-backup, is left alone."""
    own = [path for path in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name) and path.is_dir()]
    return sorted(own, key=step_of, reverse=True)


def _is_seal(listed: Any) -> bool:
    entries = listed.values() if isinstance(listed, dict) else ()
    return bool(entries) and all(isinstance(entry, dict) and {"bytes", "sha256"} <= entry.keys() for entry in entries)


def _damage(checkpoint: Path) -> str:
    """What is wrong with a checkpoint; empty where it is whole."""
    try:
        listed = json.loads((checkpoint / SEAL).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return f"it has no {SEAL}, which is written last"
    except ValueError:  # not JSON, or not text
        return f"its {SEAL} cannot be read"
    if not _is_seal(listed):
        return f"its {SEAL} lists no files"
    for name, then in listed.items():
        file = checkpoint / name
        if not file.is_file():
            return f"{name} is missing"
        if (size := file.stat().st_size) != then["bytes"]:
            return f"{name} has {size:,} of {then['bytes']:,} bytes"
        if sha256_of(file) != then["sha256"]:
            return f"{name} holds other bytes than were written"
    return ""
