"""The error tree. `cli.py` turns these into exit codes; anything else that escapes is a bug in qkit."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path

SHOWN = 200  # characters of a user's value that a message gives back


LINE = 2000  # characters of a line of a message: more is a value that somebody forgot to shorten


def short(text: object, limit: int = SHOWN) -> str:
    """What a user gave, for a message: as much of it as tells which it is."""
    found = str(text)
    return found if len(found) <= limit else f"{found[: limit - 1]}\N{HORIZONTAL ELLIPSIS}"


class QkitError(Exception):
    """Base of every error that qkit raises on purpose."""

    exit_code = 1

    def __init__(self, message: object = ""):
        super().__init__("\n".join(short(line, LINE) for line in str(message).split("\n")))


class UserError(QkitError):
    """Something the user can put right: one message, no traceback, exit code 2."""

    exit_code = 2


class RecipeError(UserError):
    """The recipe is wrong. Carries every problem found, not only the first."""


class DataError(UserError):
    """A data source is missing, unreadable, or holds a row that cannot be trained on."""


class ModelError(UserError):
    """A model source is missing, unreadable, or lacks what the recipe needs of it."""


class DoesNotFit(UserError):
    """The device, or the disk, has too little room for what was asked."""


class MissingExtra(UserError):
    """A package that this command needs is not installed."""


class MissingArtifact(UserError):
    """A stage needs what an earlier stage makes, and it is not there or is not whole."""


class NotDeployable(UserError):
    """The chosen runtime cannot load what the recipe would make."""


class ParityFailed(UserError):
    """An artifact is too far from the model that was trained."""


class RunBusy(UserError):
    """Another process works on this run directory."""


class ServerError(UserError):
    """A server could not be started as requested, or did not answer as expected.

    The fields hold what is known: the server's `url`, the HTTP `status` of its answer, and `reason`, the cause without context or remedy.
    """

    def __init__(
        self, message: object = "", *, url: str | None = None, status: int | None = None, reason: str | None = None
    ):
        super().__init__(message)
        self.url = url
        self.status = status
        self.reason = reason


class Regressed(UserError):
    """A bench record is worse than the one it is compared with, beyond the threshold and beyond noise: fails a build."""

    exit_code = 1


class StageFailed(QkitError):
    """A stage died for a reason that is not the user's; its log says more."""

    def __init__(self, stage: str, run: Path, log: Path, reason: str):
        super().__init__(f"stage {stage} failed in {run}: {reason}\nlog: {log}")
        self.stage = stage
        self.run = run
        self.log = log
        self.reason = reason


class OutOfMemory(StageFailed):
    """A stage ran out of the device's memory: less of it may be asked for, and the stage run again."""

    exit_code = 3


def nearest(word: str, words: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, words, n=1)
    return f", did you mean {close[0]!r}?" if close else ""
