"""`qkit init`: looks at a data set and at the machine, and writes a recipe."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qkit.commands.init import base as base_model
from qkit.commands.init import compose, examples, lengths, text, troubles
from qkit.commands.init.compose import Composed
from qkit.commands.init.dataset import Dataset
from qkit.commands.init.lengths import Lengths
from qkit.commands.init.reading import Candidate, Reading, read_as
from qkit.core.device import Device, detect
from qkit.core.errors import ModelError, RecipeError
from qkit.core.files import write_text
from qkit.core.progress import Progress
from qkit.data.checks import failures
from qkit.plan import gpus
from qkit.plugins.first_recipe import Base, Suggestion

Measure = Callable[[Mapping[str, Any], Reading, Progress], Lengths]

LARGER_TESTS = (None, 0.3, 0.5)  # shares of test rows that are tried until the test split has rows


@dataclass(frozen=True)
class Proposal:
    """A recipe with what it was chosen by. `labels`: how often each is there; `checks`: those that fail, None if they were not tried."""

    dataset: Dataset
    reading: Reading
    base: Base
    lengths: Lengths
    labels: Counter[str]
    device: Device
    composed: Composed
    troubles: tuple[str, ...]
    checks: Sequence[Mapping[str, Any]] | None = None

    @property
    def suggestion(self) -> Suggestion:
        return self.reading.candidate.suggestion

    @property
    def is_scored(self) -> bool:
        """Whether its rows have answers to score, which `qkit run` needs."""
        return not compose.is_unscored(self.reading)

    def commands(self, file: Path) -> list[str]:
        """What to type next. Plain text has nothing that `qkit run` could score."""
        if self.is_scored:
            return [f"qkit inspect {file}", f"qkit run {file}"]
        return [f"qkit inspect {file}", f"qkit data {file}", f"qkit train {Path('runs') / file.stem}"]

    def written(self, file: Path) -> str:
        """The text of the recipe."""
        return text.written(self.composed.draft, _remarks(self, file))


def propose(
    dataset: Dataset,
    candidate: Candidate,
    base: Base,
    device: Device | None = None,
    progress: Progress | None = None,
    measure: Measure = lengths.measure,
) -> Proposal:
    """A recipe for a data set, read by a task, on a base model and a machine, by default this one. `measure`: gives the lengths of rows."""
    device, progress = device or detect(), progress or Progress()
    reading = read_as(dataset, candidate)
    draft = compose.begin(dataset, reading, base)
    raw = compose.raw_of(draft)
    if not dataset.is_whole:
        entry = {**raw["data"]["train"][0], "rows": f":{len(dataset.table.records)}"}
        raw = {**raw, "data": {**raw["data"], "train": [entry]}}
    measured = measure(raw, reading, progress)
    longest = None if measured.reason else base_model.longest_row(raw)
    counts = troubles.label_counts(reading)
    seen = list(troubles.troubles(dataset, reading))
    for share in LARGER_TESTS:
        whole = {**draft, "data": {**draft["data"], **compose.split(dataset, reading, share)}}
        composed = compose.compose(whole, reading, base, measured, len(counts) or None, device, longest)
        proposal = Proposal(dataset, reading, base, measured, counts, device, composed, tuple(seen))
        if measured.reason or not dataset.is_whole:
            return proposal
        failed, has_rows = _tried(proposal, progress)
        if has_rows or dataset.is_split or not proposal.is_scored:
            break
    return replace(proposal, checks=failed)


def _tried(proposal: Proposal, progress: Progress) -> tuple[Sequence[Mapping[str, Any]], bool]:
    """The checks that fail when the data are prepared as `qkit run` would, and whether there are rows to score."""
    from qkit.data.inspection import view as inspection_view

    try:
        summary = inspection_view.inspect(compose.recipe_of(proposal.composed.draft), progress).summary
    except ModelError as error:
        return [{"name": "model", "message": str(error), "remedy": "name another model with --model"}], True
    return failures(summary["checks"]), bool(summary["splits"]["test"]["rows"])


def default_base(dataset: Dataset, candidate: Candidate, device: Device | None = None) -> Base:
    """The model to start with: the task's, or on a GPU the largest that fits rows of the data's length, by an estimate."""
    reading = read_as(dataset, candidate)
    roughly = lengths.estimate(reading, "no tokenizer yet")
    longest, _ = compose.max_length(reading, roughly, None)
    return base_model.base_for(candidate.task, device or detect(), longest)


def destination(data: str, out: Path | None, force: bool) -> Path:
    """The file that a recipe goes to: `out`, or the data set's name.

    Raises:
        RecipeError: it exists, and is not to be overwritten; or its folder does not.
    """
    name = Path(data.rstrip("/")).name.removesuffix(".gz")
    file = out or Path(f"{Path(name).stem or 'recipe'}.yaml")
    if file.exists() and not force:
        raise RecipeError(f"{file} exists: choose another name with --out, or overwrite it with --force")
    if not file.parent.is_dir():
        raise RecipeError(f"{file}: the folder {file.parent} does not exist; create it, or choose another with --out")
    return file


def write(proposal: Proposal, file: Path) -> None:
    """Write the recipe of a proposal."""
    write_text(file, proposal.written(file))


def copy_example(name: str, out: Path | None, force: bool) -> Path:
    """Copy a recipe that ships with qkit; returns the new file.

    Raises:
        RecipeError: there is none of that name, or the file exists.
    """
    source = examples.example(name)
    file = destination(f"{name}.yaml", out, force)
    write_text(file, source.read_text(encoding="utf-8"))
    return file


# --- in words ---------------------------------------------------------------------------------------------------------


def _remarks(proposal: Proposal, file: Path) -> list[str]:
    """The lines above the recipe."""
    lines = [f"Written by `qkit init {proposal.dataset.name}` for {gpus.title(proposal.device)}. {facts(proposal)}."]
    lines += [f"Look: {trouble}." for trouble in proposal.troubles]
    return [*lines, f"Next: {', then '.join(proposal.commands(file))}"]


def facts(proposal: Proposal) -> str:
    """How many records there are, and how long."""
    records, marks = len(proposal.dataset.table.records), proposal.lengths.percentiles()
    seen = f"{records:,} records" if proposal.dataset.is_whole else f"The first {records:,} records"
    unit = (
        "tokens by an estimate, four characters to one"
        if proposal.lengths.reason
        else "tokens of the model's tokenizer"
    )
    return f"{seen}: half have at most {marks['p50']:,}, 99 % at most {marks['p99']:,}, the longest {marks['max']:,} {unit}"


def to_dict(proposal: Proposal, file: Path) -> dict[str, Any]:
    """The proposal for `--json`."""
    return {
        "recipe": str(file),
        "task": proposal.reading.candidate.task,
        "why": proposal.suggestion.why,
        "model": {"source": proposal.base.source, "why": proposal.base.why},
        "columns": dict(proposal.suggestion.columns),
        "ignored": list(proposal.reading.ignore),
        "records": len(proposal.dataset.table.records),
        "all_records": proposal.dataset.is_whole,
        "lengths": {**proposal.lengths.percentiles(), "estimated": proposal.lengths.reason or None},
        "labels": dict(proposal.labels.most_common()),
        "device": proposal.device.to_dict(),
        "plan": {"fits": proposal.composed.fits, "message": proposal.composed.planned},
        "troubles": list(proposal.troubles),
        "failed_checks": None if proposal.checks is None else [dict(check) for check in proposal.checks],
        "values": compose.raw_of(proposal.composed.draft),
        "next": proposal.commands(file),
    }
