"""Values of a recipe that are valid and that nothing would use, since another value has made them idle: whoever wrote them means something.

What a trial with `--set` makes idle (fewer steps, another format, 16 bit) is only said; the rest is a mistake.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qkit.core.sources import is_hub_id
from qkit.recipe import schedule

if TYPE_CHECKING:
    from qkit.recipe.schema import Data, Export, Merge, Model, Quantization, Recipe, Section, Serve, Source, Train

    Key = tuple[str | int, ...]
    Problems = Iterator[tuple[Key, str]]


FITTED = ("vllm-w4a16", "vllm-w8a8")  # the formats that export.method and its rows are for
FREE_TEXT = ("chat",)  # the tasks whose answers are text, of which a pattern may take a part
TEXT = (".txt", ".md")  # the files that sample_by divides
ONE_LINERS = (
    "messages",
    "sharegpt",
    "alpaca",
    "prompt_completion",
    "tokenized",
)  # formats of which too_long=split divides none


def remarks(how: Recipe) -> Problems:
    """(key, what is idle beside what): for the plan and for the stage that would have used it to say."""
    yield from _epochs(how.train)
    yield from _quantization(how.quantization)
    yield from _exporting(how.export)
    yield from _unread(how.data)
    if how.bench.sweep and _set(how.bench, "concurrency"):
        at_once = ", ".join(map(str, how.bench.concurrency))
        yield ("bench", "concurrency"), f"bench.concurrency=[{at_once}] is not looked at beside bench.sweep=true"


def mistakes(how: Recipe) -> Problems:
    """(key, what is idle, why, and what to do)."""
    yield from _steps(how.train)
    yield from _serving(how.serve)
    yield from _merging(how.merge)
    if how.evaluate.answer_pattern is not None and how.task not in FREE_TEXT:
        yield (
            ("evaluate", "answer_pattern"),
            f"evaluate.answer_pattern={how.evaluate.answer_pattern} is looked at for task={', '.join(FREE_TEXT)}, and task={how.task} "
            "compares calls: leave it out",
        )
    yield from _base(how.model)
    yield from _division(how.data)
    for name in ("train", "validation", "test"):
        for index, source in enumerate(getattr(how.data, name)):
            yield from _source(source, ("data", name, index))
    if len(how.data.train) == 1 and how.data.train[0].weight is not None:
        yield (
            ("data", "train", 0, "weight"),
            f"data.train.0.weight={how.data.train[0].weight:g} is a share against other sources, and there is one only: leave it out",
        )


def _set(section: Section, *names: str) -> list[str]:
    """Those fields that have another value than their default."""
    fields: Any = type(section).model_fields
    return [name for name in names if getattr(section, name) != fields[name].default]


def _epochs(train: Train) -> Problems:
    if train.max_steps > 0 and _set(train, "num_train_epochs"):
        epochs = f"train.num_train_epochs={train.num_train_epochs:g}"
        yield ("train", "num_train_epochs"), f"{epochs} is not looked at beside train.max_steps={train.max_steps}"


def _unread(data: Data) -> Problems:
    share = f"data.split.validation={data.split.validation:g}" if data.split and data.split.validation else ""
    if said := "data.validation" if data.validation else share:
        yield (
            ("data", "validation"),
            f"{said}: these rows are held out, and no stage reads them; data.test is what the result is scored on",
        )


def _steps(train: Train) -> Problems:
    if train.max_steps > 0:
        for key, text in schedule.problems(train, train.max_steps):
            yield ("train", key), text
    if train.lr_scheduler_type == "constant" and train.warmup_steps:
        yield (
            ("train", "warmup_steps"),
            f"train.warmup_steps={train.warmup_steps} is not looked at beside train.lr_scheduler_type=constant; use constant_with_warmup",
        )
    if train.lr_scheduler_type == "constant_with_warmup" and not train.warmup_steps:
        yield (
            ("train", "lr_scheduler_type"),
            "train.lr_scheduler_type=constant_with_warmup has no warm-up beside train.warmup_steps=0; set that, or use constant",
        )


def _quantization(section: Quantization) -> Problems:
    if section.load_in_4bit:
        return
    for name in _set(section, "bnb_4bit_quant_type", "bnb_4bit_use_double_quant", "bnb_4bit_compute_dtype"):
        yield (
            ("quantization", name),
            f"quantization.{name}={_written(getattr(section, name))} is not looked at beside quantization.load_in_4bit=false",
        )


def _serving(section: Serve) -> Problems:
    at_once = section.max_num_seqs
    if at_once is None:
        return
    if section.concurrency > at_once:
        yield (
            ("serve", "concurrency"),
            f"serve.concurrency={section.concurrency} conversations are never in the cache at once beside serve.max_num_seqs={at_once}: "
            "raise the one or lower the other",
        )
    if section.max_requests < at_once:
        yield (
            ("serve", "max_num_seqs"),
            f"serve.max_num_seqs={at_once} requests are never let in beside serve.max_requests={section.max_requests}: "
            "raise the one or lower the other",
        )


def _merging(section: Merge) -> Problems:
    if section.base != "measured" and section.dtype != "measured" and _set(section, "choose"):
        yield (
            ("merge", "choose"),
            f"merge.choose={section.choose} has nothing to choose from beside merge.base={section.base} and merge.dtype={section.dtype}: "
            "leave it out",
        )


def _exporting(section: Export) -> Problems:
    if {"all", *FITTED} & {*section.formats}:
        return
    for name in _set(section, "method", "calibration_rows"):
        yield (
            ("export", name),
            f"export.{name}={getattr(section, name)} is for {' and '.join(FITTED)}, and export.formats has neither",
        )


def _base(section: Model) -> Problems:
    if section.revision is not None and not is_hub_id(section.source):
        yield ("model", "revision"), _only("model.revision", section.revision, "a hub id", section.source)
    if section.sha256 is not None and not section.source.startswith("pypi:"):
        yield ("model", "sha256"), _only("model.sha256", section.sha256, "a pypi: source", section.source)


def _source(source: Source, where: Sequence[str | int]) -> Problems:
    """What a data set's name alone tells; `qkit.rows` knows the rest once it has looked at the place."""
    dotted = ".".join(map(str, where))
    if source.streaming and not is_hub_id(source.source):
        yield (*where, "streaming"), _only(f"{dotted}.streaming", "true", "a data set of the hub", source.source)
    path = Path(source.source.removesuffix(".gz"))
    if _set(source, "sample_by") and path.suffix and path.suffix.lower() not in TEXT and not is_hub_id(source.source):
        said = _only(f"{dotted}.sample_by", source.sample_by, f"text files ({', '.join(TEXT)})", source.source)
        yield (*where, "sample_by"), said


def _only(key: str, value: object, what: str, source: str) -> str:
    return f"{key}={value} is looked at for {what}, and the source is {source}: leave it out"


def _division(data: Data) -> Problems:
    if data.split is None:
        for name in _set(data, "group", "stratify"):
            yield (
                ("data", name),
                f"data.{name}={getattr(data, name)} says how data.split divides the rows, and there is no data.split: leave it out",
            )
    if data.too_long == "split" and data.train and all(source.format in ONE_LINERS for source in data.train):
        named = ", ".join(dict.fromkeys(source.format for source in data.train))
        yield (
            ("data", "too_long"),
            f"data.too_long=split divides plain text, and data.train is all {named}, whose long rows would be dropped: "
            "use drop or truncate_prompt",
        )


def _written(value: object) -> str:
    """As YAML has it."""
    return str(value).lower() if isinstance(value, bool) else str(value)
