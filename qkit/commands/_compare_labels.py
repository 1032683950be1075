"""Compares two models with labels: by the distributions over their labels, and by their predictions, on the same rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from qkit.core.errors import DataError, short
from qkit.core.sequences import first_difference
from qkit.measure import scores as measure_scores
from qkit.measure.divergence import Distances
from qkit.plugins.task import Prediction, open_task, read_labels

if TYPE_CHECKING:
    from qkit.core.progress import Progress
    from qkit.plugins.runtime import RowScores
    from qkit.plugins.task import ModelHead

    Opened = Callable[[Any, int, ModelHead], AbstractContextManager[Any]]


def compare(a: Any, b: Any, chosen: Any, opened: Opened, progress: Progress) -> dict[str, Any]:
    """The figures of a `Comparison` that come from the two models.

    Args:
        a, b: the sides, of commands/compare.py.
        chosen: its ComparisonRows, of a run whose labels both models have.
        opened: its function that opens a side.
        progress: what people see.

    Raises:
        DataError: a side is a server, or the rows are not those of a run.
        ParityFailed: a or b returned NaN or infinite log-probabilities.
    """
    for which in (a, b):
        if which.url:
            raise DataError(
                f"{which.url}: a server of labels is not compared with a model; `qkit verify RUN --server {which.url}` checks its answers"
            )
    task = open_task(chosen.task)
    _need_same_labels(a, b)
    said, outputs = [], []
    for which in (a, b):
        progress.notify(f"verify: {which.description}")
        predictions, rows = _asked(which, chosen, opened)
        said.append(predictions)
        outputs.append(rows)
    distances = Distances(outputs[0], task.distance)
    for row in outputs[1]:
        distances.add(row)
    return {
        **distances.figures(f"{a.name} or {b.name}"),
        "loss_a": measure_scores.mean_loss(row.targets for row in distances.first),
        "loss_b": measure_scores.mean_loss(distances.targets),
        "identical": sum(one.text == other.text for one, other in zip(*said, strict=True)),
        "parting": None,
        "unit": outputs[0][0].unit,
        "score": _scores(said, chosen),
    }


def _scores(said: Sequence[Sequence[Prediction]], chosen: Any) -> dict[str, float]:
    """Both scores of 100, and the points that the second gains, with a paired interval."""
    task = open_task(chosen.task)
    before, after = (
        measure_scores.grade([one.text for one in predictions], chosen.held_out, task, chosen.section)
        for predictions in said
    )
    gain = measure_scores.paired_gain(before, after, chosen.section.confidence, chosen.seed)
    return {"a": measure_scores.percent(before), "b": measure_scores.percent(after), **gain}


def _need_same_labels(a: Any, b: Any) -> None:
    """Raise DataError if the two models' labels differ, or have another order: their outputs would be compared crosswise."""
    named = {}
    for which in (a, b):
        folder = which.run.trained() if which.is_reference and which.run is not None else which.path
        if folder is not None and (names := read_labels(folder)):
            named[which.name] = names
    if len({*named.values()}) > 1:
        place = first_difference(*named.values())
        shown = [f"{name} has {short(repr([*names[place:], 'no label'][0]))}" for name, names in named.items()]
        raise DataError(f"the labels of the two models differ: as label {place}, {' and '.join(shown)}")


def _asked(which: Any, chosen: Any, opened: Opened) -> tuple[Sequence[Prediction], list[RowScores]]:
    """A side's predictions of all rows, and its outputs. One model is open at a time."""
    run = chosen.held_out_of
    if run is None:
        raise DataError(
            f"{chosen.where}: models with labels are compared on the held-out rows of the run that a or b belongs to"
        )
    task = open_task(chosen.task)
    predictor = task.predictor(run.recipe, run.need("data", "summary.json").parent, run.tuned())
    with opened(which, 0, task.HEAD) as runtime:
        predictions = predictor.predict(runtime, chosen.held_out.rows, lambda _: None)
        return predictions, list(task.outputs(runtime, chosen.held_out.rows))
