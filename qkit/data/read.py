"""Reads data sources: each record with its place, so that every later message can name it."""

from __future__ import annotations

import csv
import glob
import sys
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from qkit.core.errors import DataError, short
from qkit.core.network import reaching_hub
from qkit.core.sources import HubId, locate
from qkit.core.strict_json import Rounded, Struct, decode
from qkit.data._read_conll import from_conll
from qkit.data.read_json import from_json, json_lines, not_utf8, open_text, text_lines
from qkit.plugins.example import ANSWER_KEYS
from qkit.recipe import idle
from qkit.recipe.schema import Source
from qkit.run.source_files import (
    DELIMITERS,
    JSON_SUFFIXES,
    LOADERS,
    SUFFIXES,
    data_files,
    saved_kind,
    suffix_of,
)

if TYPE_CHECKING:
    from qkit.data.read_json import Numbered


@dataclass(frozen=True, slots=True)
class Record:
    """One record of a source, with its `accepted` answers. `unread`: names in the answers file that nothing reads.

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
            entry = answers.get(str(value["id"])) if answers and value.get("id") is not None else None
            accepted, unread = entry or (None, ())
            joined, missed = (
                joined + (entry is not None),
                missed or f"{name}:{line} has the id {short(value.get('id'))}",
            )
            yield Record(name, line, value, accepted, source.format, unread)

    if answers and missed and not joined:
        raise DataError(
            f"{source.answers}: contains no answer to any record: {missed}, the answers have ids such as {short(next(iter(answers)))}"
        )


def read_stream(stream: BinaryIO, name: str, suffix: str) -> Iterator[Record | Broken]:
    """The records of a stream as they come. `suffix`: what the name of a file with this content would end in.

    Raises:
        DataError: it cannot be read at all.
    """
    if suffix in DELIMITERS:
        numbered = csv_rows(stream, name, DELIMITERS[suffix])
    elif suffix == ".txt":
        numbered = text_lines(stream)
    else:
        numbered = json_lines(stream, name)
    for line, value in numbered:
        yield Broken(name, line, value) if isinstance(value, str) else Record(name, line, value)


def _answers(source: Source) -> dict[str, tuple[Any, tuple[str, ...]]]:
    """id, as text -> accepted answers, and the names of what else their record holds.

    Raises:
        DataError: a record cannot be read, an id has two different answers, or no record has an answer.
    """
    if source.answers is None:
        return {}
    by_id: dict[str, tuple[Any, tuple[str, ...]]] = {}
    columns: dict[str, None] = {}
    for name, line, value in _located(source, source.answers):
        if isinstance(value, str):
            raise DataError(f"{name}:{line}: {value}; data.*.answers must be readable completely")
        key = str(value.get("id"))
        unread = tuple(
            f"answers.{short(other)}" for other in value if other not in ANSWER_KEYS and value[other] is not None
        )
        accepted = value.get("ground_truth")
        if value.get("id") is not None and key in by_id and by_id[key][0] != accepted:
            raise DataError(
                f"{name}:{line}: the id {short(key)} appears twice, with different answers; keep only one of them"
            )
        by_id[key] = (accepted, unread)
        columns.update(dict.fromkeys(value))
    if by_id and all(accepted is None for accepted, _ in by_id.values()):
        names = short(", ".join(map(str, columns)))
        raise DataError(
            f"{source.answers}: contains no answers: it has the columns {names}; it must have id and ground_truth"
        )
    return by_id


def _located(source: Source, text: str) -> Iterator[tuple[str, int, Mapping[str, Any] | str]]:
    """(file, line, record) of a file, of every file in a folder, of a saved data set, or of one on the hub."""
    location = locate(text, sha256=source.sha256)
    if isinstance(location, HubId):
        for index, row in enumerate(_from_hub(location.name, source)):
            yield text, index, row
        return
    kind = saved_kind(location)
    if text == source.source:
        _check_settings(source, kind)
    if kind:
        for index, row in enumerate(_from_saved(location, text, kind, source)):
            yield text, index, row
        return
    for file in _files(location):
        name = text if file == location else str(file)
        for line, value in _from_file(file, name, source):
            yield name, line, value


def _check_settings(source: Source, kind: str) -> None:
    """Reject settings for hub data sets or packages where the source is a file or folder: they would have no effect."""
    allowed = {"sha256"} if source.source.startswith("pypi:") else {"split"} if kind else set()
    what = "a package's file" if "sha256" in allowed else "a saved data set" if kind else "a file or folder"
    idle = [name for name in ("name", "split", "revision", "sha256") if getattr(source, name) and name not in allowed]
    if idle:
        raise DataError(
            f"{source.source}: data.*.{idle[0]} does not apply to {what}; remove it (to use a part of the rows, set data.*.rows)"
        )


def _files(path: Path) -> list[Path]:
    inside = data_files(path)
    if not inside:
        raise DataError(f"{path}: the folder contains no data files; supported: {', '.join(SUFFIXES)}")
    return inside


def _from_file(file: Path, name: str, source: Source) -> Numbered:
    suffix = suffix_of(file)
    try:
        if source.format == "conll" or suffix in idle.CONLL_SUFFIXES:
            yield from from_conll(file, name, source)
        elif suffix in LOADERS:
            yield from _from_datasets(LOADERS[suffix], file, source)
        elif suffix in DELIMITERS:
            yield from _from_csv(file, name, source.delimiter or DELIMITERS[suffix])
        elif suffix in JSON_SUFFIXES:
            yield from from_json(file, name, whole=suffix == ".json")
        else:
            folder = "; for a data set that save_to_disk wrote, name its folder" if suffix == ".arrow" else ""
            known = ", ".join(SUFFIXES)
            raise DataError(f"{name}: unsupported file type {short(repr(suffix))}; supported: {known}{folder}")
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{name}: cannot be read: {getattr(error, 'strerror', None) or error}") from error


def _from_hub(name: str, source: Source) -> Iterator[Mapping[str, Any]]:
    from datasets import load_dataset

    split = source.split or "train"
    remedy = "check its name, configuration and split, and the network, or set data.*.source to a local file"
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
            raise DataError(f"{where} contains the splits {' and '.join(splits)}; choose one: data.*.split={splits[0]}")
        if wanted not in splits:
            raise DataError(f"{where} has no split {short(repr(wanted))}; there are {' and '.join(splits)}")
        chosen = folder / wanted
    elif source.split is not None:
        raise DataError(
            f"{where} is one data set without splits: remove data.*.split, or use a part of it with data.*.rows"
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
            f"{where} cannot be read: its {file.name} does not list splits: {short(repr(listed))}; save it again"
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
    """The rows of a data set, with objects from structs distinguished from objects from JSON."""
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
    """A value by its type in the table. `unknown`: the type is not known, so any object may come from a struct."""
    if isinstance(value, list):
        inner = feature[0] if isinstance(feature, list) and feature else getattr(feature, "feature", None)
        if names := getattr(inner, "names", None):
            return [_named(item, names) for item in value]
        if not getattr(inner, "dtype", "float").startswith("float"):
            return value  # token ids and their like: nothing in them can be of another kind
        return [_typed(item, inner, unknown) for item in value] if inner is not None or unknown else value
    if isinstance(value, dict) and (unknown or isinstance(feature, dict)):
        inside = feature if isinstance(feature, dict) else {}
        return Struct({key: _typed(item, inside.get(key), unknown) for key, item in value.items()})
    if names := getattr(feature, "names", None):
        return _named(value, names)
    if getattr(feature, "decode", True) is False and isinstance(value, str):
        return decode(value)
    if isinstance(value, float) and abs(value) >= 2**63 and value.is_integer():
        return Rounded(value)
    return value


def _named(value: Any, names: Sequence[str]) -> Any:
    """The name of an id of a ClassLabel; None for -1, which stands for a label that is kept secret."""
    if type(value) is not int or value >= len(names):
        return value
    return names[value] if value >= 0 else None


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]


def _from_csv(file: Path, name: str, delimiter: str) -> Numbered:
    """Records after the header; fields stay text."""
    with open_text(file) as raw:
        yield from csv_rows(raw, name, delimiter)


def csv_rows(raw: BinaryIO, name: str, delimiter: str) -> Numbered:
    """Records of an open table after its header, as they come; fields stay text."""
    csv.field_size_limit(sys.maxsize)  # the default of 128 KiB is less than a long document
    lines = (line.decode("utf-8-sig" if number == 0 else "utf-8") for number, line in enumerate(raw))
    rows = csv.reader(lines, delimiter=delimiter, strict=True)
    try:
        header = next(rows, [])
        if len(set(header)) < len(header):
            raise DataError(f"{name}:1: the header has a column twice: {short(', '.join(header))}")
        yield from enumerate(_records(rows, header), start=1)
    except UnicodeDecodeError as error:
        raise DataError(f"{name}:{rows.line_num + 1}: {not_utf8(error)}; save the file as UTF-8") from None
    except csv.Error as error:
        raise DataError(f"{name}: {error} at line {rows.line_num}: a quote is not closed") from None


def _records(rows: Iterator[list[str]], header: list[str]) -> Iterator[Mapping[str, Any] | str]:
    """Fields by the names in the header; the reader continues after a line that it cannot parse."""
    while True:
        try:
            fields = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            if "unexpected end" in str(error):
                raise
            yield f"cannot be parsed: {error}"
            continue
        if len(fields) == len(header):
            yield dict(zip(header, fields, strict=True))
        elif fields:
            yield f"has {len(fields)} fields, but the header has {len(header)}"
