"""Records from JSON files: lines, arrays and objects of rows, read as they come."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, cast

from qkit.core.errors import DataError
from qkit.core.strict_json import DECODER, Twice, decode

UTF16 = (b"\xff\xfe", b"\xfe\xff")
SHOWN = 60  # characters of a broken line
WHITE = re.compile(r"[ \t\r\n]*")


Numbered = Iterator[tuple[int, Mapping[str, Any] | str]]  # the line, and its record or the reason why it has none


def open_text(file: Path) -> BinaryIO:
    return cast(BinaryIO, gzip.open(file)) if file.suffix == ".gz" else file.open("rb")


def from_json(file: Path, name: str, whole: bool) -> Numbered:
    """JSON lines, one JSON array, or, where `whole`, one object that holds the rows."""
    with open_text(file) as lines:
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


def json_lines(stream: BinaryIO, name: str) -> Numbered:
    """JSON lines of an open stream, as they come."""
    first, begins = _first_line(stream, name)
    if first:
        yield from _lines(_and_then(first, stream), begins)


def text_lines(stream: BinaryIO) -> Numbered:
    """The lines of an open stream as records with a `text`, as they come."""
    for number, raw in enumerate(stream, start=1):
        try:
            yield number, {"text": raw.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")}
        except UnicodeDecodeError as error:
            yield number, not_utf8(error)


def _first_line(lines: BinaryIO, name: str) -> tuple[bytes, int]:
    """The first line that is not blank, without its byte order mark, and its number."""
    number, line = 1, lines.readline()
    if line.startswith(UTF16):
        raise DataError(f"{name}: the file is UTF-16; save it as UTF-8")
    line = line.removeprefix(b"\xef\xbb\xbf")
    while line and not line.strip():
        number, line = number + 1, lines.readline()
    return line, number


def _and_then(first: bytes, lines: BinaryIO) -> Iterator[bytes]:
    yield first
    yield from lines


def _complete(line: bytes) -> bool:
    """Whether a line is a complete JSON value: then the file is JSON lines, whatever its suffix."""
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
        raise DataError(f"{name}: {not_utf8(error)}; save the file as UTF-8") from None


def not_utf8(error: UnicodeDecodeError) -> str:
    return f"invalid UTF-8: byte {error.object[error.start]:#04x} at offset {error.start}"


def _lines(lines: Iterator[bytes], start: int) -> Numbered:
    for number, raw in enumerate(lines, start=start):
        if raw.strip():
            yield number, _object(raw)


def _object(raw: bytes) -> Mapping[str, Any] | str:
    """The record of a line, or the reason why it has none."""
    try:
        text = raw.decode()
        value = decode(text)
    except UnicodeDecodeError as error:
        return f"{not_utf8(error)}: {raw.strip()[:SHOWN]!r}"
    except (ValueError, RecursionError) as error:
        return f"{_why(error)}: {text.strip()[:SHOWN]!r}"
    return value if isinstance(value, dict) else _no_object(text)


def _no_object(text: str) -> str:
    return f"is not a JSON object: {text.strip()[:SHOWN]!r}"


def _why(error: ValueError | RecursionError) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"invalid JSON: {error.msg} at column {error.colno}"
    if isinstance(error, Twice):
        return f"{error}: keep only one of them"
    return f"invalid JSON: {'nested too deeply' if isinstance(error, RecursionError) else error}"


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
    """The single list of objects in {"data": [...], "version": 1}. An object without one, or with a list of turns, is itself a row."""
    lists = [item for item in value.values() if isinstance(item, list)]
    if len(lists) != 1 or not lists[0] or not all(isinstance(item, dict) for item in lists[0]):
        return [value]
    return [value] if {"role", "from"} & lists[0][0].keys() else lists[0]


# A scanner of our own: ijson reports a byte offset at best, not the line and the element of the fault, accepts duplicate keys, and takes its
# own number types, so strict_json.DECODER could not be used.
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
                f"{name}:{line}: invalid JSON: a comma or the end of the array is missing after element {number}"
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
            f"{name}:{_line(text, end, begins)}: invalid JSON: unexpected text after the end: {text[end : end + SHOWN]!r}"
        )


def _next(text: str, at: int) -> int:
    """The position where white space ends."""
    return WHITE.match(text, at).end()  # type: ignore[union-attr]  # it matches nothing, too


def _line(text: str, at: int, begins: int) -> int:
    return begins + text.count("\n", 0, at)
