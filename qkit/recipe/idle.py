"""Valid values of a recipe that have no effect because of another value: whoever wrote them expects one.

What a quick trial with `--set` typically makes idle (fewer steps, another format, 16 bit) is a warning; the rest is an error.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qkit.core.errors import as_yaml
from qkit.core.sources import is_hub_id
from qkit.recipe import _optimization, registry, schedule
from qkit.recipe.schema import BOTTLENECKS

if TYPE_CHECKING:
    from qkit.recipe.labels import Loss
    from qkit.recipe.schema import Data, Export, Merge, Model, Quantization, Recipe, Serve, Source
    from qkit.recipe.section import Section
    from qkit.recipe.training import Train

    Key = tuple[str | int, ...]
    Problems = Iterator[tuple[Key, str]]


FITTED = ("vllm-w4a16", "vllm-w8a8")  # the export formats that use export.method and its calibration rows
FREE_TEXT = ("chat",)  # the tasks whose answers are free text, which a pattern can cut
CONLL_SUFFIXES = (".conll", ".iob", ".iob2", ".bio", ".bioes")  # of files with columns of words and tags
TABLES = (".csv", ".tsv")  # the files that delimiter divides
TEXT = (".txt", ".md")  # the files that sample_by divides
ONE_LINERS = (
    "messages",
    "sharegpt",
    "alpaca",
    "prompt_completion",
    "tokenized",
)  # data formats that too_long=split cannot divide


def remarks(recipe: Recipe) -> Problems:
    """Warnings, as (key, message): shown by the plan and by the stage that would have used the value."""
    yield from _epochs(recipe.train)
    if recipe.train.run_name is not None and not recipe.train.report_to:
        name = f"train.run_name={recipe.train.run_name}"
        yield ("train", "run_name"), f"{name} names a run in the trackers, but train.report_to has none"
    yield from _methods(recipe)
    yield from _quantization(recipe.quantization)
    yield from _exporting(recipe.export)
    if recipe.train.eval_strategy == "no" and not registry.reads_validation(recipe.task):
        yield from _unread(recipe.data)
    if recipe.bench.sweep and _set(recipe.bench, "concurrency"):
        limit = ", ".join(map(str, recipe.bench.concurrency))
        yield ("bench", "concurrency"), f"bench.concurrency=[{limit}] has no effect with bench.sweep=true"


def mistakes(recipe: Recipe) -> Problems:
    """Errors, as (key, message): what has no effect, why, and what to do."""
    yield from _steps(recipe.train)
    yield from _optimization.mistakes(recipe)
    if recipe.train.loss_type == "dft" and recipe.train.label_smoothing_factor:
        yield (
            ("train", "label_smoothing_factor"),
            f"train.label_smoothing_factor={recipe.train.label_smoothing_factor:g} has no effect with train.loss_type=dft: remove one",
        )
    yield from _serving(recipe.serve)
    yield from _merging(recipe.merge)
    yield from _loss(recipe.loss)
    if recipe.evaluate.answer_pattern is not None and recipe.task not in FREE_TEXT:
        yield (
            ("evaluate", "answer_pattern"),
            f"evaluate.answer_pattern={recipe.evaluate.answer_pattern} applies to free text (task={', '.join(FREE_TEXT)}): remove it for "
            f"task={recipe.task}",
        )
    yield from _base(recipe.model)
    yield from _division(recipe.data)
    for name in ("train", "validation", "test"):
        for index, source in enumerate(getattr(recipe.data, name)):
            yield from _source(source, ("data", name, index))
    if len(recipe.data.train) == 1 and recipe.data.train[0].weight is not None:
        yield (
            ("data", "train", 0, "weight"),
            f"data.train.0.weight={recipe.data.train[0].weight:g} is relative to other sources, but there is only one: remove it",
        )


def _set(section: Section, *names: str) -> list[str]:
    """The fields whose value is not the default."""
    fields: Any = type(section).model_fields
    return [name for name in names if getattr(section, name) != fields[name].default]


def _methods(recipe: Recipe) -> Problems:
    """The settings of another method than the recipe's."""
    for section, used in (
        ("lora", recipe.method == "lora"),
        ("bottleneck", recipe.method in BOTTLENECKS),
        ("layers", recipe.method == "full"),
    ):
        fields = type(getattr(recipe, section)).model_fields
        for name in [] if used else _set(getattr(recipe, section), *fields):
            yield (section, name), f"{section}.{name} has no effect with method={recipe.method}"
    if recipe.train.trainable and recipe.method != "full":
        yield ("train", "trainable"), f"train.trainable has no effect with method={recipe.method}"
    if recipe.peft and recipe.method != "peft":
        yield ("peft",), f"peft has no effect with method={recipe.method}"


def _epochs(train: Train) -> Problems:
    if train.max_steps > 0 and _set(train, "num_train_epochs"):
        epochs = f"train.num_train_epochs={train.num_train_epochs:g}"
        yield ("train", "num_train_epochs"), f"{epochs} has no effect with train.max_steps={train.max_steps}"


def _unread(data: Data) -> Problems:
    share = f"data.split.validation={data.split.validation:g}" if data.split and data.split.validation else ""
    if name := "data.validation" if data.validation else share:
        yield (
            ("data", "validation"),
            f"{name}: these rows are held out, but with train.eval_strategy=no no stage reads them; the result is scored on data.test",
        )


