"""Reading data sources: each record with the place it came from, so that every later message can name it."""

from __future__ import annotations

import csv
import glob
import gzip
import json
import math
import re
import sys
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, NoReturn, cast

from qkit.errors import DataError, short
from qkit.reach import reaching_hub
from qkit.recipe import Source
from qkit.source import HubId, locate

# Suffix to loader of `datasets`. The rest we read ourselves: JSON to name the line that is broken, CSV to keep every field the text
# that it is ("007", "NA"), where type inference would make numbers and nothing of it.
LOADERS = {".parquet": "parquet", ".txt": "text", ".md": "text"}
DELIMITERS = {".csv": ",", ".tsv": "\t"}
JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
SUFFIXES = (*JSON_SUFFIXES, *DELIMITERS, *LOADERS)
ABOUT = ("README", "LICENSE")  # what a folder says of itself is not a part of its data
UTF16 = (b"\xff\xfe", b"\xfe\xff")
SAVED = ("dataset_info.json", "state.json")  # beside the rows of a Dataset that save_to_disk wrote
SHOWN = 60  # characters of a broken line
WHITE = re.compile(r"[ \t\r\n]*")


class Struct(dict[str, Any]):
    """An object out of a table: it has the keys of all others there, and null where it has nothing. What is null in JSON is meant."""


class Rounded(float):
    """A number of a table that its loader may have rounded: what JSON writes as an integer beyond 2**63 is a float there."""


@dataclass(frozen=True, slots=True)
class Record:
    """One record of a source, with its `accepted` answers; of these `unread` is what nothing reads.

    `source` is its file; `line` counts records from 1 (in JSON lines: lines), in a saved or hub data set from 0.
    """

    source: str
    line: int
    value: Mapping[str, Any]
    accepted: Any = None
    format: str = "auto"
    unread: tuple[str, ...] = ()

    @property
    def place(self) -> str:
        return f"{self.source}:{self.line}"


@dataclass(frozen=True, slots=True)
class Broken:
    """A line that cannot be read as a record, and why."""

    source: str
    line: int
    reason: str

    @property
    def place(self) -> str:
        return f"{self.source}:{self.line}"


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no number in JSON")


def _finite(text: str) -> float:
    number = float(text)
    return number if math.isfinite(number) else _refuse(text)


class Twice(ValueError):
    """An object has a key twice: one of its values would be read and the other not."""


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        keys = [key for key, _ in pairs]
        raise Twice(f"an object has the key {short(repr(next(key for key in keys if keys.count(key) > 1)))} twice")
    return made


# json.loads takes NaN and Infinity, which nobody else reads, and would build a decoder for every line
DECODER = json.JSONDecoder(parse_constant=_refuse, parse_float=_finite, object_pairs_hook=_each_once)


