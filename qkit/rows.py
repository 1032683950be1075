"""Reading data sources: each record with the place it came from, so that every later message can name it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qkit.errors import DataError
from qkit.recipe import Source
from qkit.source import HubId, locate

# Formats that `datasets` reads better than we would; JSON we read ourselves, to name the line that is broken.
DATASETS_FORMATS = {".csv": "csv", ".parquet": "parquet"}


@dataclass(frozen=True)
class Record:
    """One record of a source. `line` counts from 1 in a file, from 0 in a hub data set."""

    source: str
    line: int
    value: Mapping[str, Any]
    accepted: Any = None

    @property
    def place(self) -> str:
        return f"{self.source}:{self.line}"


def read(source: Source) -> Iterator[Record]:
    """The records of a source, joined with its answers, cut to its `rows`.

    Raises:
        DataError: the source is missing, or a line of it is broken (it is named).
    """
    answers = _answers(source)
    first, last = (int(text) if text else None for text in source.rows.split(":"))
    for index, (line, value) in enumerate(_records(source, source.source)):
        if last is not None and index >= last:
            return
        if index >= (first or 0):
            yield Record(source.source, line, value, answers.get(value.get("id")) if answers else None)


def _answers(source: Source) -> dict[Any, Any]:
    """id -> accepted answers; their field is called ground_truth in the leaderboard's files."""
    if source.answers is None:
        return {}
    return {value.get("id"): value.get("ground_truth") for _, value in _records(source, source.answers)}


def _records(source: Source, text: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    found = locate(text, sha256=source.sha256)
    if isinstance(found, HubId):
        yield from enumerate(_from_hub(found.name, source))
    elif found.is_dir():
        raise DataError(f"{found}: is a folder; name the file in it")
    elif found.suffix in DATASETS_FORMATS:
        yield from enumerate(_from_datasets(DATASETS_FORMATS[found.suffix], found), start=1)
    else:
        yield from _from_json(found)


def _from_hub(name: str, source: Source) -> Iterator[Mapping[str, Any]]:
    from datasets import load_dataset
    from datasets.exceptions import DatasetNotFoundError

    try:
        yield from load_dataset(name, source.name, split=source.split or "train", revision=source.revision)
    except (DatasetNotFoundError, ConnectionError, ValueError, OSError) as error:
        raise DataError(
            f"{name}: could not be loaded from the hub ({type(error).__name__}: {str(error).splitlines()[0]}); "
            "check its name, configuration and split, and the network, or give data.*.source a local file"
        ) from error


def _from_datasets(kind: str, file: Path) -> Iterator[Mapping[str, Any]]:
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError

    try:
        yield from load_dataset(kind, data_files=str(file), split="train")
    except (DatasetGenerationError, ValueError) as error:
        cause = error.__cause__ or error
        raise DataError(f"{file}: cannot be read as {kind}: {str(cause).splitlines()[0]}") from error


def _from_json(file: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """JSON lines, or one JSON array."""
    with file.open(encoding="utf-8-sig") as lines:
        try:
            first = lines.read(1)
            lines.seek(0)
            if first == "[":
                yield from _array(file, lines.read())
            else:
                yield from _lines(file, lines)
        except UnicodeDecodeError as error:
            raise DataError(f"{file}: is not UTF-8 text: {error.reason} at byte {error.start}") from None


def _lines(file: Path, lines: Iterator[str]) -> Iterator[tuple[int, Mapping[str, Any]]]:
    for number, line in enumerate(lines, start=1):
        if line.strip():
            yield number, _object(f"{file}:{number}", line)


def _array(file: Path, text: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{file}:{error.lineno}: not JSON: {error.msg} at column {error.colno}") from None
    for number, value in enumerate(values, start=1):
        if not isinstance(value, dict):
            raise DataError(f"{file}: element {number} is not a JSON object: {value!r}")
        yield number, value


def _object(place: str, line: str) -> Mapping[str, Any]:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{place}: not JSON: {error.msg} at column {error.colno}: {line.strip()[:60]!r}") from None
    if not isinstance(value, dict):
        raise DataError(f"{place}: is not a JSON object: {line.strip()[:60]!r}")
    return value
