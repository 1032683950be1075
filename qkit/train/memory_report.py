"""The measured memory of training next to its plan, by item where possible: train/memory.json.

core/memory_watch.py tracks every tensor of one step, which gives bytes by item at the peak of that step. The meter reads the whole run,
including memory of libraries and allocators, which belongs to no item.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from qkit.core import memory_watch
from qkit.core.batching import part_sizes
from qkit.core.device import Device
from qkit.core.memory_meter import PeakMeter
from qkit.plan import fit
from qkit.plan import plan as plan_plan
from qkit.plan._known import Known
from qkit.recipe.schema import Recipe
from qkit.run.directory import Peak
from qkit.train.trainer import lengths

REST = "the rest (activations, logits, working space, the process)"


@dataclass(frozen=True)
class TrainingMemory:
    """train/memory.json. `predicted`, `measured`: bytes by item. `step`: the step that was watched, from 1; None: none.

    `measured_peak_bytes`: the reading of `meter` over the whole run. `readings`: all peaks that the device reports.
    """

    predicted: Mapping[str, int]
    measured: Mapping[str, int]
    step: int | None
    measured_peak_bytes: int
    meter: str
    readings: Mapping[str, int]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def peak(self) -> Peak:
        """For the manifest."""
        lines = {
            name: {"predicted": self.predicted.get(name), "measured": self.measured.get(name)}
            for name in dict.fromkeys([*self.predicted, *self.measured])
        }
        return Peak(
            self.measured_peak_bytes, self.meter, sum(self.predicted.values()) if self.predicted else None, lines
        )


def measured(recipe: Recipe, device: Device, meter: PeakMeter, watcher: Any, known: Known) -> TrainingMemory:
    """The memory of a finished training run. `known`: of its rows."""
    peak, readings = meter.peak_bytes(), meter.readings()  # before the plan, which takes memory itself
    alive = _named(watcher.alive.items(), recipe) if watcher.alive else {}
    return TrainingMemory(
        predicted=plan_plan.predicted_items(recipe, device, known),
        measured=alive,
        step=watcher.step + 1 if alive else None,
        measured_peak_bytes=peak,
        meter=meter.meter,
        readings=readings,
    )


def shortage(recipe: Recipe, device: Device, meter: PeakMeter, trainer: Any, known: Known) -> str:
    """The message for training that ran out of memory. Items that persist between steps are measured; everything else is one item."""
    measured_peak = meter.peak_bytes()
    planned = plan_plan.predicted_items(recipe, device, known)
    held = _named(memory_watch.standing(trainer.model, trainer.optimizer), recipe)
    kept = {line: size for line, size in planned.items() if line in held}
    rest = {REST: sum(planned.values()) - sum(kept.values())}
    return fit.shortage(recipe, "train", device, {**kept, **rest}, {**held, REST: measured_peak - sum(held.values())})


def _named(lines: Mapping[str, int], recipe: Recipe) -> dict[str, int]:
    """The lines with what is trained under the plan's name for it: an adapter, or the model as trained."""
    return {recipe.trained_as if name == "adapter" else name: size for name, size in lines.items()}


def known_of(trainer: Any, labels: int) -> Known:
    """What a plan needs to know, from the rows that are trained on."""
    rows = Counter(lengths(trainer.train_dataset))
    return Known(most_labelled(trainer), tuple(sorted(rows.items())), labels or None)


def most_labelled(trainer: Any) -> int:
    """The most tokens with loss in any pack or micro-batch: the memory of head and loss depends on it."""
    most = 0
    for batch in trainer.batches():
        labelled = iter([trainer.labelled_tokens[row] for row in batch])
        sizes = [len(batch)] if trainer.packing else part_sizes(len(batch), trainer.micro_batches)
        most = max(most, *(sum(itertools.islice(labelled, size)) for size in sizes))
    return most