def decode(text: str) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: it is none, has a number that is not finite, or an object that has a key twice.
        RecursionError: it is nested too deeply.
    """
    return DECODER.decode(text)


Numbered = Iterator[tuple[int, Mapping[str, Any] | str]]  # line, and the record or why it is none


def read(source: Source) -> Iterator[Record | Broken]:
    """The records of a source in its order, joined with its answers, cut to its `rows`; nothing beyond these is read.

    Raises:
        DataError: the source is missing or cannot be read at all, or its answers cannot.
    """
    answers, joined, missed = _answers(source), 0, ""
    first, last = (int(text) if text else None for text in source.rows.split(":"))
    for name, line, value in islice(_located(source, source.source), first or 0, last):
        if isinstance(value, str):
            yield Broken(name, line, value)
        else:
            own = answers.get(str(value["id"])) if answers and value.get("id") is not None else None
            accepted, unread = own or (None, ())
            joined, missed = joined + (own is not None), missed or f"{name}:{line} has the id {short(value.get('id'))}"
            yield Record(name, line, value, accepted, source.format, unread)

    if answers and missed and not joined:
        raise DataError(
            f"{source.answers}: holds no answer to any record: {missed}, there {short(next(iter(answers)))}"
        )


ANSWER = ("id", "ground_truth")  # what the leaderboard's files call them


def _answers(source: Source) -> dict[str, tuple[Any, tuple[str, ...]]]:
    """id, as text -> accepted answers, and the names of what else their record holds.

    Raises:
        DataError: a record cannot be read, an id has two answers, or no record has one.
    """
    if source.answers is None:
        return {}
    found: dict[str, tuple[Any, tuple[str, ...]]] = {}
    columns: dict[str, None] = {}
    for name, line, value in _located(source, source.answers):
        if isinstance(value, str):
            raise DataError(f"{name}:{line}: {value}; without its answers data.*.source cannot be used")
        key = str(value.get("id"))
        unread = tuple(f"answers.{short(other)}" for other in value if other not in ANSWER and value[other] is not None)
        accepted = value.get("ground_truth")
        if value.get("id") is not None and key in found and found[key][0] != accepted:
            raise DataError(
                f"{name}:{line}: the id {short(key)} stands there twice, with other answers; keep one of both"
            )
        found[key] = (accepted, unread)
        columns.update(dict.fromkeys(value))
    if found and all(accepted is None for accepted, _ in found.values()):
        names = short(", ".join(map(str, columns)))
        raise DataError(f"{source.answers}: holds no answers: it has the columns {names}; wanted id and ground_truth")
    return found


def _located(source: Source, text: str) -> Iterator[tuple[str, int, Mapping[str, Any] | str]]:
    """(file, line, record) of a file, of every file in a folder, of a saved data set, or of one on the hub."""
    found = locate(text, sha256=source.sha256)
    if isinstance(found, HubId):
        for index, row in enumerate(_from_hub(found.name, source)):
            yield text, index, row
        return
    kind = saved_kind(found)
    if text == source.source:
        _check_settings(source, kind)
    if kind:
        for index, row in enumerate(_from_saved(found, text, kind, source)):
            yield text, index, row
        return
    for file in _files(found):
        name = text if file == found else str(file)
        for line, value in _from_file(file, name, source):
            yield name, line, value


def _check_settings(source: Source, kind: str) -> None:
    """Refuse what is of a hub data set, or of a package, where the source is a file or folder: it would change nothing."""
    own = {"sha256"} if source.source.startswith("pypi:") else {"split"} if kind else set()
    what = "a package's file" if "sha256" in own else "a saved data set" if kind else "a file or folder"
    idle = [name for name in ("name", "split", "revision", "sha256") if getattr(source, name) and name not in own]
    if idle:
        raise DataError(
            f"{source.source}: data.*.{idle[0]} says nothing of {what}; leave it out (a part of the rows: data.*.rows)"
        )


def _files(path: Path) -> list[Path]:
    inside = data_files(path)
    if not inside:
        raise DataError(f"{path}: is a folder with no data in it; it should hold files of {', '.join(SUFFIXES)}")
    return inside


def saved_kind(path: Path) -> str:
    """Whether datasets' save_to_disk wrote a folder: "Dataset" or "DatasetDict", or ""."""
    if (path / "dataset_dict.json").is_file():
        return "DatasetDict"
    return "Dataset" if all((path / name).is_file() for name in SAVED) else ""


def data_files(path: Path) -> list[Path]:
    """The file itself, or what a folder holds of known files, by name; hidden ones aside."""
    if not path.is_dir():
        return [path]
    if saved_kind(path):
        return sorted(file for file in path.rglob("*") if file.suffix in (".arrow", ".json"))
    _refuse_parts_of_saved(path)
    return [
        file
        for file in sorted(path.rglob("*"))
        if _suffix(file) in SUFFIXES and file.is_file() and not file.name.startswith((".", *ABOUT))
    ]


def _refuse_parts_of_saved(path: Path) -> None:
    """Raise DataError for what is a part of what save_to_disk wrote, or holds several: its .json files tell of rows and are none."""
    saved = sorted(
        str(folder.relative_to(path)) for folder in path.rglob("*") if folder.is_dir() and saved_kind(folder)
    )
    if saved:
        raise DataError(
            f"{path}: holds data sets written by save_to_disk ({short(', '.join(saved))}); name one of them as a source: {path / saved[0]}"
        )
    if any(path.rglob("*.arrow")) and any(file.name in SAVED for file in path.rglob("*.json")):
        missing = [name for name in SAVED if not (path / name).is_file()]
        raise DataError(
            f"{path}: is a part of a data set written by save_to_disk; it lacks {' and '.join(missing)}: save it again, or give its rows "
            "as Parquet or JSON lines"
        )


