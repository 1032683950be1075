"""The file of predictions: JSON lines or a table, written as they come, and continued after its last complete line."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from qkit.core.errors import UserError, listed

STDOUT = "-"
DELIMITERS = {".csv": ",", ".tsv": "\t"}
SUFFIXES = (".jsonl", *DELIMITERS)
LINE, ERROR = "line", "error"


def check_name(out: str) -> None:
    """Refuse an output of another kind.

    Raises:
        UserError: its suffix is not one of SUFFIXES.
    """
    if out != STDOUT and Path(out).suffix not in SUFFIXES:
        raise UserError(f"--out {out}: must end in {', '.join(SUFFIXES)}, or be - for JSON lines on standard output")


def kept_names(columns: Sequence[str], answers: Collection[str], out: str) -> dict[str, str]:
    """Under which name each kept column is written: its own, or `input.NAME` where a line has that name already. `answers`: keys of answers.

    In a table, an answer's key may be several columns, KEY.NAME.

    Raises:
        UserError: two columns would have one name.
    """
    taken, is_table = {LINE, ERROR, *answers}, Path(out).suffix in DELIMITERS
    clashes = {name for name in columns if name in taken or (is_table and name.partition(".")[0] in taken)}
    kept = {name: f"input.{name}" if name in clashes else name for name in columns}
    twice = {name for name in clashes if kept[name] in columns}
    if twice:
        raise UserError(
            f"--keep {listed(twice)}: is written as input.NAME, which is kept too; rename one of the columns"
        )
    return kept


class Sink:
    """Writes one line for each record. `done`: complete lines of an earlier attempt; `last`: the record's line that the last one names."""

    def __init__(self, out: str, overwrite: bool = False):
        """Open `out`, or standard output for "-". A line that an earlier attempt did not complete is cut off.

        Raises:
            UserError: the file has another suffix, or holds something else.
        """
        self.name = out
        self.delimiter = DELIMITERS.get(Path(out).suffix)
        self.done, self.last, self.header = 0, 0, list[str]()
        self.held: list[Mapping[str, Any]] = []  # lines of a table before its first line without an error
        self.only_errors = True
        if out == STDOUT:
            self.file: IO[str] = sys.stdout
            return
        check_name(out)
        path = Path(out)
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and not overwrite:
            self._continue(path)
        self.file = path.open("a" if path.exists() and not overwrite else "w", encoding="utf-8", newline="")

    def _continue(self, path: Path) -> None:
        """Read what an earlier attempt wrote, and cut off its last line if that is not complete."""
        size, parsed = 0, None
        for size, parsed in self._complete(path):  # noqa: B007 (the last one counts)
            self.done += 1
            if parsed is not None:
                self._hold(parsed)
        if self.delimiter and self.done:
            self.done -= 1  # the header
        if self.done and parsed is not None:
            self.last = int(parsed[LINE])
        if self.only_errors:
            self.header = []  # what an answer has is not in it: the first answer begins the table anew
        with path.open("r+b") as file:
            file.truncate(size)

    def _hold(self, parsed: Mapping[str, Any]) -> None:
        """Keep the lines of a table as long as all of them are errors."""
        self.only_errors = self.only_errors and bool(self.delimiter and parsed.get(ERROR))
        if self.only_errors:
            self.held.append(parsed)
        else:
            self.held.clear()

    def _complete(self, path: Path) -> Iterator[tuple[int, Mapping[str, Any] | None]]:
        """The end of each complete line in bytes, and the line; None for the header of a table."""
        with path.open("rb") as file:
            end, held = 0, b""
            for raw in file:
                held += raw
                if not held.endswith(b"\n") or (self.delimiter and held.count(b'"') % 2):
                    continue  # a quoted field goes on
                end, text, held = end + len(held), held.decode(), b""
                yield end, self._parsed(path, text)

    def _parsed(self, path: Path, text: str) -> Mapping[str, Any] | None:
        try:
            if not self.delimiter:
                parsed: Mapping[str, Any] = json.loads(text)
                return {LINE: int(parsed[LINE])}
            fields = next(csv.reader(io.StringIO(text, newline=""), delimiter=self.delimiter))
            if not self.header:
                self.header = fields
                self.header.index(LINE)
                return None
            return {**dict(zip(self.header, fields, strict=True)), LINE: int(fields[self.header.index(LINE)])}
        except (ValueError, KeyError, TypeError, IndexError):
            raise UserError(
                f"{path}: it exists, and holds no predictions; name another file, or set --overwrite"
            ) from None

    def write(self, line: int, kept: Mapping[str, Any], answer: Mapping[str, Any]) -> None:
        """Write the answer to a record, or `{"error": why there is none}`. `line`: of the record; `kept`: values of its columns.

        Raises:
            UserError: a table has no column for one of them.
        """
        entry = {LINE: line, **kept, **answer}
        if not self.delimiter:
            self.file.write(json.dumps(entry, ensure_ascii=False, default=str) + "\n")
        elif self.header:
            self._row(entry)
        else:
            self.held.append(entry)
            if ERROR not in answer:
                self._begin_table()

    def _begin_table(self) -> None:
        """Write the header, of all that the held lines have, and these lines. The last one has an answer, where any has."""
        fields = [name for each in (self.held[-1], *self.held) for name in _flat(each) if name != ERROR]
        self.header = [*dict.fromkeys(fields), ERROR]
        self.file.seek(0)
        self.file.truncate()  # lines of an earlier attempt are held too
        csv.writer(self.file, delimiter=self.delimiter or ",", lineterminator="\n").writerow(self.header)
        held, self.held = self.held, []
        for each in held:
            self._row(each)

    def _row(self, entry: Mapping[str, Any]) -> None:
        flat = _flat(entry)
        beyond = [name for name, value in flat.items() if name not in self.header and value is not None]
        if beyond:
            raise UserError(
                f"{self.name}: record {entry[LINE]} has {listed(beyond)}, for which the table has no column; write JSON lines "
                "(--out FILE.jsonl)"
            )
        fields = [_field(flat.get(name)) for name in self.header]
        csv.writer(self.file, delimiter=self.delimiter or ",", lineterminator="\n").writerow(fields)

    def flush(self) -> None:
        """Hand everything to the operating system: a line that is there stays there."""
        self.file.flush()

    def close(self) -> None:
        """Write what is held, and close the file."""
        if self.held:
            self._begin_table()
        self.flush()
        if self.file is not sys.stdout:
            self.file.close()


def _flat(entry: Mapping[str, Any]) -> dict[str, Any]:
    """The entry of a table: an object becomes a column for each of its keys, in the order of the alphabet."""
    flat: dict[str, Any] = {}
    for name, value in entry.items():
        inner: Sequence[tuple[str, Any]] = sorted(value.items()) if isinstance(value, Mapping) else ()
        flat |= {f"{name}.{key}": each for key, each in inner} if isinstance(value, Mapping) else {name: value}
    return flat


def _field(value: Any) -> Any:
    return json.dumps(value, ensure_ascii=False, default=str) if isinstance(value, list | dict) else value