def _steps(train: Train) -> Problems:
    if train.max_steps > 0:
        for key, text in schedule.problems(train, train.max_steps):
            yield ("train", *key.split(".")), text
    if train.lr_scheduler_type == "constant" and train.warmup_steps:
        yield (
            ("train", "warmup_steps"),
            f"train.warmup_steps={train.warmup_steps} has no effect with train.lr_scheduler_type=constant; use constant_with_warmup",
        )
    if train.lr_scheduler_type == "constant_with_warmup" and not train.warmup_steps:
        yield (
            ("train", "lr_scheduler_type"),
            "train.lr_scheduler_type=constant_with_warmup needs a warm-up, but train.warmup_steps=0; set it, or use constant",
        )


def _quantization(section: Quantization) -> Problems:
    if section.load_in_4bit:
        return
    for name in _set(section, "bnb_4bit_quant_type", "bnb_4bit_use_double_quant", "bnb_4bit_compute_dtype"):
        yield (
            ("quantization", name),
            f"quantization.{name}={as_yaml(getattr(section, name))} has no effect with quantization.load_in_4bit=false",
        )


def _serving(section: Serve) -> Problems:
    limit = section.max_num_seqs
    if limit is None:
        return
    if section.concurrency > limit:
        yield (
            ("serve", "concurrency"),
            f"serve.concurrency={section.concurrency} conversations can never run at once with serve.max_num_seqs={limit}: "
            "raise serve.max_num_seqs or lower serve.concurrency",
        )
    if section.max_requests < limit:
        yield (
            ("serve", "max_num_seqs"),
            f"serve.max_num_seqs={limit} requests can never run at once with serve.max_requests={section.max_requests}: "
            "raise serve.max_requests or lower serve.max_num_seqs",
        )


def _merging(section: Merge) -> Problems:
    if section.base != "measured" and section.dtype != "measured" and _set(section, "choose"):
        yield (
            ("merge", "choose"),
            f"merge.choose={section.choose} has nothing to choose from with merge.base={section.base} and merge.dtype={section.dtype}: "
            "remove it",
        )


def _loss(section: Loss) -> Problems:
    read = {
        "cross_entropy": ("class_weights", "label_smoothing"),
        "focal": ("class_weights", "gamma"),
        "bce": ("class_weights", "label_smoothing"),
        "huber": ("delta",),
    }
    for name in _set(section, "class_weights", "label_smoothing", "gamma", "delta"):
        if name not in read.get(section.name, ()):
            kinds = " and ".join(kind for kind, names in read.items() if name in names)
            yield (
                ("loss", name),
                f"loss.{name}={getattr(section, name)} applies to loss.name={kinds}, but loss.name={section.name}: remove it",
            )


def _exporting(section: Export) -> Problems:
    if {"all", *FITTED} & {*section.formats}:
        return
    for name in _set(section, "method", "calibration_rows"):
        yield (
            ("export", name),
            f"export.{name}={getattr(section, name)} applies to {' and '.join(FITTED)}, but export.formats has neither",
        )


def _base(section: Model) -> Problems:
    if section.revision is not None and not is_hub_id(section.source):
        yield ("model", "revision"), _only("model.revision", section.revision, "a hub id", section.source)
    if section.sha256 is not None and not section.source.startswith("pypi:"):
        yield ("model", "sha256"), _only("model.sha256", section.sha256, "a pypi: source", section.source)


def _source(source: Source, where: Sequence[str | int]) -> Problems:
    """What the name of a data set alone tells; data/read.py checks the rest when it opens the source."""
    dotted = ".".join(map(str, where))
    if source.streaming and not is_hub_id(source.source):
        yield (*where, "streaming"), _only(f"{dotted}.streaming", "true", "a data set of the hub", source.source)
    path = Path(source.source.removesuffix(".gz"))
    columns = _set(source, "word_column", "tag_column")
    if columns and source.format != "conll" and path.suffix.lower() not in CONLL_SUFFIXES:
        name = columns[0]
        yield (
            (*where, name),
            _only(f"{dotted}.{name}", str(getattr(source, name)), "CoNLL files (format: conll)", source.source),
        )
    if _set(source, "delimiter") and path.suffix and path.suffix.lower() not in TABLES:
        tables = f"tables ({', '.join(TABLES)})"
        yield (*where, "delimiter"), _only(f"{dotted}.delimiter", repr(source.delimiter), tables, source.source)
    if _set(source, "sample_by") and path.suffix and path.suffix.lower() not in TEXT and not is_hub_id(source.source):
        message = _only(f"{dotted}.sample_by", source.sample_by, f"text files ({', '.join(TEXT)})", source.source)
        yield (*where, "sample_by"), message


def _only(key: str, value: object, what: str, source: str) -> str:
    return f"{key}={value} applies to {what}, but the source is {source}: remove it"


def _division(data: Data) -> Problems:
    if data.split is None:
        for name in _set(data, "group", "stratify"):
            yield (
                ("data", name),
                f"data.{name}={getattr(data, name)} says how data.split divides the rows, but data.split is not set: remove it",
            )
    if data.too_long == "split" and data.train and all(source.format in ONE_LINERS for source in data.train):
        named = ", ".join(dict.fromkeys(source.format for source in data.train))
        yield (
            ("data", "too_long"),
            f"data.too_long=split divides plain text, but data.train is all {named}, whose long rows would be dropped: "
            "use drop or truncate_prompt",
        )
    if data.packing and data.batch_rows is not None:
        yield (
            ("data", "batch_rows"),
            f"data.batch_rows={data.batch_rows} has no effect with data.packing=true, where a batch is one pack: remove it",
        )