def _suffix(file: Path) -> str:
    """.jsonl, for rows.jsonl and rows.JSONL.gz."""
    return Path(file.stem if file.suffix == ".gz" else file.name).suffix.lower()


def _from_file(file: Path, name: str, source: Source) -> Numbered:
    suffix = _suffix(file)
    try:
        if suffix in LOADERS:
            yield from _from_datasets(LOADERS[suffix], file, source)
        elif suffix in DELIMITERS:
            yield from _from_csv(file, name, DELIMITERS[suffix])
        elif suffix in JSON_SUFFIXES:
            yield from _from_json(file, name, whole=suffix == ".json")
        else:
            folder = "; the folder that save_to_disk wrote is read as a whole: name that" if suffix == ".arrow" else ""
            known = ", ".join(SUFFIXES)
            raise DataError(
                f"{name}: no format is known by the suffix {short(repr(suffix))}; there are {known}{folder}"
            )
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{name}: cannot be read: {getattr(error, 'strerror', None) or error}") from error


def _from_hub(name: str, source: Source) -> Iterator[Mapping[str, Any]]:
    from datasets import load_dataset

    split = source.split or "train"
    remedy = "check its name, configuration and split, and the network, or give data.*.source a local file"
    with reaching_hub(DataError, f"{name}: could not be loaded from the hub", remedy):
        loaded = load_dataset(name, source.name, split=split, revision=source.revision, streaming=source.streaming)
        yield from _meant(loaded)


def _from_saved(folder: Path, name: str, kind: str, source: Source) -> Iterator[Mapping[str, Any]]:
    """The rows of a data set that was written by save_to_disk; of several, the one that data.*.split names."""
    from datasets import load_from_disk

    where = f"{name}: a {kind} written by save_to_disk"
    chosen = folder
    if kind == "DatasetDict":
        splits = _splits(folder / "dataset_dict.json", where)
        wanted = source.split or (splits[0] if len(splits) == 1 else None)
        if wanted is None:
            raise DataError(f"{where} holds the splits {' and '.join(splits)}; name one: data.*.split={splits[0]}")
        if wanted not in splits:
            raise DataError(f"{where} has no split {short(repr(wanted))}; there are {' and '.join(splits)}")
        chosen = folder / wanted
    elif source.split is not None:
        raise DataError(
            f"{where} is one data set, with no splits in it: leave data.*.split out, or take a part with data.*.rows"
        )
    try:
        yield from _meant(load_from_disk(str(chosen)))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:  # its files may hold anything
        raise DataError(f"{where} cannot be read: {_one_line(error)}") from error


def _splits(file: Path, where: str) -> list[str]:
    """The names of the sets in a folder that save_to_disk wrote."""
    try:
        listed = decode(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(
            f"{where} cannot be read: its {file.name} is damaged ({_one_line(error)}); save it again"
        ) from None
    splits = listed.get("splits") if isinstance(listed, dict) else None
    if not isinstance(splits, list) or not splits or not all(isinstance(name, str) for name in splits):
        raise DataError(
            f"{where} cannot be read: its {file.name} names no splits: {short(repr(listed))}; save it again"
        )
    return splits


def _from_datasets(kind: str, file: Path, source: Source) -> Numbered:
    """A local file, streamed: nothing of it is copied to a cache, and a slice reads no further than it goes."""
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    options = {"sample_by": source.sample_by, "encoding": "utf-8-sig"} if kind == "text" else {}
    try:
        rows = load_dataset(kind, data_files=glob.escape(str(file)), split="train", streaming=True, **options)
        yield from enumerate(_meant(rows), start=1)
    except (DatasetsError, ValueError) as error:
        raise DataError(f"{file}: cannot be read as {kind}: {_one_line(error.__cause__ or error)}") from error


def _meant(rows: Any) -> Iterator[Mapping[str, Any]]:
    """The rows of a data set, with what came out of structs told apart from what was JSON."""
    features = getattr(rows, "features", None)
    if features is not None and (raw := _undecoded(features)) != features:
        streamed = (
            rows.to_iterable_dataset() if hasattr(rows, "to_iterable_dataset") else rows
        )  # else a copy is written
        rows, features = streamed.cast(type(features)(raw)), raw
    for row in rows:
        yield {name: _typed(value, (features or {}).get(name), features is None) for name, value in row.items()}


def _undecoded(feature: Any) -> Any:
    """A type in which JSON stays the text that it is: datasets reads it with pandas' ujson, to which 1234567890123456789012 is
    17082781258626382356 (pandas 3.1)."""
    from datasets import Json, LargeList, List

    if isinstance(feature, Json):
        return Json(decode=False)
    if isinstance(feature, dict):
        return {name: _undecoded(inner) for name, inner in feature.items()}
    if isinstance(feature, List):
        return List(_undecoded(feature.feature), feature.length)
    return LargeList(_undecoded(feature.feature)) if isinstance(feature, LargeList) else feature


def _typed(value: Any, feature: Any, unknown: bool) -> Any:
    """A value by its type in the table; `unknown`: nobody says, so that every object may have come out of a struct."""
    if isinstance(value, list):
        inner = feature[0] if isinstance(feature, list) and feature else getattr(feature, "feature", None)
        if not getattr(inner, "dtype", "float").startswith("float"):
            return value  # token ids and their like: nothing in them can be of another kind
        return [_typed(item, inner, unknown) for item in value] if inner is not None or unknown else value
    if isinstance(value, dict) and (unknown or isinstance(feature, dict)):
        inside = feature if isinstance(feature, dict) else {}
        return Struct({key: _typed(item, inside.get(key), unknown) for key, item in value.items()})
    if getattr(feature, "decode", True) is False and isinstance(value, str):
        return decode(value)
    if isinstance(value, float) and abs(value) >= 2**63 and value.is_integer():
        return Rounded(value)
    return value


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]


