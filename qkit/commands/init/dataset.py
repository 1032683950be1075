"""Opens what a user has, a file, a folder or a hub id, as a table of records and the sources of a recipe."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from qkit.commands.init.layout import layout
from qkit.core.errors import DataError, MissingExtra, listed, short
from qkit.core.files import read_json
from qkit.core.sources import HubId, locate
from qkit.data.read import Broken, read
from qkit.plugins.first_recipe import Chosen, Table, is_empty
from qkit.recipe.schema import SPLITS, Source
from qkit.run.source_files import SUFFIXES, data_files, saved_kind

LIMIT = 20_000  # records that are looked at
FIRST = 50  # records of held-out rows that are
NAMES = {  # what the files of a folder, and the splits of a data set, are called
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "eval"),
    "test": ("test",),
}


@dataclass(frozen=True)
class Dataset:
    """A data set: its records as a table, and its sources by split, with what they need in a recipe.

    `broken`: lines that are no record, with the reason; `is_whole`: whether all records were read, and not only the first ones.
    """

    name: str
    sources: Mapping[str, Mapping[str, Any]]
    reasons: Sequence[str]
    table: Table
    broken: Sequence[str]
    is_whole: bool

    @property
    def is_split(self) -> bool:
        """Whether it comes with rows that are held out."""
        return "test" in self.sources


def open_dataset(text: str) -> Dataset:
    """Read a data set, up to LIMIT records of its training rows.

    Raises:
        DataError: it is missing, empty, binary, of an unknown kind, or cannot be read; or a table has no header.
        MissingExtra: what reads it is not installed.
    """
    try:
        return _opened(text)
    except ModuleNotFoundError as error:
        raise MissingExtra(
            f"{text}: reading it needs {error.name}: pip install 'qkit[train]'", package=error.name
        ) from None


def _opened(text: str) -> Dataset:
    sources, chosen = _sources(text)
    settings = {name: value for name, (value, _) in chosen.items()}
    entries = {split: {**entry, **settings} for split, entry in sources.items()}
    train, records, broken = entries["train"], [], []
    for record in islice(read(Source(**train)), LIMIT + 1):
        if isinstance(record, Broken):
            broken.append(f"{record.place} {record.reason}")
        else:
            records.append(dict(record.value))
    if not records:
        first = f": {broken[0]}" if broken else ""
        raise DataError(f"{text}: has no records{short(first)}; it must hold examples")
    is_whole = len(records) + len(broken) <= LIMIT
    reasons = [f"{name}: {why}" for name, (_, why) in chosen.items()]
    table = Table(records[:LIMIT])
    held_out = _held_out(entries, table)
    kept = [entry["source"] for entry in held_out.values()]
    reasons += [
        f"{entry['source']} is not used: its rows lack what training rows have"
        for split, entry in entries.items()
        if split != "train" and entry["source"] not in kept
    ]
    return Dataset(text, {"train": train, **held_out}, reasons, table, broken, is_whole)


def _held_out(entries: Mapping[str, Mapping[str, Any]], table: Table) -> dict[str, Mapping[str, Any]]:
    """The held-out sources whose rows have what training rows have: the labels of a test set may be kept secret.

    Without a test set the validation rows take its place: the result is scored on data.test.
    """
    usable = {split: entry for split, entry in entries.items() if split != "train" and _has_all(entry, table)}
    return {"test": usable["validation"]} if [*usable] == ["validation"] else usable


def _has_all(entry: Mapping[str, Any], table: Table) -> bool:
    """Whether no column that training rows fill is empty in the first rows of a source."""
    rows = [record.value for record in islice(read(Source(**entry)), FIRST) if not isinstance(record, Broken)]
    wanted = [column.name for column in table.columns.values() if column.values and not column.empty]
    return bool(rows) and all(any(not is_empty(row.get(name)) for row in rows) for name in wanted)


def _sources(text: str) -> tuple[dict[str, dict[str, Any]], dict[str, Chosen]]:
    """The source of each split, and the settings that all of them need."""
    location = locate(text)
    if isinstance(location, HubId):
        return _on_the_hub(location.name), {}
    if kind := saved_kind(location):
        return (_saved(location, text) if kind == "DatasetDict" else {"train": {"source": text}}), {}
    if not location.is_dir():
        return {"train": {"source": text}}, layout(location)
    files = data_files(location)
    if not files:
        raise DataError(f"{text}: the folder has no data files; qkit reads {', '.join(SUFFIXES)}")
    by_split = _files_by_split({str(file.relative_to(location)): file.stem for file in files}, text)
    if by_split is None:
        return {"train": {"source": text}}, layout(files[0])
    sources = {split: {"source": str(Path(text) / name)} for split, name in by_split.items()}
    return sources, layout(location / by_split["train"])


def _files_by_split(stems: Mapping[str, str], text: str) -> dict[str, str] | None:
    """Split -> its file, by the words of the names; None if no name says that rows are held out. `stems`: by path in the folder `text`.

    Raises:
        DataError: a split has several files, or it is not clear which file is trained on.
    """
    words = {name: {word.lower() for word in re.split(r"[\W_]+", stem)} for name, stem in stems.items()}
    found = {split: sorted(name for name in words if words[name] & {*NAMES[split]}) for split in SPLITS}
    found = {split: files for split, files in found.items() if files}
    if not found.keys() - {"train"}:
        return None
    if "train" not in found:
        found["train"] = sorted(words.keys() - {name for files in found.values() for name in files})
    twice = [split for split, files in found.items() if len(files) != 1]
    if twice or len({files[0] for files in found.values()}) < len(found):
        counts = ", ".join(f"{split}: {listed(files) if files else 'none'}" for split, files in found.items())
        raise DataError(
            f"{text}: each split must be one file, by a name with train, validation or test in it ({counts}); put the files of a split "
            "together, or give `qkit init` a folder with the training files alone and name the others in the recipe"
        )
    return {split: files[0] for split, files in found.items()}


def _by_split(names: Mapping[str, str]) -> dict[str, str]:
    """Split -> the first file, or the first split of a data set, that is called so. `names`: by file."""
    found: dict[str, str] = {}
    for split in SPLITS:
        for called in NAMES[split]:
            match = next((file for file, name in names.items() if name.lower() == called), None)
            if match is not None:
                found.setdefault(split, match)
    return found


def _saved(folder: Path, text: str) -> dict[str, dict[str, Any]]:
    """The splits of a DatasetDict that save_to_disk wrote."""
    splits = read_json(folder / "dataset_dict.json").get("splits", [])
    by_split = _by_split({name: name for name in splits}) if splits else {}
    if "train" not in by_split:
        raise DataError(f"{text}: has no split train; it has {short(', '.join(splits))}")
    return {split: {"source": text, "split": name} for split, name in by_split.items()}


def _on_the_hub(name: str) -> dict[str, dict[str, Any]]:
    """The splits of a hub data set, of which an only configuration is taken.

    Raises:
        DataError: it cannot be reached, or has several configurations.
    """
    from datasets import get_dataset_config_names, get_dataset_split_names

    from qkit.core.network import reaching_hub

    remedy = "check its name and the network, or name a local file"
    with reaching_hub(DataError, f"{name}: could not be loaded from the hub", remedy):
        configs = get_dataset_config_names(name)
        config = "default" if "default" in configs or not configs else configs[0]
        splits = get_dataset_split_names(name, config) if len(configs) < 2 or config == "default" else []
    if not splits:
        raise DataError(
            f"{name}: has several configurations ({short(', '.join(configs))}); save one as a file, and name that"
        )
    by_split = _by_split({split: split for split in splits})
    called = {} if config == "default" else {"name": config}
    return {split: {"source": name, **called, "split": real} for split, real in by_split.items()} or {
        "train": {"source": name, **called, "split": splits[0]}
    }
