"""Everything that `qkit plan` shows: the plan of training, the other stages, time, row lengths, and changes that make it fit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from qkit.core.device import Device, detect
from qkit.core.errors import RecipeError
from qkit.core.files import read_json
from qkit.model import prequantized
from qkit.model import vocabulary as model_vocabulary
from qkit.model.config import config_of, source_of
from qkit.model.shape import Shape, parameters
from qkit.plan import deployable, published, solve, speed, stage_memory
from qkit.plan import plan as plan_plan
from qkit.plan._subject import Subject, subject_of
from qkit.plan._traced import items as traced_items
from qkit.plan._traced.head import NewHead
from qkit.plan.deployable import Refusal
from qkit.plan.fixed_memory import remarks
from qkit.plan.items import MemoryItem
from qkit.plan.plan import Checkpointing, Plan
from qkit.plan.published import Anchor
from qkit.plan.remedies import Remedy
from qkit.plan.solve import LengthTable, Question, Solved
from qkit.plan.speed import Pace
from qkit.plugins.task import open_task, read_labels
from qkit.recipe import idle, load, schedule, schema, validation
from qkit.recipe.schema import Recipe

CONVERSATIONS = (1024, 4096, 16384)  # lengths in tokens, for the number of conversations that a server holds at once


@dataclass(frozen=True)
class Evaluation:
    """How often training evaluates the validation rows, their tokens, and the time of all but the answers that it generates; None: unknown."""

    evaluations: int | None
    tokens: int | None
    seconds: float | None


@dataclass(frozen=True)
class Sheet:
    """The answers of `qkit plan`. `plan`: of load or train, whichever needs more. `conversations`: (tokens, how many at once).

    `refused`: export formats of the recipe that do not support this model, or do not load in their runtime.
    """

    plan: Plan
    checkpointing: Checkpointing
    exact: bool
    parameters: int
    stages: tuple[Plan, ...]
    conversations: tuple[tuple[int, int], ...]
    pace: Pace
    lengths: LengthTable | None
    alternatives: tuple[Remedy, ...]
    anchors: tuple[Anchor, ...]
    solved: Solved | None
    refused: tuple[Refusal, ...]
    comes_quantized: str | None  # the quantization method of the base model as downloaded
    remarks: tuple[str, ...]  # warnings about recipe values without effect, and about the model
    evaluation: Evaluation | None = None  # of the validation rows, during training
    vocabulary: str | None = None  # a warning about tokens without a row in the embedding

    @property
    def short(self) -> tuple[Plan, ...]:
        """The stages that do not fit."""
        return tuple(stage for stage in self.stages if not stage.fits)


def sheet(
    recipe: Recipe,
    device: Device | None = None,
    lengths: Sequence[Sequence[int]] = (),
    question: Question | None = None,
    labels: int | None = None,
    validation_rows: tuple[int, int] | None = None,
) -> Sheet:
    """Everything about a recipe on a device, by default that of this machine. `lengths`: of the training rows, as in solve.length_table;
    `labels`: how many the data have; `validation_rows`: their number and their tokens. Without them, what is not known before the data stage.

    Raises:
        RecipeError: training is too short for its schedule.
        ModelError: the shape of the model cannot be determined, or qkit cannot dequantize the model.
    """
    device = device or detect()
    known = solve.known_of(lengths, recipe, labels)
    subject, undecided = subject_of(recipe, known), recipe
    recipe = plan_plan.decided(recipe, device, known)
    stages = plan_plan.stages(recipe, device, known)
    pace = _pace(recipe, subject, device, lengths)
    plan = max(stages[:2], key=lambda stage: stage.peak_bytes)
    return Sheet(
        plan=plan,
        checkpointing=plan_plan.checkpointing(undecided, device, known),
        exact=subject.exact,
        parameters=_parameters(recipe, subject),
        stages=stages,
        conversations=_conversations(stages[-1], subject),
        pace=pace,
        evaluation=_evaluation(recipe, subject, pace, validation_rows, _batches(recipe, lengths)),
        lengths=solve.length_table(lengths, undecided, device, labels) if lengths else None,
        alternatives=() if plan.fits else plan_plan.alternatives(recipe, plan, device, known),
        anchors=published.anchors(recipe, device) if isinstance(subject, Shape) else (),
        solved=solve.solve(undecided, question, device=device) if question else None,
        refused=deployable.refusals(recipe),
        remarks=(*(text for _, text in idle.remarks(recipe)), *_remarks(recipe, subject)),
        comes_quantized=prequantized.method(config_of(recipe.model)),
        vocabulary=model_vocabulary.without_a_row(recipe.model),
    )


def checked_steps(recipe: Recipe, lengths: Sequence[Sequence[int]]) -> int | None:
    """The steps of training; None if they are not known yet.

    Raises:
        RecipeError: they are too few for the schedule.
    """
    steps = schedule.planned_steps(recipe, lengths, open_task(recipe.task).LENGTH_STEP)
    if steps is not None:
        schedule.check(recipe.train, steps)
    return steps


def _pace(recipe: Recipe, subject: Subject, device: Device, lengths: Sequence[Sequence[int]]) -> Pace:
    """Speed, time and steps of training.

    Raises:
        RecipeError: the steps are too few for the schedule.
    """
    steps = checked_steps(recipe, lengths)
    pace = speed.pace(recipe, subject, device, speed.kept(lengths, recipe.data.max_length) if lengths else None)
    return replace(pace, steps=steps or pace.steps)


def _batches(recipe: Recipe, lengths: Sequence[Sequence[int]]) -> int | None:
    """The batches of an epoch; None if they are not known yet."""
    return schedule.planned_batches(recipe, lengths, open_task(recipe.task).LENGTH_STEP)


def _evaluation(
    recipe: Recipe, subject: Subject, pace: Pace, rows: tuple[int, int] | None, batches: int | None
) -> Evaluation | None:
    """What the evaluations cost; None if there are none. `rows`: validation rows and their tokens; `batches`: of an epoch."""
    if not validation.evaluates(recipe) or (rows is not None and not rows[0]):
        return None
    count = validation.evaluations(recipe.train, pace.steps, batches) if pace.steps else None
    if rows is None:
        return Evaluation(count, None, None)
    tokens = rows[1] * min(rows[0], recipe.train.eval_rows or rows[0]) // rows[0]
    if not count:
        return Evaluation(count, tokens, None)
    predicts = not open_task(recipe.task).HEAD.generates and validation.scores_rows(recipe)  # each row once more
    share = speed.forward_share(recipe, subject) * (1 + predicts)
    return Evaluation(count, tokens, speed.evaluation_seconds(pace, share, tokens, count))


def _parameters(recipe: Recipe, subject: Subject) -> int:
    """Parameters of the model without an adapter."""
    return traced_items.parameters(recipe, subject) if isinstance(subject, NewHead) else parameters(subject)


def _remarks(recipe: Recipe, subject: Subject) -> tuple[str, ...]:
    return traced_items.remarks(recipe, subject) if isinstance(subject, NewHead) else remarks(recipe, subject)


def _conversations(serve: Plan, subject: Subject) -> tuple[tuple[int, int], ...]:
    """(tokens, how many conversations of this length the server holds at once) for each of CONVERSATIONS; none without a model that talks."""
    if isinstance(subject, NewHead):
        return ()
    return tuple(
        (length, stage_memory.conversations(serve.items, serve.device_bytes, subject, length))
        for length in CONVERSATIONS
    )


def to_dict(sheet: Sheet) -> dict[str, Any]:
    """The sheet for `--json`, with the keys of the plan at the top level."""
    entry = {
        **plan_plan.to_dict(sheet.plan),
        "checkpointing": asdict(sheet.checkpointing),
        "exact": sheet.exact,
        "parameters": sheet.parameters,
        "stages": [
            {
                **{key: getattr(stage, key) for key in ("stage", "peak_bytes", "device_bytes", "fits")},
                "remedies": [remedy.to_dict() for remedy in stage.remedies],
                "refusal": "" if stage.fits else plan_plan.refusal(stage),
            }
            for stage in sheet.stages
        ],
        "conversations": [{"tokens": length, "at_once": count} for length, count in sheet.conversations],
        "time_seconds": sheet.pace.seconds,
        "time": sheet.pace.to_dict(),
        "evaluation": asdict(sheet.evaluation) if sheet.evaluation else None,
        "lengths": asdict(sheet.lengths) if sheet.lengths else None,
        "alternatives": [remedy.to_dict() for remedy in sheet.alternatives],
        "anchors": [asdict(anchor) for anchor in sheet.anchors],
        "remarks": list(sheet.remarks),
        "comes_quantized": sheet.comes_quantized,
        "not_deployable": [asdict(refusal) for refusal in sheet.refused],
        "vocabulary": sheet.vocabulary,
    }
    if sheet.solved:
        answer = sheet.solved
        entry["solved"] = answer.value
        entry["solution"] = {
            "question": answer.question,
            "set": answer.set,
            "plan": plan_plan.to_dict(answer.plan) if answer.plan else None,
        }
    return entry


def explain(sheet: Sheet, line: str) -> tuple[MemoryItem, ...]:
    """The item called `line` and its parts, of training or else of the first stage that has one.

    Raises:
        RecipeError: no stage has an item of this name.
    """
    order = [sheet.plan, *(stage for stage in sheet.stages if stage.stage != sheet.plan.stage)]
    chosen = next((item for plan in order for item in plan.items if item.name == line), None)
    if chosen is None:
        names = dict.fromkeys(item.name for plan in order for item in plan.items)
        raise RecipeError(f"--explain {line}: not a line of the plan; must be one of {', '.join(names)}")
    return chosen, *chosen.parts


QUANTIZATIONS = ("nf4-double", "nf4", "fp4-double", "fp4", "bf16")


@dataclass(frozen=True)
class Options:
    """Options of the command line in place of a recipe. None: the recipe's default."""

    model: str
    quantization: str | None = None
    rank: int | None = None
    batch: int | None = None
    length: int | None = None


