"""Evaluation during training: the loss of the validation rows, of each of their sources, and on some rows the task's own metric.

train/metrics.jsonl    each evaluation, on a line with `eval_loss`
train/validation.json  the best step and its figure, and that figure computed again if what was trained is the best step's
train/best/step-N/     what was trained, as it was after the best step so far, and after those that a checkpoint still refers to

Evaluating changes nothing in training: it draws no random numbers, and what is trained has the same bytes without it.
"""

from __future__ import annotations

import json
import math
import random
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qkit.core.errors import RecipeError, StageFailed, nearest, short
from qkit.core.files import read_lines, write_json
from qkit.core.memory_meter import PeakMeter
from qkit.measure import answers, scores
from qkit.measure.held_out import HeldOut, of_records
from qkit.plugins.task import open_task
from qkit.recipe import schedule
from qkit.recipe import validation as asked
from qkit.recipe.schema import Recipe
from qkit.run import curves
from qkit.run.directory import Run
from qkit.runtimes import transformers as live
from qkit.train import best_step, row_losses
from qkit.train.trainers import _shared

if TYPE_CHECKING:
    from datasets import Dataset

VALIDATION = "validation.json"
OF_PACKS = ("pack", "position")  # the columns of packed rows; an evaluation packs nothing
SECONDS = "eval_runtime"  # transformers' name
PATIENCE = "Patience"  # the name, in a checkpoint, of the callback that stops early


@dataclass(frozen=True)
class Validation:
    """The rows that are evaluated. `labels`: labels with loss of each row; `sources`: the name of its source; `scored`: those that are
    predicted as well."""

    run: Run
    meter: PeakMeter
    rows: Dataset
    labels: Sequence[int]
    sources: Sequence[str]
    scored: HeldOut | None

    @property
    def keeps_best(self) -> bool:
        """Whether the result is the model of the best step."""
        return self.run.recipe.train.keeps_best

    def evaluate(self, trainer: Any) -> dict[str, float]:
        """Evaluate, log the figures under transformers' names, such as eval_loss, and return them."""
        begin = time.perf_counter()
        with row_losses.inference(trainer.model):  # TRL keeps apart what it logs in training
            figures = {f"eval_{name}": value for name, value in self.figures(trainer).items()}
            seconds = time.perf_counter() - begin
            trainer.log({**figures, SECONDS: seconds})
        trainer.evaluation_seconds += seconds
        trainer.control = trainer.callback_handler.on_evaluate(trainer.args, trainer.state, trainer.control, figures)
        return figures

    def figures(self, trainer: Any) -> dict[str, float]:
        """loss, in mean nats per label; loss/SOURCE where there are several; score, of 100, and the figure that tells the best step."""
        sums = row_losses.loss_sums(trainer, self.rows)
        figures = {asked.LOSS: sum(sums) / sum(self.labels), **self._by_source(sums)}
        return figures | (self._scores(trainer) if self.scored else {})

    def _by_source(self, sums: Sequence[float]) -> dict[str, float]:
        if len(set(self.sources)) < 2:
            return {}
        totals: defaultdict[str, float] = defaultdict(float)
        labels: defaultdict[str, int] = defaultdict(int)
        for source, total, count in zip(self.sources, sums, self.labels, strict=True):
            totals[source] += total
            labels[source] += count
        return {f"{asked.OF_SOURCE}{source}": totals[source] / labels[source] for source in totals if labels[source]}

    def _scores(self, trainer: Any) -> dict[str, float]:
        assert self.scored is not None
        recipe = self.run.recipe
        with row_losses.inference(trainer.model), trainer.accelerator.autocast():
            runtime: Any = live.around(trainer.model, self.meter, recipe)
            said = answers.answered(self.run, runtime, self.scored, "validation rows", {})
        figures = {asked.SCORE: scores.percent(said.grades)}
        best = recipe.train.metric_for_best_model
        if best != asked.SCORE and not asked.is_loss(best):
            figures[best] = self._figure(best, said)
        return figures

    def _figure(self, name: str, said: answers.Answers) -> float:
        """One of the task's figures beside its score.

        Raises:
            RecipeError: these rows do not have it.
        """
        assert self.scored is not None
        data, section, seed = self.run.folder("data"), self.run.recipe.evaluate, self.run.recipe.seed
        task = open_task(self.run.recipe.task)
        figures = task.metrics(said.predictions, self.scored.references, data, section, seed)
        if name not in figures:
            raise RecipeError(
                f"train.metric_for_best_model={name}: the {len(self.scored.asked)} validation rows that are scored do not have this figure; "
                "give it more rows (train.eval_score_rows), or name another"
            )
        return float(figures[name]["value"])


