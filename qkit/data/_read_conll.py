"""Records from CoNLL files: a sentence is a record with the columns `tokens` and `tags`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from qkit.core.errors import DataError
from qkit.data.read_json import Numbered, not_utf8, open_text
from qkit.recipe.schema import Source
from qkit.tasks._encoder.tagging.conll import BadSentence, Columns, read_sentences

UTF16 = (b"\xff\xfe", b"\xfe\xff")


def from_conll(file: Path, name: str, source: Source) -> Numbered:
    """Each sentence by the line of its first word; by its first wrong line if it cannot be read.

    Raises:
        DataError: the file is not UTF-8.
    """
    with open_text(file) as raw:
        for sentence in read_sentences(_lines(raw, name), Columns(source.word_column, source.tag_column)):
            if isinstance(sentence, BadSentence):
                yield sentence.line, sentence.reason
            else:
                yield sentence.line, {"tokens": list(sentence.words), "tags": list(sentence.tags)}


def _lines(raw: BinaryIO, name: str) -> Iterator[str]:
    for number, line in enumerate(raw, 1):
        if number == 1 and line.startswith(UTF16):
            raise DataError(f"{name}: the file is UTF-16; save it as UTF-8")
        try:
            yield line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"{name}:{number}: {not_utf8(error)}; save the file as UTF-8") from None
