"""What a task with labels shows of a run: the labels' figures, which are confused, how honest the probabilities are, and the worst errors.

The parts are for every task of the family: `table_of_labels` needs metrics only, the others lines of predictions.jsonl.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from qkit.core.figures import ABSENT, fixed, percent, trimmed
from qkit.plugins.sections import Bin, Cell, Column, Evaluated, Figure, Matrix, Plot, Section, Series, Table

# Of single labels; a micro average equals the accuracy, which is the score
SINGLE_LABEL = (
    Figure("f1_macro", "macro F1", "f1", "macro"),
    Figure("precision_macro", "macro precision", "precision", "macro"),
    Figure("recall_macro", "macro recall", "recall", "macro"),
    Figure("f1_weighted", "weighted F1", "f1", "weighted"),
    Figure("ece", "calibration error", "expected_calibration_error", share=False, is_error=True),
    Figure("brier", "Brier score", "brier_score", share=False, is_error=True),
)
OF_ONE_LABEL = Figure("f1", "F1", "f1")
OF_LABEL = ("precision", "recall", "f1")
WORST = 20  # labels of the matrix, and pairs of labels, where there are more
ERRORS, DOUBTFUL = 20, 10
LETTERS = 600  # of a text in a table
OTHERS = "(any other)"


def sections_of_single_labels(evaluated: Evaluated, names: Sequence[str]) -> list[Section]:
    """The sections of a task that gives each text one label; none without predictions. `names`: all labels, in the order of their ids."""
    lines = evaluated.lines
    if not lines:
        return []
    known = [*names, *sorted({line[key] for line in lines for key in ("reference", "prediction")} - {*names})]
    ranked = ranked_labels(evaluated.metrics) or known
    confused = Section("confusions", "Confusions", ("Rows are the labels of the texts, columns what was predicted.",), [
        matrix_of(lines, known, ranked), *confused_pairs(lines),
    ])  # fmt: skip
    labels = [Section("labels", "Labels", (LABEL_NOTE,), [table])] if (table := table_of_labels(evaluated)) else []
    return [*labels, confused, calibration(evaluated), errors(lines)]


# --- figures of labels ------------------------------------------------------------------------------------------------

LABEL_NOTE = "On the held-out rows. A label with few rows has a wide interval: its figure may be chance."


def ranked_labels(metrics: Mapping[str, Any]) -> list[str]:
    """The labels that held-out rows have, the one with the lowest F1 first. Figures of a label are called `f1:LABEL`."""
    labels = [name.partition(":")[2] for name in metrics if name.startswith("f1:")]
    present = [name for name in labels if _value(metrics, "support", name) > 0]
    return sorted(present, key=lambda name: (_value(metrics, "f1", name), -_value(metrics, "support", name)))


def table_of_labels(evaluated: Evaluated, what: str = "Label") -> Table | None:
    """Support, precision, recall and F1 of each label with intervals; None without figures of labels. `what`: such as `Type`."""
    metrics = evaluated.metrics
    rows = [_row_of_label(metrics, name) for name in ranked_labels(metrics)]
    if not rows:
        return None
    columns = [Column(what, "name"), Column("Support"), Column("Precision"), Column("Recall"), Column("F1")]
    wide = f"{100 * evaluated.confidence:g} % intervals" if evaluated.confidence else "intervals"
    caption = f"Figures of each {what.lower()}, of 100, with {wide}; the lowest F1 first"
    return Table(caption, columns, rows, sortable=True, on_card=True)


def _row_of_label(metrics: Mapping[str, Any], name: str) -> list[Cell | str]:
    support = _value(metrics, "support", name)
    return [name, Cell(support, fixed(support, 0)), *(figure_cell(metrics.get(f"{f}:{name}")) for f in OF_LABEL)]


def figure_cell(entry: Mapping[str, float | None] | None) -> Cell:
    """A share with its interval, of 100: `83.1 (70–92)`."""
    value = (entry or {}).get("value")
    if entry is None or value is None:
        return Cell(None, ABSENT)
    low, high = entry.get("low"), entry.get("high")
    interval = "" if low is None or high is None else f" ({100 * low:.0f}–{100 * high:.0f})"
    return Cell(value, f"{100 * value:.1f}{interval}")


def _value(metrics: Mapping[str, Any], figure: str, name: str) -> float:
    return float((metrics.get(f"{figure}:{name}") or {}).get("value") or 0.0)


# --- confusions -------------------------------------------------------------------------------------------------------


def matrix_of(lines: Sequence[Mapping[str, Any]], names: Sequence[str], ranked: Sequence[str]) -> Matrix:
    """Texts by label and prediction: of all labels, or of the WORST ones by `ranked`, with the rest as one column."""
    counts = Counter((line["reference"], line["prediction"]) for line in lines)
    some = {*(names if len(names) <= WORST else ranked[:WORST])}
    shown = [name for name in names if name in some]
    rows = [[counts[row, column] for column in shown] for row in shown]
    columns, caption = shown, "Texts by label and predicted label; shade: share of the row."
    if len(shown) < len(names):
        sums = Counter(line["reference"] for line in lines)
        rows = [[*row, sums[name] - sum(row)] for name, row in zip(shown, rows, strict=True)]
        columns = [*shown, OTHERS]
        caption = f"The {len(shown)} labels of {len(names)} with the lowest F1; shade: share of the row."
    return Matrix("confusion-chart", "Confusion matrix", caption, ("label", "predicted"), shown, columns, rows)


def confused_pairs(lines: Sequence[Mapping[str, Any]]) -> list[Table]:
    """The pairs of labels that are confused most often; none if nothing is wrong."""
    wrong = Counter((line["reference"], line["prediction"]) for line in lines if not line["correct"])
    sums = Counter(line["reference"] for line in lines)
    pairs = sorted(wrong.items(), key=lambda pair: (-pair[1], pair[0]))
    if not pairs:
        return []
    rows = [
        [one, other, Cell(count, str(count)), Cell(count / sums[one], percent(count / sums[one]))]
        for (one, other), count in pairs[:WORST]
    ]
    columns = [Column("Label", "name"), Column("Predicted as", "name"), Column("Texts"), Column("Of the label's texts")]
    more = f", {len(rows)} of {len(pairs)}" if len(rows) < len(pairs) else ""
    return [Table(f"Most confused pairs{more}", columns, rows, sortable=True)]


def missed_and_added(missed: Counter[str], added: Counter[str], what: str, wrongly: str) -> Table:
    """How often each label is missed, and how often it is wrongly added. `what`: such as Type; `wrongly`: the title of the latter."""
    names = sorted({*missed, *added}, key=lambda name: (-missed[name] - added[name], name))
    rows: list[list[Cell | str]] = [
        [name, *(Cell(count[name], str(count[name])) for count in (missed, added))] for name in names
    ]
    columns = [Column(what, "name"), Column("Missed"), Column(wrongly)]
    return Table(f"Errors of each {what.lower()}, those with most first", columns, rows, sortable=True)


# --- probabilities ----------------------------------------------------------------------------------------------------


def calibration(evaluated: Evaluated) -> Section:
    """How often texts are right, by the probability that the model gives its prediction."""
    from qkit.plugins.resampling import figures
    from qkit.tasks._encoder.metrics.classes import reliability

    sample = _confidences(evaluated.lines)
    bins = reliability(sample)
    entry = evaluated.metrics.get("ece") or {"value": figures(sample)["ece"]}
    low, high = entry.get("low"), entry.get("high")
    interval = "" if low is None or high is None else f" ({fixed(low, 3)}–{fixed(high, 3)})"
    error = f"expected calibration error {fixed(entry['value'], 3)}{interval}"
    points = [(one.confidence, one.accuracy) for one in bins]
    description = f"{error}; " + "; ".join(
        f"{one.rows} texts of mean confidence {one.confidence:.2f}: {trimmed(100 * one.accuracy)} % right"
        for one in bins
    )
    note = "Where a point lies below the line, the model is surer than it is right. A bin with few texts says little."
    plot = Plot(
        "reliability-chart",
        "Reliability diagram",
        description,
        f"Share right by confidence, in bins of equal width; below, the texts of each bin. {error.capitalize()}.",
        ("confidence: the probability of the predicted label", "share right"),
        [Series("as sure as right", [(0.0, 0.0), (1.0, 1.0)], joined=True), Series("the model", points, strong=True)],
        x_range=(0.0, 1.0),
        y_range=(0.0, 1.0),
        bins=[Bin(one.low, one.high, one.rows) for one in bins],
    )
    return Section("calibration", "Calibration", (note,), [plot])


def _confidences(lines: Sequence[Mapping[str, Any]]) -> Any:
    import numpy as np

    from qkit.tasks._encoder.metrics.classes import confidences

    return confidences(
        np.array([line["confidence"] for line in lines]), np.array([line["correct"] for line in lines], dtype=float)
    )


# --- texts ------------------------------------------------------------------------------------------------------------


def errors(lines: Sequence[Mapping[str, Any]]) -> Section:
    """The errors that the model is surest of, and the right texts that it is least sure of."""
    wrong = sorted((line for line in lines if not line["correct"]), key=lambda line: -line["confidence"])
    right = sorted((line for line in lines if line["correct"]), key=lambda line: line["confidence"])
    said = [Column("Row"), Column("Text", "text"), Column("Label", "name"), Column("Predicted", "name")]
    sure = Table(
        f"Wrong, the surest first: {min(len(wrong), ERRORS)} of {len(wrong)}",
        [*said, Column("Confidence"), Column("Probability of the label")],
        [
            [*_labelled(line), line["prediction"], _share(line["confidence"]), _of_reference(line)]
            for line in wrong[:ERRORS]
        ],
    )
    unsure = Table(
        f"Right, the least sure first: {min(len(right), DOUBTFUL)} of {len(right)}",
        [*said[:3], Column("Confidence"), Column("Next label", "name"), Column("Its probability")],
        [[*_labelled(line), _share(line["confidence"]), *_second(line)] for line in right[:DOUBTFUL]],
    )
    note = "A wrong text that the model is sure of is often one with a wrong label, or one that fits two labels."
    return Section("errors", "Errors", (note,), [table for table in (sure, unsure) if table.rows])


def row_and_text(line: Mapping[str, Any]) -> list[Cell | str]:
    """The number of the held-out row, and its text, cut if it is long."""
    text = line["prompt"] if len(line["prompt"]) <= LETTERS else f"{line['prompt'][:LETTERS]}…"
    return [Cell(line["row"], str(line["row"])), text]


def _labelled(line: Mapping[str, Any]) -> list[Cell | str]:
    return [*row_and_text(line), line["reference"]]


def _share(value: float | None) -> Cell:
    return Cell(value, percent(value))


def _of_reference(line: Mapping[str, Any]) -> Cell:
    """The probability of the right label: only those of the most likely labels are recorded."""
    top = line.get("top") or {}
    if line["reference"] in top:
        return _share(top[line["reference"]])
    return Cell(0.0, f"< {percent(min(top.values()))}") if top else Cell(None, ABSENT)


def _second(line: Mapping[str, Any]) -> list[Cell | str]:
    others = [(name, value) for name, value in (line.get("top") or {}).items() if name != line["prediction"]]
    if not others:
        return [ABSENT, Cell(None, ABSENT)]
    name, value = others[0]
    return [name, _share(value)]
