"""Passes a trainer's events on to trackers, and the scores after them.

A tracker's callback reads the settings of a run from `args.to_dict()`, and so receives the resolved recipe with the TrainingArguments.

train/trackers.json: by tracker the id under which its run is continued, and the last step; with trackio also the settings of the run, which
it replaces by those of the latest process.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from qkit.core.files import read_json, write_json
from qkit.recipe.schema import Recipe
from qkit.run.directory import Run
from qkit.tracking import trackers
from qkit.tracking.guarded import Guarded

FILE = "trackers.json"
REPLACING = ("trackio",)  # a process that continues a run replaces its settings


class Reports:
    """The trackers of one training, in whose folder `out` the ids of their runs are kept. `done`: steps before it resumes."""

    def __init__(self, run: Run, out: Path, done: int):
        self._run = run
        self._file = out / FILE
        before = read_json(self._file) if self._file.exists() else {"runs": {}}
        self._settings: dict[str, Any] = before.get("settings", {})
        ids = before["runs"]
        self._trackers = [
            Guarded(name, run, "train", ids.get(name)) for name in dict.fromkeys(run.recipe.train.report_to)
        ]
        for tracker in self._trackers:
            tracker.open(done)

    def attach(self, trainer: Any) -> None:
        """Add a callback to the trainer that passes each event on."""
        if self._trackers:
            trainer.add_callback(_forwarding(self.pass_on))
            self.pass_on("on_init_end", trainer.args, trainer.state, trainer.control, {})

    def pass_on(self, event: str, args: Any, state: Any, control: Any, given: Mapping[str, Any]) -> None:
        """Let each tracker handle an event; ids are stored as soon as they are known."""
        for tracker in [tracker for tracker in self._trackers if tracker.handles(event)]:
            shown = with_recipe(args, self._run.recipe, tracker.run_name)
            tracker.handle(event, shown, state, control, given)
            if event == "on_train_begin" and tracker.name in REPLACING:
                told = {**given["model"].config.to_dict(), **shown.to_dict()}
                self._settings = json.loads(json.dumps(told, default=str))
        if event == "on_train_begin":
            self._store(step=None)

    def close(self, step: int) -> None:
        """Finish the runs after the last step."""
        for tracker in self._trackers:
            tracker.close()
        if self._trackers:
            self._store(step)

    def _store(self, step: int | None) -> None:
        runs = {tracker.name: tracker.run_id for tracker in self._trackers if tracker.run_id}
        settings = {"settings": self._settings} if self._settings else {}
        write_json(self._file, {"runs": runs, "step": step, **settings})


def add_scores(run: Run, scores: Mapping[str, Any], baseline: str) -> None:
    """Add the scores of the base (`baseline`) and the trained model to the runs of their training, as figures of the test rows.

    `scores`: the content of evaluate/scores.json.
    """
    file = run.folder("train") / FILE
    if not file.exists():
        return
    kept = read_json(file)
    for name, run_id in kept["runs"].items():
        tracker = Guarded(name, run, "evaluate", run_id)
        tracker.open(None)
        told = kept.get("settings", {}) if name in REPLACING else {}
        args, state, control = _closing_arguments(run, tracker.run_name, told), *_state(kept["step"])
        tracker.handle("on_log", args, state, control, {"logs": figures(scores, baseline)})
        tracker.handle("on_train_end", args, state, control, {})
        tracker.close()


def figures(scores: Mapping[str, Any], baseline: str) -> dict[str, float]:
    """Scores as transformers names figures of test rows: test_score, test_score_low ... and test_base_score; test_gain is in points."""
    named: dict[str, float] = {}
    for artifact, entry in scores["scores"].items():
        prefix = f"test_{artifact}_" if artifact == baseline else "test_"
        named |= {f"{prefix}score": entry["score"], f"{prefix}loss": entry["heldout_loss"]}
        named |= {f"{prefix}score_{end}": entry[end] for end in ("low", "high")}
        further = entry.get("metrics", {}).items()  # those of one label have a colon in their name
        named |= {f"{prefix}{name}": figure["value"] for name, figure in further if ":" not in name}
    gain = scores["gain"]
    return {**named, "test_gain": gain["points"], "test_gain_low": gain["low"], "test_gain_high": gain["high"]}


def settings(recipe: Recipe) -> dict[str, Any]:
    """The resolved recipe with one key for each field, such as recipe.train.learning_rate."""
    return dict(_flat("recipe", recipe.model_dump(mode="json")))


def _flat(key: str, value: Any) -> list[tuple[str, Any]]:
    if not isinstance(value, Mapping) or not value:
        return [(key, value)]
    return [pair for name, inner in value.items() for pair in _flat(f"{key}.{name}", inner)]


def with_recipe(args: Any, recipe: Recipe, name: str) -> Any:
    """TrainingArguments whose `to_dict` has the recipe, too, and which name the run; `args` stay as they are."""
    shown, kind = copy.copy(args), type(args)
    shown.run_name, shown.project = name, trackers.PROJECT
    shown.__class__ = type(kind.__name__, (kind,), {"to_dict": lambda self: {**kind.to_dict(self), **settings(recipe)}})
    return shown


def _closing_arguments(run: Run, name: str, told: Mapping[str, Any]) -> Any:
    """Arguments that name the run, with these settings alone: those of the training stay."""
    from transformers import TrainingArguments

    given = TrainingArguments(
        output_dir=str(run.folder("train")), report_to=[], run_name=name, project=trackers.PROJECT, use_cpu=True
    )
    given.__class__ = type("TrainingArguments", (TrainingArguments,), {"to_dict": lambda _: {**told}})
    return given


def _state(step: int) -> tuple[Any, Any]:
    from transformers import TrainerControl, TrainerState

    return TrainerState(global_step=step), TrainerControl()


def _forwarding(pass_on: Callable[..., None]) -> Any:
    """A callback that hands every event to `pass_on`, and returns nothing: trackers do not control the training."""
    from transformers import TrainerCallback

    def forwarded(event: str) -> Any:
        return lambda _, args, state, control, **given: pass_on(event, args, state, control, given)

    events = [name for name in vars(TrainerCallback) if name.startswith("on_")]
    return type("Reporting", (TrainerCallback,), {event: forwarded(event) for event in events})()
