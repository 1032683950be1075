"""What `qkit inspect` shows: the output of the data stage, cached and without a run, and single rows token by token."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qkit import __version__
from qkit.chat import template
from qkit.core.batching import IGNORED
from qkit.core.errors import DataError
from qkit.core.files import read_json
from qkit.core.progress import Progress
from qkit.core.sources import HubId, cache_dir, locate
from qkit.data import stage as data_stage
from qkit.model import source as model_source
from qkit.plugins.task import Task, open_task, read_labels
from qkit.recipe.load import from_dict
from qkit.recipe.schema import SPLITS, Recipe
from qkit.run.directory import Run
from qkit.run.source_files import named_files

KEPT = 8  # inspections in the cache; older ones go
WORST = 5  # rows of each kind that are shown
PARTIAL = "\N{REPLACEMENT CHARACTER}"  # what part of a character decodes to
LONGEST_CHARACTER = 4  # bytes of UTF-8, and so tokens


@dataclass(frozen=True)
class Inspection:
    """What was found: `summary` is summary.json, `folder` holds the tokenized rows and the ledger."""

    recipe: Recipe
    folder: Path
    summary: Mapping[str, Any]

    @property
    def labels(self) -> tuple[str, ...]:
        """The names of the labels; () for a task without."""
        return read_labels(self.folder)


@dataclass(frozen=True)
class RowView:
    """One row, token by token. `texts`: what each token reads as (a character split over several is with the first of them).

    `loss_mask`: 1 where a token carries loss; `special`: 1 where it is a special token. `names`: the labels of the whole text. `titles`: what
    begins at a token, by its place, where a row has several parts.
    """

    split: str
    row: int
    place: str
    input_ids: tuple[int, ...]
    texts: tuple[str, ...]
    loss_mask: tuple[int, ...]
    special: tuple[int, ...]
    names: tuple[str, ...] = ()
    titles: Mapping[int, str] = field(default_factory=dict)


def inspect(recipe: Recipe, progress: Progress) -> Inspection:
    """Read and look at all rows as the data stage would; what has not changed since the last time comes from the cache."""
    root = cache_dir() / "inspect"
    key = _key(recipe)
    folder = root / key if key else None
    if folder is None or not folder.exists():
        root.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=root, prefix=".made-"))
        try:
            data_stage.prepare(recipe, temporary, progress)
            folder = _placed(temporary, folder or root / "unpinned")
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        _forget(root)
    return Inspection(recipe, folder, read_json(folder / "summary.json"))


def recipe_for(model: str, source: str, format: str, overrides: Sequence[str]) -> Recipe:
    """A recipe with this model's tokenizer and template, and these rows."""
    raw = {"task": "chat", "model": {"source": model}, "data": {"train": [{"source": source, "format": format}]}}
    return from_dict(raw, overrides, "--model and --data")


def of_run(run: Run) -> Inspection:
    """What the data stage of a run has left."""
    return Inspection(run.recipe, run.folder("data"), read_json(run.need("data", "summary.json")))


def _placed(temporary: Path, folder: Path) -> Path:
    """Put a finished folder in its place; another process may have been faster."""
    if folder.name == "unpinned":
        shutil.rmtree(folder, ignore_errors=True)
    if not folder.exists():
        temporary.rename(folder)
    return folder


def _forget(root: Path) -> None:
    folders = sorted(root.glob("[!.]*"), key=lambda folder: folder.stat().st_mtime_ns, reverse=True)
    for folder in folders[KEPT:]:
        shutil.rmtree(folder, ignore_errors=True)


def _key(recipe: Recipe) -> str | None:
    """Hash of all that the result depends on; None when that cannot be known (a hub data set with no revision)."""
    sources = [source for split in SPLITS for source in getattr(recipe.data, split)]
    if any(isinstance(locate(source.source), HubId) and not source.revision for source in sources):
        return None
    dumped = recipe.model_dump(mode="json")
    what = {
        "version": __version__,
        "recipe": {name: dumped[name] for name in ("task", "seed", "model", "data")},
        "served": recipe.serve.max_model_len,
        "files": [_stamp(path) for path in _files(recipe)],
    }
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:24]


def _files(recipe: Recipe) -> Iterator[Path]:
    """Local files that rows, template and tokenizer come from."""
    yield from (file for files in named_files(recipe).values() for file in files)
    yield from sorted(file for file in model_source.companions(recipe.model).iterdir() if file.suffix != ".safetensors")


