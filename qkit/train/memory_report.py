"""What a training took of its device, line by line where that can be told, beside its plan.

Every tensor of one step is watched (`qkit.tensors_alive`), which tells the lines apart at that step's peak; the meter reads the whole run,
with what libraries and allocators hold, which no line says.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from qkit.core.device import Device
from qkit.core.memory_meter import PeakMeter
from qkit.plan import fit
from qkit.plan import plan as plan_plan
from qkit.recipe.schema import Recipe
from qkit.run.directory import Peak
from qkit.train import memory_watch

REST = "all else (activations, logits, working space, the process)"


@dataclass(frozen=True)
class Seen:
    """train/memory.json. `predicted`, `measured`: bytes by line; `step`: the one that was watched, from 1; None: there was none.

    `measured_peak_bytes` is what `meter` read over the whole run, `readings` every peak that the device keeps.
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
        return Peak(self.measured_peak_bytes, self.meter, sum(self.predicted.values()), lines)


def seen(how: Recipe, device: Device, meter: PeakMeter, watcher: Any, labelled: int) -> Seen:
    """What a finished training took. `labelled`: the most tokens of a batch that carry loss."""
    alive = watcher.alive.items() if watcher.alive else {}
    return Seen(
        predicted=plan_plan.predicted_items(how, device, labelled),
        measured=alive,
        step=watcher.step + 1 if alive else None,
        measured_peak_bytes=meter.peak_bytes(),
        meter=meter.meter,
        readings=meter.readings(),
    )


def shortage(how: Recipe, device: Device, meter: PeakMeter, trainer: Any, labelled: int) -> str:
    """What to say of a training that ran out of memory: the lines that stay from step to step are counted, all else is the rest."""
    planned = plan_plan.predicted_items(how, device, labelled)
    held = memory_watch.standing(trainer.model, trainer.optimizer)
    kept = {line: size for line, size in planned.items() if line in held}
    rest = {REST: sum(planned.values()) - sum(kept.values())}
    return fit.shortage(how, "train", device, {**kept, **rest}, {**held, REST: meter.peak_bytes() - sum(held.values())})
