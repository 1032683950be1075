"""Chooses every value of a first recipe, each with its reason, by the data, the model and the machine."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from qkit.commands.init import base as base_model
from qkit.commands.init.dataset import Dataset
from qkit.commands.init.lengths import Lengths
from qkit.commands.init.reading import Reading
from qkit.core.device import Device
from qkit.core.errors import ModelError
from qkit.core.figures import gib, percent
from qkit.plan import deployable, sheet, solve
from qkit.plan import plan as plan_plan
from qkit.plan._known import Known
from qkit.plugins.first_recipe import Base, Chosen, Size
from qkit.recipe.load import from_dict
from qkit.recipe.schema import Recipe, Serve

UNPLANNED = (ModelError, ModuleNotFoundError)  # the model cannot be had, or what its plan needs is not installed
Draft = dict[str, Any]  # section -> key -> Chosen, or key -> Chosen

MALFORMED = "malformed"
STRICT = (MALFORMED, "roles")  # rules of data.clean that stop at a record
STEP = 16  # max_length is a multiple of this many tokens
SHORTEST = 32
FEW = 200  # rows: without validation rows of their own
MARGIN = 1.5  # of estimated lengths
MOST_NEW_TOKENS = 512
FEWEST_STEPS = 16  # of an epoch, for which a batch may be smaller


@dataclass(frozen=True)
class Composed:
    """The values of a recipe with their reasons, and what the plan says of it: "" if there is no plan."""

    draft: Draft
    planned: str
    fits: bool = True
    parameters: int | None = None


def raw_of(draft: Draft) -> dict[str, Any]:
    """The recipe as a mapping of sections, without the reasons."""
    return {
        name: {key: chosen[0] for key, chosen in section.items()} if isinstance(section, dict) else section[0]
        for name, section in draft.items()
    }


def recipe_of(draft: Draft) -> Recipe:
    """The recipe."""
    return from_dict(raw_of(draft), (), "qkit init")


def begin(dataset: Dataset, reading: Reading, base: Base) -> Draft:
    """Task, model and data: what the data say alone."""
    suggestion, task = reading.candidate.suggestion, reading.task
    data: dict[str, Chosen] = {
        split: ([dict(entry)], "; ".join(dataset.reasons) if split == "train" else "held out as the data set has it")
        for split, entry in dataset.sources.items()
    }
    if reading.columns:
        data["columns"] = (dict(reading.columns), "our name: yours")
    if reading.ignore:
        data["ignore"] = (list(reading.ignore), "columns that nothing reads")
    return {
        "task": (reading.candidate.task, suggestion.why),
        "model": base_model.section(base, task, reading.examples),
        "data": {**data, **suggestion.data, **_clean(dataset, reading)},
    }


def _clean(dataset: Dataset, reading: Reading) -> dict[str, Chosen]:
    """Records that the usual rules would stop at are left out, where others are left."""
    stops = [(MALFORMED, reason) for reason in dataset.broken]
    stops += [(one.rule, f"record {one.place + 1} {one.reason}") for one in reading.unread if one.rule in STRICT]
    if not stops:
        return {}
    why = f"{len(stops):,} of {len(dataset.table.records) + len(dataset.broken):,} cannot be used, the first: {stops[0][1]}"
    return {"clean": (dict.fromkeys(sorted({rule for rule, _ in stops}), "drop"), why)}


# --- held-out rows ----------------------------------------------------------------------------------------------------


def split(dataset: Dataset, reading: Reading, test: float | None = None) -> dict[str, Chosen]:
    """Which share of the rows is held out, where the data set has no rows of its own for that. `test`: a share in place of the usual one."""
    if dataset.is_split:
        return {}
    count = len(reading.examples)
    if is_unscored(reading):
        why = "these rows have no answers to score: rows are held out for the loss alone"
        return {"split": ({"train": 0.9, "validation": 0.1}, why)} if count > 1 else {}
    chosen, why = _shares(count, dataset.is_whole, reading.task.READS_VALIDATION)
    if test is not None:
        chosen, why = (
            {**chosen, "test": test},
            f"{count:,} records: with a smaller share, a split would be left without rows",
        )
    shares = {name: share for name, share in chosen.items() if share}
    return {"split": ({"train": round(1 - sum(shares.values()), 3), **shares}, why)}


def _shares(count: int, is_whole: bool, needs_validation: bool) -> tuple[dict[str, float], str]:
    if count < FEW:
        validation = 0.1 if needs_validation else 0.0
        return {"validation": validation, "test": 0.2}, f"{count:,} records are few: a fifth to score the result on"
    if is_whole:
        return {"validation": 0.1, "test": 0.1}, f"of {count:,} records, by a hash of their content"
    return {"validation": 0.05, "test": 0.05}, f"more than {count:,} records: a small share is enough to score on"


# --- lengths and batches ----------------------------------------------------------------------------------------------


def max_length(reading: Reading, lengths: Lengths, limit: int | None) -> Chosen:
    """A length that covers 99 % of the rows, or all if the longest is not much longer."""
    start, marks = reading.task.START, lengths.percentiles()
    wanted: float = marks["max"] if marks["max"] <= 1.25 * marks["p99"] else marks["p99"]
    if lengths.reason:
        wanted *= MARGIN
    rounded = max(SHORTEST, STEP * math.ceil(wanted / STEP))
    value = min(rounded, start.longest, limit or rounded)
    covered, unit = lengths.within(value), "tokens by an estimate" if lengths.reason else "tokens"
    if covered == lengths.count:
        return value, f"the longest of {covered:,} rows has {marks['max']:,} {unit}"
    fate = "divided" if "too_long" in reading.candidate.suggestion.data else start.too_long
    share = percent(covered / lengths.count)
    return value, f"{covered:,} of {lengths.count:,} rows ({share}) have at most so many {unit}; longer ones are {fate}"


def _answers(reading: Reading, lengths: Lengths, value: int) -> Draft:
    """How long answers may be, of a model that generates them."""
    task, draft = reading.task, {}
    if not task.HEAD.generates:
        return {}
    if reading.candidate.suggestion.label is None and lengths.longest_answer and not is_unscored(reading):
        new = min(MOST_NEW_TOKENS, STEP * math.ceil(lengths.longest_answer / STEP))
        cut = "" if new >= lengths.longest_answer else "; longer ones are cut, and cannot be right"
        draft["evaluate"] = {"max_new_tokens": (new, f"answers have up to {lengths.longest_answer:,} tokens{cut}")}
    if value > Serve().max_model_len:
        draft["serve"] = {"max_model_len": (value, "as data.max_length")}
    return draft


def is_unscored(reading: Reading) -> bool:
    """Whether its rows have no answer to score."""
    return reading.format in reading.task.UNSCORED


def compose(
    draft: Draft,
    reading: Reading,
    base: Base,
    lengths: Lengths,
    labels: int | None,
    device: Device,
    longest: int | None,
) -> Composed:
    """The whole recipe. `labels`: how many the data have; `longest`: the most tokens of a row that the model takes."""
    start = reading.task.START
    length = max_length(reading, lengths, longest)
    draft = {**draft, "data": {**draft["data"], "max_length": length}}
    batches = [tokens for tokens in start.batches if tokens >= length[0]] or [length[0]]
    probe = {**draft, "data": {**draft["data"], "batch_tokens": (batches[-1], "")}}
    parameters = _parameters(recipe_of(probe), device, lengths, labels) or base.parameters
    rows = round(lengths.count * draft["data"].get("split", ({"train": 1.0}, ""))[0]["train"])
    size = Size(rows, parameters, device.has_gpu)
    whole = {
        "task": draft["task"],
        "model": draft["model"],
        "method": start.method(size),
        "data": draft["data"],
        **{name: dict(section) for name, section in start.settings(size).items()},
        **_answers(reading, lengths, length[0]),
    }
    return _planned(_deployable(whole), batches, lengths, labels, device, parameters)


def _parameters(recipe: Recipe, device: Device, lengths: Lengths, labels: int | None) -> int | None:
    try:
        return sheet.sheet(recipe, device, lengths.rows, None, labels).parameters
    except UNPLANNED:
        return None


def _deployable(draft: Draft) -> Draft:
    """Without the formats that do not support the model."""
    try:
        refused = {refusal.format: refusal.reason for refusal in deployable.refusals(recipe_of(draft))}
    except UNPLANNED:
        return draft
    if not refused:
        return draft
    draft, why = dict(draft), "; ".join(f"{name} is left out: {reason}" for name, reason in refused.items())
    for section, key in (("export", "formats"), ("bench", "runtimes")):
        if section in draft:
            left = [name for name in draft[section][key][0] if name not in refused]
            draft[section] = {**draft[section], key: (left, why)}
    return draft


def _planned(
    draft: Draft, batches: list[int], lengths: Lengths, labels: int | None, device: Device, parameters: int | None
) -> Composed:
    """The draft with the largest batch that fits, and checkpointing by the plan."""
    last = _with_batch(draft, batches[-1], "the plan cannot tell what fits")
    try:
        for checkpointed in (False, True):
            for tokens in batches:
                tried = _with_batch(draft, tokens, "tokens of a batch, the most", checkpointed)
                recipe = recipe_of(tried)
                if tokens > batches[-1] and _too_few_steps(recipe, lengths):
                    continue
                known = solve.known_of(lengths.rows, recipe, labels)
                planned = plan_plan.plan(recipe, device=device, known=known)
                memory = f"{gib(planned.peak_bytes)} of the {gib(planned.device_bytes)} on {planned.device}"
                if planned.fits:
                    tried["data"]["batch_tokens"] = (tokens, f"training needs {memory}, by the plan")
                    tried["train"].update(_checkpointing(recipe, device, known))
                    return Composed(tried, f"training needs {memory}", True, parameters)
                last = tried
    except UNPLANNED as error:
        return Composed(last, f"not planned: {error}", True, parameters)
    return Composed(last, f"training does not fit: {memory}", False, parameters)


def _checkpointing(recipe: Recipe, device: Device, known: Known) -> dict[str, Chosen]:
    """What `auto` comes to here, where the recipe leaves it to the plan."""
    if recipe.train.gradient_checkpointing != "auto":
        return {}
    decided = plan_plan.checkpointing(recipe, device, known)
    return {"gradient_checkpointing": ("auto", f"{'on' if decided.on else 'off'} here: {decided.why}")}


def _with_batch(draft: Draft, tokens: int, why: str, checkpointed: bool = False) -> Draft:
    train = dict(draft["train"])
    if checkpointed:
        train["gradient_checkpointing"] = (True, "without it, training does not fit")
    return {**draft, "data": {**draft["data"], "batch_tokens": (tokens, why)}, "train": train}


def _too_few_steps(recipe: Recipe, lengths: Lengths) -> bool:
    """Whether a batch by tokens alone is so large that an epoch has hardly a step."""
    return recipe.data.batch_rows is None and lengths.tokens < FEWEST_STEPS * recipe.data.batch_tokens
