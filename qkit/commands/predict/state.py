"""What an output was made with, in a small file beside it: an attempt continues only what it would have written itself."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qkit.commands.predict import sink, source
from qkit.commands.predict.job import Job
from qkit.commands.predict.targets import Target
from qkit.core.errors import UserError, short
from qkit.core.files import read_json, sha256_of, write_json


def fingerprint(job: Job, target: Target) -> dict[str, Any]:
    """Everything that the lines depend on, by its name for people, as JSON has it. The file of standard input is null."""
    stream, file = job.file == source.STDIN, Path(job.file).expanduser()
    return {
        "target": target.place,
        "model": target.name,
        "weights": target.weights,
        "file": None if stream else file.name,
        "bytes of the file": None if stream else file.stat().st_size,
        "sha256 of the file": None if stream or job.out == sink.STDOUT else sha256_of(file),
        "--format": job.stdin_format if stream else None,
        "--column": {**target.columns, **job.columns},
        "--keep": list(job.keep),
        **target.options,
    }


def path_of(out: str) -> Path:
    """The file beside an output."""
    return Path(f"{out}.state")


def check(job: Job, now: Mapping[str, Any]) -> None:
    """Refuse to continue an output that was made with something else. An empty one has nothing to lose.

    Raises:
        UserError: it was, or nothing says with what.
    """
    out = Path(job.out)
    if job.out == sink.STDOUT or job.overwrite or not out.exists() or not out.stat().st_size:
        return
    before = _read(path_of(job.out))
    if before is None:
        raise UserError(
            f"{out}: it exists, and no {path_of(job.out).name} beside it says with what it was made; name another file, or set --overwrite"
        )
    names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    if names:
        changes = ", ".join(f"{name} {_shown(before.get(name))}, now {_shown(now.get(name))}" for name in names)
        raise UserError(f"{out}: it exists, and was made with {changes}; name another file, or set --overwrite")


def write(job: Job, now: Mapping[str, Any]) -> None:
    """Record what the output is made with. It stays when all is done: then a second start knows that nothing is left to do."""
    if job.out != sink.STDOUT:
        write_json(path_of(job.out), now)


def _read(file: Path) -> dict[str, Any] | None:
    """What is recorded; None if nothing is, or nothing that can be read."""
    try:
        recorded = read_json(file)
    except (FileNotFoundError, ValueError):
        return None
    return recorded if isinstance(recorded, dict) else None


def _shown(value: Any) -> str:
    return short(json.dumps(value, ensure_ascii=False))
