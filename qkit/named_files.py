"""The files on this machine that a recipe names: rows, their answers, a chat template. What was made of them is out of date once they change.

Hub ids and pypi: sources are left out: they are known by their name.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from qkit import template
from qkit.recipe import Recipe
from qkit.rows import data_files
from qkit.source import is_there
from qkit.splits import SPLITS


def named_files(how: Recipe) -> dict[Path, list[Path]]:
    """By each file or folder that is named, the files that are read there; what is not there, or empty, is left out."""
    found = {path.resolve(): data_files(path.resolve()) for path in map(_path, _texts(how)) if is_there(path)}
    return {named: files for named, files in found.items() if files}


def _texts(how: Recipe) -> Iterator[str]:
    for source in (source for split in SPLITS for source in getattr(how.data, split)):
        yield from filter(None, (source.source, source.answers))
    if how.model.chat_template and how.model.chat_template not in template.named():
        yield how.model.chat_template


def _path(text: str) -> Path:
    return Path(text).expanduser()