def _stamp(path: Path) -> list[str | int]:
    status = path.stat()
    return [str(path.resolve()), status.st_size, status.st_mtime_ns]


# --- one row ----------------------------------------------------------------------------------------------------------


def row(inspection: Inspection, split: str, number: int) -> RowView:
    """One row, token by token.

    Raises:
        DataError: the split or the row does not exist.
    """
    if split not in SPLITS:
        raise DataError(f"--split {split}: must be one of {', '.join(SPLITS)}")
    count = inspection.summary["splits"][split]["rows"]
    if not 0 <= number < count:
        raise DataError(f"--row {number}: the split {split} has {count} rows, numbered from 0")
    task = open_task(inspection.recipe.task)
    stored = _read_row(inspection.folder / f"{split}.parquet", number)
    return view(task, task.tokenizer(inspection.recipe), stored, split, number)


def view(task: Task, tokenizer: Any, stored: Mapping[str, Any], split: str, number: int) -> RowView:
    """A row of a split's parquet file with its tokens as text."""
    shown = task.shown(stored)
    ids = shown.input_ids
    special = frozenset(template.special_ids(tokenizer).values())
    return RowView(
        split=split,
        row=number,
        place=stored["place"],
        input_ids=tuple(ids),
        texts=tuple(token_texts(tokenizer, ids)),
        loss_mask=tuple(int(label != IGNORED) for label in shown.labels),
        special=tuple(int(token in special) for token in ids),
        names=tuple(stored.get("names") or ()),
        titles=shown.titles,
    )


def columns_shown(file: Any) -> list[str]:
    """The columns of an open Parquet file of rows that are needed to show one: whatever holds tokens, and its place and labels."""
    import pyarrow as pa

    fields = [
        (field.name, field.type.value_type if pa.types.is_list(field.type) else field.type)
        for field in file.schema_arrow
    ]
    return [name for name, kind in fields if name in ("place", "names", "labels") or kind == pa.int32()]


def _read_row(file: Path, number: int) -> Mapping[str, Any]:
    import pyarrow.parquet as pq

    with pq.ParquetFile(file) as opened:
        columns = columns_shown(opened)
        for group in range(opened.num_row_groups):
            rows = opened.metadata.row_group(group).num_rows
            if number < rows:
                stored: Mapping[str, Any] = opened.read_row_group(group, columns).slice(number, 1).to_pylist()[0]
                return stored
            number -= rows
    raise DataError(f"{file}: has no row {number}")


def token_texts(tokenizer: Any, ids: Sequence[int]) -> Iterator[str]:
    """What each token reads as. Tokens that hold parts of one character are read together; the first of them gets the text."""
    if type(tokenizer.backend_tokenizer.decoder).__name__ == "WordPiece":
        yield from _word_pieces(tokenizer.convert_ids_to_tokens(list(ids)))
        return
    held: list[int] = []
    for token in ids:
        held.append(token)
        text = tokenizer.decode(held)
        if text.endswith(PARTIAL) and len(held) < LONGEST_CHARACTER:
            continue
        yield text
        yield from [""] * (len(held) - 1)
        held = []
    if held:
        yield tokenizer.decode(held)
        yield from [""] * (len(held) - 1)


# --- losses -----------------------------------------------------------------------------------------------------------


def losses(run: Run) -> dict[str, list[dict[str, Any]]] | None:
    """The rows that did not learn, and those whose loss was suspiciously low before training; None when the run kept no losses."""
    import pyarrow.parquet as pq

    file = run.folder("train") / "losses.parquet"
    if not file.exists():
        return None
    rows = pq.read_table(file).to_pylist()
    places = pq.read_table(run.need("data", "train.parquet"), columns=["place"])["place"].to_pylist()
    for loss in rows:
        loss["place"] = places[loss["row"]]
    unlearnt = sorted(rows, key=lambda loss: loss["loss_before"] - loss["loss_after"])
    low = sorted(rows, key=lambda loss: loss["loss_before"])
    return {"did_not_learn": unlearnt[:WORST], "suspiciously_low": low[:WORST]}


def _word_pieces(pieces: Sequence[str]) -> Iterator[str]:
    """Pieces of words as text: a piece that begins a word has a space before it."""
    for place, piece in enumerate(pieces):
        yield piece.removeprefix("##") if piece.startswith("##") else f" {piece}" if place else piece
