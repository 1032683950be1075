"""The records to predict: of a file as the stage data reads them, or of standard input."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from qkit.core.errors import DataError, UserError
from qkit.data.read import Broken, Record, read, read_stream
from qkit.recipe.schema import Source
from qkit.run.source_files import SUFFIXES, suffix_of

STDIN = "-"
FORMATS = {"csv": ".csv", "tsv": ".tsv", "jsonl": ".jsonl", "text": ".txt"}  # of standard input


def records(file: str, stdin_format: str) -> Iterator[Record | Broken]:
    """The records of a file in their order, or of standard input in a format; those that cannot be read are among them.

    Raises:
        UserError: the format is unknown.
        DataError: there is no such file, or it is of no known kind.
    """
    if stdin_format not in FORMATS:
        raise UserError(f"--format {stdin_format}: must be one of {', '.join(FORMATS)}")
    if file == STDIN:
        return read_stream(sys.stdin.buffer, "stdin", FORMATS[stdin_format])
    path = Path(file).expanduser()
    if not path.is_file():
        raise DataError(f"{file}: no such file", source=file)
    if suffix_of(path) not in SUFFIXES:
        raise DataError(f"{file}: unsupported file type; supported: {', '.join(SUFFIXES)}", source=file)
    return read(Source(source=str(path.resolve()), sample_by="line"))