def _from_csv(file: Path, name: str, delimiter: str) -> Numbered:
    """Records after the header; fields stay text."""
    csv.field_size_limit(sys.maxsize)  # the default of 128 KiB is less than a long document
    with _opened(file) as raw:
        lines = (line.decode("utf-8-sig" if number == 0 else "utf-8") for number, line in enumerate(raw))
        rows = csv.reader(lines, delimiter=delimiter, strict=True)
        try:
            header = next(rows, [])
            if len(set(header)) < len(header):
                raise DataError(f"{name}:1: the header names a column twice: {short(', '.join(header))}")
            yield from enumerate(_records(rows, header), start=1)
        except UnicodeDecodeError as error:
            raise DataError(f"{name}:{rows.line_num + 1}: {_not_utf8(error)}; save the file as UTF-8") from None
        except csv.Error as error:
            raise DataError(f"{name}: {error} at line {rows.line_num}: a quote is not closed") from None


def _records(rows: Iterator[list[str]], header: list[str]) -> Iterator[Mapping[str, Any] | str]:
    """Fields by the names in the header; the reader goes on after a line that it cannot take apart."""
    while True:
        try:
            fields = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            if "unexpected end" in str(error):
                raise
            yield f"cannot be taken apart: {error}"
            continue
        if len(fields) == len(header):
            yield dict(zip(header, fields, strict=True))
        elif fields:
            yield f"has {len(fields)} fields, the header {len(header)}"


def _opened(file: Path) -> BinaryIO:
    return cast(BinaryIO, gzip.open(file)) if file.suffix == ".gz" else file.open("rb")


def _from_json(file: Path, name: str, whole: bool) -> Numbered:
    """JSON lines, one JSON array, or, where `whole`, one object that holds the rows."""
    with _opened(file) as lines:
        first, begins = _first_line(lines, name)
        text = first.strip()
        if text.startswith(b"[") or (whole and text.startswith(b"{")):
            rest = lines.read()
            if rest.strip() and _complete(text):
                yield from _lines(iter([first, *rest.splitlines(keepends=True)]), begins)
            else:
                yield from _document(_decoded(first + rest, name), name, begins)
        elif first:
            yield from _lines(_and_then(first, lines), begins)


def _first_line(lines: BinaryIO, name: str) -> tuple[bytes, int]:
    """The first line that is not blank, without its byte order mark, and its number."""
    number, line = 1, lines.readline()
    if line.startswith(UTF16):
        raise DataError(f"{name}: is UTF-16; save the file as UTF-8")
    line = line.removeprefix(b"\xef\xbb\xbf")
    while line and not line.strip():
        number, line = number + 1, lines.readline()
    return line, number