def check(run: Run) -> bool:
    """Whether training evaluates: its recipe does not say no, and there are validation rows.

    Raises:
        RecipeError: the recipe needs validation rows and the data have none, or names a source that they do not have.
    """
    section, file = run.recipe.train, run.folder("data") / "validation.parquet"
    if section.eval_strategy == "no":
        return False
    if not file.is_file() or not _row_count(file):
        if asked.wanted(section):
            raise RecipeError(
                f"train.{asked.wanted(section)[0]}: the data stage left no validation rows; {asked.ADVICE}, or remove it"
            )
        return False
    best, names = section.metric_for_best_model, _losses(_sources(run.need("data", "ledger.parquet")))
    if best.startswith(asked.OF_SOURCE) and best not in names:
        raise RecipeError(
            f"train.metric_for_best_model={short(best)}: there is no such loss{nearest(best, names)}; must be {', '.join(names)}"
        )
    return True


def attach(trainer: Any, run: Run, meter: PeakMeter) -> None:
    """Have a trainer evaluate the validation rows, with the columns that it trains on."""
    recipe, file = run.recipe, run.need("data", "validation.parquet")
    columns = [name for name in trainer.train_dataset.column_names if name not in OF_PACKS]
    rows = trainer.read_rows(file) if trainer.read_rows else _shared.training_rows(file, columns)
    sources = _sources(run.need("data", "ledger.parquet"))
    chosen = list(range(len(rows)))
    if recipe.train.eval_rows is not None and recipe.train.eval_rows < len(rows):
        chosen = _spread(_records(file), sources, recipe, recipe.train.eval_rows)
        rows, sources = rows.select(chosen), [sources[row] for row in chosen]
    scored = _scored(file, chosen, sources, recipe)
    trainer.validation = Validation(run, meter, rows, trainer.items(rows), sources, scored)
    trainer.eval_dataset = rows
    trainer.args.eval_strategy = "steps"  # of epochs, too: a run that resumes at the end of one evaluates it
    batches = len(trainer.batches())
    trainer.args.eval_steps = asked.interval(recipe.train, schedule.steps(trainer.args, batches), batches)
    trainer.args.metric_for_best_model = recipe.train.metric_for_best_model
    trainer.args.greater_is_better = is_greater_better(recipe)
    for callback in _callbacks(recipe):
        trainer.add_callback(callback)


def _losses(sources: Sequence[str]) -> list[str]:
    """The names of the losses of an evaluation."""
    several = sorted(set(sources))
    return [asked.LOSS, *(f"{asked.OF_SOURCE}{name}" for name in several if len(several) > 1)]


def _row_count(file: Path) -> int:
    import pyarrow.parquet as pq

    return int(pq.read_metadata(file).num_rows)


def _records(file: Path) -> list[dict[str, Any]]:
    import pyarrow.parquet as pq

    records: list[dict[str, Any]] = pq.read_table(file).to_pylist()
    return records


def _scored(file: Path, chosen: Sequence[int], sources: Sequence[str], recipe: Recipe) -> HeldOut | None:
    """Those of the chosen rows that are predicted. `sources`: of each chosen row."""
    if not asked.scores_rows(recipe):
        return None
    every = _records(file)
    records = [every[row] for row in chosen]
    most = recipe.train.eval_score_rows
    if most is not None and most < len(records):
        records = [records[row] for row in _spread(records, sources, recipe, most)]
    return of_records(records, open_task(recipe.task))


