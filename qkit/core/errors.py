"""The error tree. The command line turns these into exit codes; anything else that escapes is a bug in qkit.

The message is for people. What a caller may want to act on is a field, so that nobody has to read the message for it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

SHOWN = 200  # characters of a user's value that a message quotes
LINE = 2000  # characters of a line of a message: a longer one quotes a value that somebody forgot to shorten


def short(text: object, limit: int = SHOWN) -> str:
    """A user's value, for a message: cut to `limit` characters."""
    full = str(text)
    return full if len(full) <= limit else f"{full[: limit - 1]}\N{HORIZONTAL ELLIPSIS}"


def as_yaml(value: object) -> str:
    """A value of a recipe as YAML writes it, for a message."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def printable(text: str) -> str:
    """Text that any output can print: lone surrogates are escaped."""
    return text.encode("utf-8", "backslashreplace").decode()


def listed(names: Iterable[object]) -> str:
    """Names of columns, sorted, for a message."""
    return short(printable(", ".join(sorted(map(str, names))))) or "(none)"


def nearest(word: str, words: Sequence[str]) -> str:
    """ ", did you mean 'NAME'?" with the valid name that is most like `word`, or nothing."""
    close = difflib.get_close_matches(word, words, n=1)
    return f", did you mean {close[0]!r}?" if close else ""


class QkitError(Exception):
    """Base of every error that qkit raises on purpose."""

    exit_code = 1

    def __init__(self, message: object = ""):
        super().__init__("\n".join(short(line, LINE) for line in str(message).split("\n")))


class UserError(QkitError):
    """Something that the user can fix: one message, no traceback, exit code 2."""

    exit_code = 2


@dataclass(frozen=True)
class Problem:
    """One problem of a recipe. `key`: where in the recipe, such as ("train", "max_steps"); `origin`: file and line, or `--set`."""

    key: tuple[str | int, ...]
    message: str
    origin: str

    def __str__(self) -> str:
        return f"{self.origin}: {self.message}"


class RecipeError(UserError):
    """The recipe is wrong. `problems`: every one that was found, not only the first."""

    def __init__(self, message: object = "", *, problems: Sequence[Problem] = ()):
        super().__init__(message)
        self.problems = tuple(problems)


class DataError(UserError):
    """A data source is missing, unreadable, or holds a row that cannot be trained on.

    `source`: the data set as the recipe names it; `line`: 1-based line of its file; `rule`: the name of the check that failed.
    """

    def __init__(
        self, message: object = "", *, source: str | None = None, line: int | None = None, rule: str | None = None
    ):
        super().__init__(message)
        self.source = source
        self.line = line
        self.rule = rule


class ModelError(UserError):
    """A model source is missing, unreadable, or lacks what the recipe needs from it. `source`: the folder or file."""

    def __init__(self, message: object = "", *, source: Path | str | None = None):
        super().__init__(message)
        self.source = source


class DoesNotFit(UserError):
    """The device or the disk has too little room. `needed_bytes`, `free_bytes`: where both are known."""

    def __init__(self, message: object = "", *, needed_bytes: int | None = None, free_bytes: int | None = None):
        super().__init__(message)
        self.needed_bytes = needed_bytes
        self.free_bytes = free_bytes


class MissingExtra(UserError):
    """A package that this command needs is not installed. `package`: its name."""

    def __init__(self, message: object = "", *, package: str | None = None):
        super().__init__(message)
        self.package = package


class MissingArtifact(UserError):
    """A stage needs what an earlier stage makes, and it is missing or incomplete. `path`: what was looked for."""

    def __init__(self, message: object = "", *, path: Path | None = None):
        super().__init__(message)
        self.path = path


class NotDeployable(UserError):
    """The chosen runtime cannot load what the recipe would make. `export_format`: the format."""

    def __init__(self, message: object = "", *, export_format: str | None = None):
        super().__init__(message)
        self.export_format = export_format


class ParityFailed(UserError):
    """An artifact is too far from the model that was trained.

    `artifact`: its name; `gate`: the limit that it broke; `figure`: what was measured, in the gate's unit.
    """

    def __init__(
        self, message: object = "", *, artifact: str | None = None, gate: str | None = None, figure: float | None = None
    ):
        super().__init__(message)
        self.artifact = artifact
        self.gate = gate
        self.figure = figure


class RunBusy(UserError):
    """Another process works in this run directory. `holder`: its process id, if it is known."""

    def __init__(self, message: object = "", *, holder: int | None = None):
        super().__init__(message)
        self.holder = holder


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
    """A bench record is worse than an earlier one by more than the threshold and by more than noise explains.

    `figures`: what regressed, as pairs of record and figure, such as ("vllm-c8", "ttft_seconds").
    """

    exit_code = 1

    def __init__(self, message: object = "", *, figures: Sequence[tuple[str, str]] = ()):
        super().__init__(message)
        self.figures = tuple(figures)


class StageFailed(QkitError):
    """A stage failed for a reason that is not the user's; its log says more."""

    def __init__(self, stage: str, run: Path, log: Path, reason: str):
        super().__init__(f"stage {stage} failed in {run}: {reason}\nlog: {log}")
        self.stage = stage
        self.run = run
        self.log = log
        self.reason = reason


class OutOfMemory(StageFailed):
    """A stage ran out of the device's memory: the recipe can ask for less, and the stage can be run again."""

    exit_code = 3