def _and_then(first: bytes, lines: BinaryIO) -> Iterator[bytes]:
    yield first
    yield from lines


def _complete(line: bytes) -> bool:
    """Whether a line is a JSON value of its own: the file is JSON lines then, whatever it is called."""
    try:
        decode(line.decode())
    except Twice:  # that is said of the line
        return True
    except (ValueError, RecursionError):
        return False
    return True


def _decoded(raw: bytes, name: str) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise DataError(f"{name}: {_not_utf8(error)}; save the file as UTF-8") from None


def _not_utf8(error: UnicodeDecodeError) -> str:
    return f"not UTF-8: byte {error.object[error.start]:#04x} at offset {error.start}"


def _lines(lines: Iterator[bytes], start: int) -> Numbered:
    for number, raw in enumerate(lines, start=start):
        if raw.strip():
            yield number, _object(raw)


def _object(raw: bytes) -> Mapping[str, Any] | str:
    """The record in a line, or why there is none."""
    try:
        text = raw.decode()
        value = decode(text)
    except UnicodeDecodeError as error:
        return f"{_not_utf8(error)}: {raw.strip()[:SHOWN]!r}"
    except (ValueError, RecursionError) as error:
        return f"{_why(error)}: {text.strip()[:SHOWN]!r}"
    return value if isinstance(value, dict) else _no_object(text)


def _no_object(text: str) -> str:
    return f"is not a JSON object: {text.strip()[:SHOWN]!r}"


def _why(error: ValueError | RecursionError) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"not JSON: {error.msg} at column {error.colno}"
    if isinstance(error, Twice):
        return f"{error}: keep one of both"
    return f"not JSON: {'nested too deeply' if isinstance(error, RecursionError) else error}"


def _document(text: str, name: str, begins: int) -> Numbered:
    """The elements of an array, counted from 1, read one by one; or the rows that an object holds."""
    start = _next(text, 0)
    if text.startswith("[", start):
        yield from _elements(text, start + 1, name, begins)
    else:
        value, end = _decode_at(text, start, name, begins)
        _check_end(text, end, name, begins)
        yield from enumerate(_rows_in(value), start=1)


def _rows_in(value: dict[str, Any]) -> list[Any]:
    """The one list of objects in {"data": [...], "version": 1}; an object that has none, or has turns, is a row itself."""
    lists = [item for item in value.values() if isinstance(item, list)]
    if len(lists) != 1 or not lists[0] or not all(isinstance(item, dict) for item in lists[0]):
        return [value]
    return [value] if {"role", "from"} & lists[0][0].keys() else lists[0]


def _elements(text: str, at: int, name: str, begins: int) -> Numbered:
    number, end = 0, _next(text, at)
    closed = text.startswith("]", end)
    while not closed:
        number += 1
        value, end = _decode_at(text, at, name, begins, number)
        yield number, value if isinstance(value, dict) else _no_object(text[at:end])
        end = _next(text, end)
        closed, at = text.startswith("]", end), end + 1
        if not closed and not text.startswith(",", end):
            line = _line(text, end, begins)
            raise DataError(
                f"{name}:{line}: not JSON: a comma or the end of the array is missing after element {number}"
            )
    _check_end(text, end + 1, name, begins)


def _decode_at(text: str, at: int, name: str, begins: int, element: int | None = None) -> tuple[Any, int]:
    """The JSON value that begins at a place of a text, and where it ends."""
    start = _next(text, at)
    try:
        return DECODER.raw_decode(text, start)
    except (ValueError, RecursionError) as error:
        line = _line(text, error.pos if isinstance(error, json.JSONDecodeError) else start, begins)
        where = f"in element {element}: " if element else ""
        raise DataError(f"{name}:{line}: {_why(error)}: {where}{text[start : start + SHOWN]!r}") from None


def _check_end(text: str, at: int, name: str, begins: int) -> None:
    end = _next(text, at)
    if end < len(text):
        raise DataError(
            f"{name}:{_line(text, end, begins)}: not JSON: there is more after its end: {text[end : end + SHOWN]!r}"
        )


def _next(text: str, at: int) -> int:
    """Where white space ends."""
    return WHITE.match(text, at).end()  # type: ignore[union-attr]  # it matches nothing, too


def _line(text: str, at: int, begins: int) -> int:
    return begins + text.count("\n", 0, at)
