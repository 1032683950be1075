"""All that `qkit plan` answers, gathered: the plan of training, the other stages, the time, the rows, and what to change."""

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
from qkit.model.config import config_of, shape_of, source_of
from qkit.model.shape import parameters
from qkit.plan import deployable, published, solve, speed, stage_memory
from qkit.plan import plan as plan_plan
from qkit.plan.deployable import Refusal
from qkit.plan.fixed_memory import remarks
from qkit.plan.items import MemoryItem
from qkit.plan.plan import Checkpointing, Plan
from qkit.plan.published import Anchor
from qkit.plan.remedies import Remedy
from qkit.plan.solve import LengthTable, Question, Solved
from qkit.plan.speed import Pace
from qkit.recipe import idle, load, schedule, schema
from qkit.recipe.schema import Recipe

CONVERSATIONS = (1024, 4096, 16384)  # tokens; how many of each a server holds is said


@dataclass(frozen=True)
class Sheet:
    """A plan and what belongs to it. `made`: the higher of load and train. `conversations`: (tokens, how many at once).

    `refused`: the formats of the recipe that could not be made of this model, or not be loaded where they go.
    """

    made: Plan
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
    comes_quantized: str | None  # how the base is quantized as it comes
    remarks: tuple[str, ...]  # on values of the recipe that nothing will use, and on a mixture of experts
    vocabulary: str | None = None  # tokens that the model has no row for

    @property
    def short(self) -> tuple[Plan, ...]:
        """The stages that do not fit."""
        return tuple(stage for stage in self.stages if not stage.fits)


def sheet(
    how: Recipe, device: Device | None = None, lengths: Sequence[Sequence[int]] = (), ask: Question | None = None
) -> Sheet:
    """Everything about a recipe on a device, by default this machine's. `lengths`: of the training rows, where they are known.

    Raises:
        RecipeError: the training is too short for its schedule.
        ModelError: the model's shape cannot be had, or it is quantized in a way that is not dequantized here.
    """
    device = device or detect()
    shape, labelled = shape_of(how.model), solve.labelled_of(lengths, how)
    asked, checkpointing = how, plan_plan.checkpointing(how, device, labelled)
    how = plan_plan.decided(how, device, labelled)
    stages = plan_plan.stages(how, device, labelled)
    if (steps := schedule.planned_steps(how, lengths)) is not None:
        schedule.check(how.train, steps)
    made = max(stages[:2], key=lambda stage: stage.peak_bytes)
    serve = stages[-1]
    rows = speed.kept(lengths, how.data.max_length) if lengths else None
    pace = speed.pace(how, shape, device, rows)
    return Sheet(
        made=made,
        checkpointing=checkpointing,
        exact=shape.exact,
        parameters=parameters(shape),
        stages=stages,
        conversations=tuple(
            (length, stage_memory.conversations(serve.items, serve.device_bytes, shape, length))
            for length in CONVERSATIONS
        ),
        pace=replace(pace, steps=steps or pace.steps),
        lengths=solve.length_table(lengths, asked, device) if lengths else None,
        alternatives=() if made.fits else plan_plan.alternatives(how, made, device, labelled),
        anchors=published.anchors(how, device),
        solved=solve.solve(asked, ask, device=device) if ask else None,
        refused=deployable.refusals(how),
        remarks=(*(text for _, text in idle.remarks(how)), *remarks(how, shape)),
        comes_quantized=prequantized.method(config_of(how.model)),
        vocabulary=model_vocabulary.without_a_row(how.model),
    )


def to_dict(found: Sheet) -> dict[str, Any]:
    """The sheet as a JSON document: the plan's own keys on top."""
    entry = {
        **plan_plan.to_dict(found.made),
        "checkpointing": asdict(found.checkpointing),
        "exact": found.exact,
        "parameters": found.parameters,
        "stages": [
            {
                **{key: getattr(stage, key) for key in ("stage", "peak_bytes", "device_bytes", "fits")},
                "remedies": [asdict(remedy) for remedy in stage.remedies],
                "refusal": "" if stage.fits else plan_plan.refusal(stage),
            }
            for stage in found.stages
        ],
        "conversations": [{"tokens": length, "at_once": count} for length, count in found.conversations],
        "time_seconds": found.pace.seconds,
        "time": asdict(found.pace),
        "lengths": asdict(found.lengths) if found.lengths else None,
        "alternatives": [asdict(remedy) for remedy in found.alternatives],
        "anchors": [asdict(anchor) for anchor in found.anchors],
        "remarks": list(found.remarks),
        "comes_quantized": found.comes_quantized,
        "not_deployable": [asdict(refusal) for refusal in found.refused],
        "vocabulary": found.vocabulary,
    }
    if found.solved:
        answer = found.solved
        entry["solved"] = answer.value
        entry["solution"] = {
            "question": answer.question,
            "set": answer.set,
            "plan": plan_plan.to_dict(answer.plan) if answer.plan else None,
        }
    return entry


def explain(found: Sheet, line: str) -> tuple[MemoryItem, ...]:
    """The items called `line`, with their parts, of every stage that has one: training's first.

    Raises:
        RecipeError: no stage has such a line.
    """
    order = [found.made, *(stage for stage in found.stages if stage.stage != found.made.stage)]
    chosen = next((item for made in order for item in made.items if item.name == line), None)
    if chosen is None:
        names = dict.fromkeys(item.name for made in order for item in made.items)
        raise RecipeError(f"--explain {line}: the plan has no such line; it has {', '.join(names)}")
    return chosen, *chosen.parts


QUANTIZATIONS = ("nf4-double", "nf4", "fp4-double", "fp4", "bf16")


@dataclass(frozen=True)
class Options:
    """What stands in the place of a recipe on the command line. None: as a recipe would have it by default."""

    model: str
    quantization: str | None = None
    rank: int | None = None
    batch: int | None = None
    length: int | None = None


def recipe_for(options: Options, overrides: Sequence[str]) -> Recipe:
    """The recipe that `--model` and its companions describe: `batch` rows of `length` tokens.

    Raises:
        RecipeError: the quantization is not known, or a value or an override is wrong.
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
        raise RecipeError(f"--quantization {name}: there are {', '.join(QUANTIZATIONS)}")
    if name == "bf16":
        return {"quantization": {"load_in_4bit": False}, "merge": {"base": "16bit"}}
    kind, _, double = name.partition("-")
    return {"quantization": {"bnb_4bit_quant_type": kind, "bnb_4bit_use_double_quant": bool(double)}}


def lengths_of(target: Path | None) -> list[list[int]]:
    """Lengths of the training rows that the data stage has written: in the run directory, or in that of the recipe's name."""
    if target is None:
        return []
    root = target if target.is_dir() else Path("runs") / target.stem
    file = root / "data" / "summary.json"
    found: list[list[int]] = read_json(file).get("lengths", []) if file.is_file() else []
    return found