def _spread(records: Sequence[Mapping[str, Any]], sources: Sequence[str], recipe: Recipe, most: int) -> list[int]:
    """About `most` row numbers, drawn by the seed from each source and at least one of it; rows of one prediction stay together."""
    task = open_task(recipe.task)
    begins = [row for row, record in enumerate(records) if not task.continues(record)]
    ends = dict(zip(begins, [*begins[1:], len(records)], strict=True))
    by_source: defaultdict[str, list[int]] = defaultdict(list)
    for begin in begins:
        by_source[sources[begin]].append(begin)
    chosen = []
    for of_source in by_source.values():
        count = max(1, len(of_source) * most // len(records))
        chosen += random.Random(recipe.seed).sample(of_source, count)
    return [row for begin in sorted(chosen) for row in range(begin, ends[begin])]


def _sources(ledger: Path) -> list[str]:
    """The name of the source of each validation row: its file name without a suffix, or all of it where that is not unique."""
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    table = pq.read_table(ledger, columns=["split", "source", "row"])
    held = table.filter(pc.and_(pc.equal(table["split"], "validation"), pc.is_valid(table["row"]))).sort_by("row")
    sources: list[str] = held["source"].to_pylist()
    stems = {source: Path(source).stem for source in sources}
    unique = len(set(stems.values())) == len(stems)
    return [stems[source] if unique else source for source in sources]


# --- the best step ----------------------------------------------------------------------------------------------------


def is_greater_better(recipe: Recipe) -> bool:
    """Whether more is better of the figure that tells the best step."""
    name = recipe.train.metric_for_best_model
    if asked.is_loss(name):
        return False
    return not any(figure.is_error for figure in open_task(recipe.task).FIGURES if figure.name == name)


def _callbacks(recipe: Recipe) -> Iterator[Any]:
    """Callbacks of the trainer: its interval, and early stopping."""
    from transformers import EarlyStoppingCallback, TrainerCallback

    class Interval(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            """A checkpoint of an earlier version has another interval, which transformers would keep."""
            state.eval_steps = args.eval_steps

    class Patience(EarlyStoppingCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            """transformers' own warns that nothing restores the best step, which qkit does."""

    yield Interval()
    if recipe.train.early_stopping_patience is not None:
        yield Patience(recipe.train.early_stopping_patience, recipe.train.early_stopping_threshold)


def record(file: Path, step: int, logs: Mapping[str, float], trainer: Any) -> None:
    """Add an evaluation to metrics.jsonl, and say it."""
    figures = {name: value for name, value in logs.items() if name.startswith("eval_")}
    with file.open("a", encoding="utf-8") as sink:
        sink.write(json.dumps({"step": step, "epoch": logs.get("epoch", 0.0), **figures}) + "\n")
    told = [f"{name.removeprefix('eval_')} {value:.4g}" for name, value in figures.items() if name != SECONDS]
    trainer.validation.run.progress.notify(f"step {step}: validation {', '.join(told)} ({figures[SECONDS]:.1f} s)")


def resume(trainer: Any, state: Mapping[str, Any]) -> bool:
    """Give early stopping the count of a checkpoint. Returns whether it had stopped there. `state`: its trainer_state.json."""
    stopper = next((one for one in trainer.callback_handler.callbacks if type(one).__name__ == PATIENCE), None)
    if stopper is None or PATIENCE not in state["stateful_callbacks"]:
        return False
    count = state["stateful_callbacks"][PATIENCE]["attributes"]["early_stopping_patience_counter"]
    stopper.early_stopping_patience_counter = count
    return bool(count >= stopper.early_stopping_patience)


def finish(trainer: Any, out: Path, total: int) -> None:
    """Go back to the best step, if that is wanted, and compute its figure again from what was saved. Writes validation.json.

    Raises:
        StageFailed: no evaluation gave a figure that can be compared, or what was saved gives another figure.
    """
    run, state = trainer.validation.run, trainer.state
    section = run.recipe.train
    name, logged = section.metric_for_best_model, read_lines(out / "metrics.jsonl")
    record: dict[str, Any] = {
        "metric": name,
        "best": {"step": state.best_global_step, "value": state.best_metric if state.best_global_step else None},
        "last_step": state.global_step,
        "steps": total,
        "restored": section.keeps_best,
        "rows": len(trainer.validation.rows),
        "seconds": sum(line.get(SECONDS, 0.0) for line in logged),
    }
    if section.keeps_best:
        record["again"] = _restored(trainer, name)
    write_json(out / VALIDATION, record)
    run.progress.notify(f"train: {_told(record)}")
    if words := _of_start(record, logged, is_greater_better(run.recipe)):
        run.progress.notify(f"train: warning: {words}")
    if words := curves.gap(logged, section.keeps_best):
        run.progress.notify(f"train: warning: {words}")


def _restored(trainer: Any, name: str) -> float:
    """The figure of the best step, computed again."""
    run, best = trainer.validation.run, trainer.state.best_metric
    if trainer.state.best_global_step is None or best is None or not math.isfinite(best):
        raise StageFailed(
            "train", run.root, run.log("train"), f"no evaluation gave a finite {name}: there is no best step"
        )
    best_step.restore(trainer)
    again: float = trainer.validation.figures(trainer)[name]
    if best_step.is_same(best, again, trainer.validation.meter.device.has_gpu):
        return again
    text = f"what was saved at step {trainer.state.best_global_step} gives a {name} of {again!r}, and not {best!r} as when it was trained"
    if trainer.best_step_here == trainer.state.best_global_step:
        raise StageFailed("train", run.root, run.log("train"), text)
    # Before a kill it may have been another processor, or another number of threads, which round otherwise.
    run.progress.notify(f"train: warning: {text}, before training was interrupted")
    return again


def _of_start(record: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]], more: bool) -> str:
    """What to know if no step was better than the model before the first one, which is no step to go back to."""
    name, best = record["metric"], record["best"]["value"]
    start = next((line.get(f"eval_{name}") for line in metrics if line["step"] == 0 and "eval_loss" in line), None)
    if start is None or best is None or (best > start if more else best < start):
        return ""
    return f"no step is better than the model before training, which has a {name} of {start:.6g}"


def _told(record: Mapping[str, Any]) -> str:
    best, last = record["best"], record["last_step"]
    if best["value"] is None:
        return f"warning: no evaluation gave a finite {record['metric']}"
    stopped = f", stopped early at step {last} of {record['steps']}" if last < record["steps"] else f" of {last} steps"
    kept = f"; that step is kept, and gives {record['again']:.6g} again" if record["restored"] else ""
    return f"validation: best {record['metric']} {best['value']:.6g} at step {best['step']}{stopped}{kept}"
