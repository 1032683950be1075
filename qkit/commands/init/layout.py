"""What kind of file a data file is: the settings of its entry in data.train, each with its reason."""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from pathlib import Path

from qkit.core.errors import DataError, short
from qkit.data.read_json import UTF16, open_text
from qkit.plugins.first_recipe import Chosen
from qkit.recipe.idle import CONLL_SUFFIXES, TEXT
from qkit.run.source_files import DELIMITERS, SUFFIXES, suffix_of

HEAD = 1 << 20  # bytes of a file that tell its layout
LINES = 200
SIGNS = (",", ";", "\t", "|")
NAMES = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
ALIKE = 0.9  # the share of lines that have as many columns, in a table; or a tag at their end, in a CoNLL file
TAG = re.compile(r"O|[BIESLU]-\S+")
MOST_WORDS, MOST_LETTERS = 6, 50  # in the name of a column
ENOUGH = 3  # texts, from which on blank lines or lines separate them
BINARY = (".parquet",)


def layout(file: Path) -> dict[str, Chosen]:
    """The settings that a file needs in data.train beside its name.

    Raises:
        DataError: the file is empty, binary, of an unknown kind, or a table without a header.
    """
    suffix = suffix_of(file)
    if file.stat().st_size == 0:
        raise DataError(
            f"{file}: the file is empty; it must hold examples, such as lines of JSON, or a table with a header"
        )
    if suffix in BINARY:
        return {}
    lines = _head(file)
    if not any(line.strip() for line in lines):
        raise DataError(f"{file}: the file has only blank lines; it must hold examples")
    if suffix not in CONLL_SUFFIXES and suffix not in (".json", ".jsonl", ".ndjson") and _is_conll(lines):
        return {"format": ("conll", "a word and its tag on each line, blank lines between sentences")}
    if suffix not in SUFFIXES:
        named = repr(suffix) if suffix else "without a suffix"
        raise DataError(
            f"{file}: unknown kind of file {short(named)}; qkit reads {', '.join(SUFFIXES)}: rename or convert it"
        )
    if suffix in DELIMITERS:
        return _table(file, lines, DELIMITERS[suffix])
    return _text(lines) if suffix in TEXT else {}


def _head(file: Path) -> list[str]:
    """The first lines of a file, as text.

    Raises:
        DataError: it is binary, UTF-16, or a damaged archive.
    """
    try:
        with open_text(file) as raw:
            head = raw.read(HEAD)
    except (OSError, EOFError) as error:
        raise DataError(f"{file}: cannot be read: {error}") from None
    if head.startswith(UTF16):
        raise DataError(f"{file}: the file is UTF-16; save it as UTF-8")
    if b"\0" in head:
        raise DataError(f"{file}: a binary file, not text; qkit reads {', '.join(SUFFIXES)}: convert it to one of them")
    return head.decode("utf-8-sig", "replace").splitlines()


def _is_conll(lines: Sequence[str]) -> bool:
    """Whether lines end with a tag of an entity, and blank lines part them."""
    rows = [line.split() for line in lines if line.strip() and not line.startswith(("#", "-DOCSTART-"))]
    tagged = [row for row in rows if len(row) > 1 and TAG.fullmatch(row[-1])]
    return len(tagged) >= max(ENOUGH, ALIKE * len(rows)) and any(row[-1] != "O" for row in tagged)


# --- tables -----------------------------------------------------------------------------------------------------------


def _table(file: Path, lines: Sequence[str], usual: str) -> dict[str, Chosen]:
    widths = {sign: _columns(lines, sign) for sign in dict.fromkeys((usual, *SIGNS))}
    sign = usual if widths[usual] > 1 else max(widths, key=lambda sign: widths[sign])
    rows = _rows(lines, sign)
    _need_header(file, rows)
    return {} if sign == usual else {"delimiter": (sign, f"columns are separated by {NAMES[sign]}")}


def _rows(lines: Sequence[str], sign: str) -> list[list[str]]:
    return [row for row in csv.reader((f"{line}\n" for line in lines[:LINES]), delimiter=sign) if row]


def _columns(lines: Sequence[str], sign: str) -> int:
    """How many columns a table has with this sign between them; 1 if its lines do not have as many as the first."""
    rows = _rows(lines, sign)
    alike = sum(len(row) == len(rows[0]) for row in rows)
    return len(rows[0]) if alike >= ALIKE * len(rows) else 1


def _need_header(file: Path, rows: Sequence[Sequence[str]]) -> None:
    """Raise DataError for a table whose first line looks like a row."""
    header, *rest = rows
    columns = [[row[place] for row in rest if place < len(row)] for place in range(len(header))]
    if not any(
        _is_value(name, column, place) for place, (name, column) in enumerate(zip(header, columns, strict=True))
    ):
        return
    example = ",".join(["text", "label", *(f"column{n}" for n in range(3, len(header) + 1))][: len(header)])
    shown = short(" | ".join(header), 100)
    raise DataError(
        f"{file}: the table has no header: its first line looks like a row ({shown}); put a line with the names of the columns before it, "
        f"such as {example}"
    )


def _is_value(name: str, column: Sequence[str], place: int) -> bool:
    """Whether what should be the name of a column reads like one of its values."""
    if not name.strip():
        return place > 0  # a first column without a name numbers the rows
    if len(name) > MOST_LETTERS or len(name.split()) > MOST_WORDS or re.fullmatch(r"[-+]?\d+(\.\d+)?", name.strip()):
        return True
    return name in column and len({*column}) < len(column)


# --- plain text -------------------------------------------------------------------------------------------------------


def _text(lines: Sequence[str]) -> dict[str, Chosen]:
    paragraphs = sum(
        bool(line.strip()) and (not place or not lines[place - 1].strip()) for place, line in enumerate(lines)
    )
    if paragraphs >= ENOUGH:
        return {"sample_by": ("paragraph", "blank lines separate the texts")}
    if sum(bool(line.strip()) for line in lines) >= ENOUGH:
        return {"sample_by": ("line", "each line is a text")}
    return {"sample_by": ("document", "the file is one text")}