def recipe_for(options: Options, overrides: Sequence[str]) -> Recipe:
    """The recipe that `--model` and its options describe: batches of `batch` rows of `length` tokens.

    Raises:
        RecipeError: the quantization is unknown, or a value or an override is not valid.
    """
    raw: dict[str, Any] = {"task": "chat", "model": {"source": source_of(options.model)}, "data": {}}
    if options.quantization:
        raw |= _quantized(options.quantization)
    if options.rank is not None:
        raw["lora"] = {"r": options.rank}
    length = options.length or schema.Data().max_length
    raw["data"] = {"max_length": length, "batch_tokens": (options.batch or 1) * length}
    return load.from_dict(raw, overrides, "the command line")


def _quantized(name: str) -> dict[str, Any]:
    if name not in QUANTIZATIONS:
        raise RecipeError(f"--quantization {name}: must be one of {', '.join(QUANTIZATIONS)}")
    if name == "bf16":
        return {"quantization": {"load_in_4bit": False}, "merge": {"base": "16bit"}}
    kind, _, double = name.partition("-")
    return {"quantization": {"bnb_4bit_quant_type": kind, "bnb_4bit_use_double_quant": bool(double)}}


def lengths_of(target: Path | None) -> list[list[int]]:
    """Lengths of the training rows, as the data stage wrote them to the run directory, given as such or by its recipe; [] if it has not run."""
    if target is None:
        return []
    file = _data(target) / "summary.json"
    lengths: list[list[int]] = read_json(file).get("lengths", []) if file.is_file() else []
    return lengths


def labels_of(target: Path | None) -> int | None:
    """How many labels the data stage counted; None if it has not run, or the task has no labels."""
    return len(read_labels(_data(target))) or None if target else None


def validation_rows_of(target: Path | None) -> tuple[int, int] | None:
    """The number of validation rows and their tokens; None if the data stage has not run."""
    file = _data(target) / "summary.json" if target else None
    if file is None or not file.is_file():
        return None
    counts = read_json(file).get("splits", {}).get("validation", {})
    return counts.get("rows", 0), counts.get("tokens", 0)


def _data(target: Path) -> Path:
    """The data folder of a run directory, given as such or by its recipe."""
    return (target if target.is_dir() else Path("runs") / target.stem) / "data"
