"""The local files that a recipe names: rows, answers, a chat template. When they change, what was made from them is out of date.

Hub ids and pypi: sources are not included: their names identify them.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from qkit.core.errors import DataError, short
from qkit.core.sources import is_there
from qkit.recipe import chat_templates, idle
from qkit.recipe.schema import SPLITS, Recipe


def named_files(recipe: Recipe) -> dict[Path, list[Path]]:
    """For each named file or folder the files that are read there; missing or empty ones are omitted."""
    files_of = {path.resolve(): data_files(path.resolve()) for path in map(_path, _texts(recipe)) if is_there(path)}
    return {named: files for named, files in files_of.items() if files}


def _texts(recipe: Recipe) -> Iterator[str]:
    for source in (source for split in SPLITS for source in getattr(recipe.data, split)):
        yield from filter(None, (source.source, source.answers))
    if recipe.model.chat_template and recipe.model.chat_template not in chat_templates.named():
        yield recipe.model.chat_template


def _path(text: str) -> Path:
    return Path(text).expanduser()


# Suffix to loader of `datasets`. The rest we read ourselves: JSON to name the line that is broken, CSV to keep every field the text
# that it is ("007", "NA"), where type inference would make numbers and nothing of it.
LOADERS = {".parquet": "parquet", ".txt": "text", ".md": "text"}
DELIMITERS = {".csv": ",", ".tsv": "\t"}
JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
SUFFIXES = (*JSON_SUFFIXES, *DELIMITERS, *LOADERS, *idle.CONLL_SUFFIXES)
ABOUT = ("README", "LICENSE")  # files that describe a folder are not part of its data
SAVED = ("dataset_info.json", "state.json")  # next to the rows of a Dataset that save_to_disk wrote


def saved_kind(path: Path) -> str:
    """Whether datasets' save_to_disk wrote a folder: "Dataset" or "DatasetDict", or ""."""
    if (path / "dataset_dict.json").is_file():
        return "DatasetDict"
    return "Dataset" if all((path / name).is_file() for name in SAVED) else ""


def data_files(path: Path) -> list[Path]:
    """The file itself, or the supported files in a folder, sorted by name; hidden files are skipped."""
    if not path.is_dir():
        return [path]
    if saved_kind(path):
        return sorted(file for file in path.rglob("*") if file.suffix in (".arrow", ".json"))
    _refuse_parts_of_saved(path)
    return [
        file
        for file in sorted(path.rglob("*"))
        if suffix_of(file) in SUFFIXES and file.is_file() and not file.name.startswith((".", *ABOUT))
    ]


def _refuse_parts_of_saved(path: Path) -> None:
    """Raise DataError for a part of a saved data set, or a folder of several: their .json files are metadata, not rows."""
    saved = sorted(
        str(folder.relative_to(path)) for folder in path.rglob("*") if folder.is_dir() and saved_kind(folder)
    )
    if saved:
        raise DataError(
            f"{path}: contains data sets written by save_to_disk ({short(', '.join(saved))}); use one of them as the source: {path / saved[0]}"
        )
    if any(path.rglob("*.arrow")) and any(file.name in SAVED for file in path.rglob("*.json")):
        missing = [name for name in SAVED if not (path / name).is_file()]
        raise DataError(
            f"{path}: is part of a data set written by save_to_disk, but {' and '.join(missing)} is missing: save it again, or provide its "
            "rows as Parquet or JSON lines"
        )


def suffix_of(file: Path) -> str:
    """.jsonl, for rows.jsonl and rows.JSONL.gz."""
    return Path(file.stem if file.suffix == ".gz" else file.name).suffix.lower()
