"""Metrics: what scikit-learn 1.9, scipy 1.17 and seqeval 1.2 say of the same rows, and what each resample would be on its own."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qkit.plugins.resampling import Interval, Joined, Sample, figures, intervals, paired_intervals
from qkit.tasks._encoder.metrics.classes import Bin, calibration, confusion, multi_label, reliability, single_label
from qkit.tasks._encoder.metrics.entities import tagging
from qkit.tasks._encoder.metrics.regression import regression

CLASSES = ["a", "b", "c", "d", "e"]  # of which d is in neither, and e is never predicted
REFERENCE, PREDICTED = np.array([0, 0, 0, 0, 1, 1, 1, 2, 2, 4]), np.array([0, 0, 1, 0, 1, 1, 2, 2, 0, 1])
FROM_SKLEARN = {
    "accuracy": 0.6,
    "macro_classes": 4,
    **{f"{name}_micro": 0.6 for name in ("precision", "recall", "f1")},
    "precision_macro": 0.4375,
    "recall_macro": 0.47916666666666663,
    "f1_macro": 0.45535714285714285,
    "precision_weighted": 0.55,
    "recall_weighted": 0.6,
    "f1_weighted": 0.5714285714285714,
    **dict(zip([f"precision:{name}" for name in CLASSES], [0.75, 0.5, 0.5, 0, 0], strict=True)),
    **dict(zip([f"recall:{name}" for name in CLASSES], [0.75, 0.6666666666666666, 0.5, 0, 0], strict=True)),
    **dict(zip([f"f1:{name}" for name in CLASSES], [0.75, 0.5714285714285714, 0.5, 0, 0], strict=True)),
    **dict(zip([f"support:{name}" for name in CLASSES], [4, 3, 2, 0, 1], strict=True)),
}


def test_single_labels_are_counted_as_in_scikit_learn() -> None:
    assert figures(single_label(REFERENCE, PREDICTED, CLASSES)) == pytest.approx(FROM_SKLEARN, abs=1e-12)
    assert confusion(REFERENCE, PREDICTED, 5).tolist() == [
        [3, 1, 0, 0, 0],
        [0, 2, 1, 0, 0],
        [1, 0, 1, 0, 0],
        [0, 0, 0, 0, 0],
        [0, 1, 0, 0, 0],
    ]


def test_one_row_and_all_right() -> None:
    known = figures(single_label(np.array([1]), np.array([1]), ["a", "b"]))
    assert known["f1_macro"] == known["accuracy"] == known["macro_classes"] == 1 and known["f1:a"] == 0


@pytest.mark.parametrize("index", [-1, 5])
def test_a_class_without_a_name_is_refused(index: int) -> None:
    with pytest.raises(ValueError, match="of 5"):
        single_label(REFERENCE, np.full(10, index), CLASSES)


def test_several_labels_are_counted_as_in_scikit_learn() -> None:
    """Class c is in neither: scikit-learn's macro mean is the one here for labels=[0, 1, 3], and counts c as 0 otherwise."""
    reference = np.array([[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0], [0, 1, 0, 1], [1, 1, 0, 0]])
    predicted = np.array([[1, 0, 0, 0], [1, 0, 0, 0], [0, 1, 0, 0], [0, 1, 0, 0], [1, 1, 0, 0]])
    known = figures(multi_label(reference, predicted, CLASSES[:4]))
    wanted = {"exact_match": 0.4, "hamming_loss": 0.15, "macro_classes": 3}
    wanted |= {
        "precision_micro": 0.8333333333333334,
        "recall_micro": 0.7142857142857143,
        "f1_micro": 0.7692307692307693,
    }
    wanted |= {f"{name}_macro": 0.5555555555555555 for name in ("precision", "recall", "f1")}
    wanted |= {f"{name}_weighted": 0.7142857142857143 for name in ("precision", "recall", "f1")}
    assert {name: known[name] for name in wanted} == pytest.approx(wanted, abs=1e-12)
    assert known["f1:a"] == 1 and known["f1:c"] == known["f1:d"] == 0


def test_calibration_by_hand() -> None:
    """With 5 bins, confidence 0.4 belongs to the second (0.2, 0.4]; 0.7 and 0.8 share (0.6, 0.8]."""
    probabilities = np.array([[0.7, 0.2, 0.1], [0.1, 0.8, 0.1], [0.3, 0.3, 0.4], [0.05, 0.9, 0.05]])
    sample = calibration(np.array([0, 1, 1, 2]), probabilities, bins=5)
    known = figures(sample)
    assert known["brier"] == pytest.approx(0.66375)  # scikit-learn's brier_score_loss with scale_by_half=False
    assert known["ece"] == pytest.approx((abs(0 - 0.4) + abs(2 - 1.5) + abs(0 - 0.9)) / 4)
    assert [(part.low, part.high, part.rows) for part in reliability(sample)] == [
        (0.2, 0.4, 1),
        (0.6, 0.8, 2),
        (0.8, 1, 1),
    ]
    assert reliability(sample)[1] == Bin(0.6, 0.8, 2, pytest.approx(0.75), 1)


def test_certainty_is_calibrated_if_right() -> None:
    sure = np.eye(3)[[0, 1, 2, 2]]
    assert figures(calibration(np.array([0, 1, 2, 2]), sure)) == {"ece": 0, "brier": 0}
    assert figures(calibration(np.array([1, 2, 0, 0]), sure)) == {"ece": 1, "brier": 2}
    assert figures(calibration(np.array([0]), np.array([[0.5, 0.5]], dtype=np.float32))) == {"ece": 0.5, "brier": 0.5}


@pytest.mark.parametrize("row", [[0.7, 2.0], [math.nan, 0.5], [-3.0, 1.0]])
def test_logits_are_not_probabilities(row: list[float]) -> None:
    with pytest.raises(ValueError, match="logits"):
        calibration(np.array([0]), np.array([row]))


@pytest.mark.parametrize("shift", [0, 1e6])
def test_regression_as_in_scikit_learn_and_scipy(shift: float) -> None:
    reference, predicted = np.array([1, 2, 2, 4, 5, 7]) + shift, np.array([1.5, 2, 1, 4.5, 4, 9]) + shift
    assert figures(regression(reference, predicted)) == pytest.approx(
        {
            "mse": 1.0833333333333333,
            "mae": 0.8333333333333334,
            "rmse": 1.0408329997330663,
            "r2": 0.7450980392156863,
            "pearson": 0.9421894012430869,
            "spearman": 0.8406680016960504,
        },
        rel=1e-9,
    )


@pytest.mark.parametrize(("predicted", "r2"), [([0.1, 0.1, 0.1], 1), ([0.1, 0.2, 0.1], 0)])
def test_references_that_are_all_equal(predicted: list[float], r2: float) -> None:
    """0.1 is not the mean of three times 0.1 in floating point."""
    known = figures(regression(np.array([0.1, 0.1, 0.1]), np.array(predicted)))
    assert known["r2"] == r2 and math.isnan(known["pearson"]) and math.isnan(known["spearman"])


def test_a_number_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match=r"row 1: the reference is 2.0, the prediction nan"):
        regression(np.array([1.0, 2.0]), np.array([1.0, math.nan]))


TAGS = ["O B-PER I-PER O B-LOC", "B-LOC I-LOC I-LOC O", "O O B-ORG"]
GUESSES = ["O B-PER I-PER O O", "B-LOC I-LOC O O", "I-PER O B-ORG"]


def test_entities_are_counted_as_in_seqeval() -> None:
    """In seqeval's default mode the I-PER without a beginning is an entity, and F1 0.5."""
    known = figures(tagging([tags.split() for tags in TAGS], [tags.split() for tags in GUESSES]))
    wanted = {"precision_micro": 0.6666666666666666, "recall_micro": 0.5, "f1_micro": 0.5714285714285715}
    wanted |= {"f1_macro": 0.6666666666666666, "f1_weighted": 0.5, "token_accuracy": 0.75, "macro_classes": 3}
    wanted |= {"f1:LOC": 0, "f1:ORG": 1, "f1:PER": 1}
    assert {name: known[name] for name in wanted} == pytest.approx(wanted)


def test_sentences_without_entities_or_words() -> None:
    known = figures(tagging([["O"], []], [["I-X"], []]))
    assert known["f1_micro"] == known["f1_macro"] == known["macro_classes"] == known["token_accuracy"] == 0
    with pytest.raises(ValueError, match="shorter"):
        tagging([["O", "O"]], [["O"]])


# Resamples: the figures of drawn rows are those of a sample that has just these rows

ROWS = 12


def classes_of(rng: np.random.Generator, rows: Any) -> Sample:
    reference, predicted = rng.integers(5, size=(2, ROWS))
    return single_label(reference[rows], predicted[rows], CLASSES)


def several_of(rng: np.random.Generator, rows: Any) -> Sample:
    reference, predicted = rng.random((2, ROWS, 5)) < 0.3
    return multi_label(reference[rows], predicted[rows], CLASSES)


def probabilities_of(rng: np.random.Generator, rows: Any) -> Sample:
    return calibration(rng.integers(3, size=ROWS)[rows], rng.dirichlet([0.5] * 3, ROWS)[rows])


def numbers_of(rng: np.random.Generator, rows: Any) -> Sample:
    reference, predicted = rng.integers(4, size=(2, ROWS)) / 3 + 100
    return regression(reference[rows], predicted[rows])


def tags_of(rng: np.random.Generator, rows: Any) -> Sample:
    drawn = [[rng.choice(["O", "B-X", "I-X", "B-Y"], size=5).tolist() for _ in range(ROWS)] for _ in range(2)]
    return tagging(*[[sentences[row] for row in rows] for sentences in drawn])


SAMPLES = [classes_of, several_of, probabilities_of, numbers_of, tags_of]


@pytest.mark.parametrize("of", SAMPLES)
@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.lists(st.integers(0, ROWS - 1), min_size=1, max_size=ROWS))
def test_a_resample_has_the_figures_of_its_rows(of: Callable[..., Sample], seed: int, drawn: list[int]) -> None:
    everything = of(np.random.default_rng(seed), np.arange(ROWS))
    weights = np.stack([np.bincount(drawn, minlength=ROWS), np.ones(ROWS)]).astype(float)
    resampled = everything.figures(weights)
    alone = figures(of(np.random.default_rng(seed), np.array(drawn)))
    for name, value in alone.items():
        assert resampled[name].shape == (2,)
        assert resampled[name][0] == pytest.approx(value, abs=1e-9, nan_ok=True), name
        assert resampled[name][1] == pytest.approx(figures(everything)[name], abs=1e-9, nan_ok=True), name


@pytest.mark.parametrize("of", SAMPLES)
def test_rows_in_another_order_have_the_same_figures(of: Callable[..., Sample]) -> None:
    one, other = (figures(of(np.random.default_rng(3), rows)) for rows in (np.arange(ROWS), np.arange(ROWS)[::-1]))
    assert one == pytest.approx(other, abs=1e-12)


# Intervals


def right_or_wrong(right: list[bool]) -> Sample:
    return single_label(np.zeros(len(right), int), np.array([0 if value else 1 for value in right]), ["a", "b"])


def test_an_interval_of_a_share_is_that_of_the_binomial() -> None:
    interval = intervals(right_or_wrong([True] * 50 + [False] * 50), 0.95, seed=0)["accuracy"]
    assert interval.low == pytest.approx(0.402, abs=0.015) and interval.high == pytest.approx(0.598, abs=0.015)


def test_the_interval_of_a_mean_is_that_of_the_normal_distribution() -> None:
    errors = np.random.default_rng(0).exponential(size=400)
    sample = regression(np.zeros(400), errors)
    interval = intervals(sample, 0.9, seed=0)["mae"]
    margin = 1.645 * errors.std() / 20
    assert interval.low == pytest.approx(errors.mean() - margin, abs=0.1 * margin)
    assert interval.high == pytest.approx(errors.mean() + margin, abs=0.1 * margin)


def test_an_interval_depends_on_the_seed_only(monkeypatch: pytest.MonkeyPatch) -> None:
    sample = single_label(REFERENCE, PREDICTED, CLASSES)
    first = intervals(sample, 0.95, seed=1, draws=200)
    assert intervals(sample, 0.95, seed=1, draws=200) == first
    assert intervals(sample, 0.95, seed=2, draws=200)["f1_macro"] != first["f1_macro"]
    wider = intervals(sample, 0.99, seed=1, draws=200)["f1_macro"]
    assert wider.low <= first["f1_macro"].low < FROM_SKLEARN["f1_macro"] < first["f1_macro"].high <= wider.high
    monkeypatch.setattr("qkit.plugins.resampling.ELEMENTS", 70)  # 7 draws at once
    assert intervals(sample, 0.95, seed=1, draws=200) == first


def test_what_never_changes_has_no_width() -> None:
    assert intervals(right_or_wrong([True] * 9), 0.95, seed=0, draws=50)["accuracy"] == Interval(1, 1)


def test_resamples_without_a_figure_are_left_out() -> None:
    """A correlation in resamples of one row over and over."""
    interval = intervals(regression(np.array([0.0, 1.0]), np.array([0.0, 1.0])), 0.95, seed=0, draws=50)
    assert (interval["pearson"].low, interval["spearman"].high) == pytest.approx((1, 1))
    never = intervals(regression(np.zeros(3), np.zeros(3)), 0.95, seed=0, draws=50)["pearson"]
    assert math.isnan(never.low) and math.isnan(never.high)


def test_a_pair_is_told_apart_better_than_two_intervals_tell() -> None:
    before = [index % 2 == 0 for index in range(200)]
    after = [right or index % 10 == 1 for index, right in enumerate(before)]  # 20 more
    one, other = right_or_wrong(before), right_or_wrong(after)
    gain = paired_intervals(one, other, 0.95, seed=0)["accuracy"]
    assert gain.low == pytest.approx(0.1 - 1.96 * 0.3 / math.sqrt(200), abs=0.01)
    assert gain.high == pytest.approx(0.1 + 1.96 * 0.3 / math.sqrt(200), abs=0.01)
    assert intervals(one, 0.95, seed=0)["accuracy"].high > intervals(other, 0.95, seed=0)["accuracy"].low
    loss = paired_intervals(other, one, 0.95, seed=0)["accuracy"]
    assert (loss.low, loss.high) == pytest.approx((-gain.high, -gain.low))
    assert paired_intervals(one, one, 0.95, seed=0, draws=50)["f1_macro"] == Interval(0, 0)


def test_a_pair_has_the_figures_that_both_have() -> None:
    same, other = tagging([["B-X"]] * 3, [["B-X"]] * 3), tagging([["B-X"]] * 3, [["B-Y"]] * 3)
    known = paired_intervals(same, other, 0.95, seed=0, draws=10)
    assert "f1:X" in known and "f1:Y" not in known and known["f1_micro"] == Interval(-1, -1)
    with pytest.raises(ValueError, match="3 rows before and 1 after"):
        paired_intervals(same, tagging([["O"]], [["O"]]), 0.95, seed=0)


def test_no_rows_have_no_interval() -> None:
    for call in (figures, lambda sample: intervals(sample, 0.95, seed=0)):
        with pytest.raises(ValueError, match="no rows"):
            call(right_or_wrong([]))
    with pytest.raises(ValueError, match="no rows"):
        regression(np.array([]), np.array([]))


def test_joined_samples_draw_the_same_rows() -> None:
    labels = single_label(REFERENCE, PREDICTED, CLASSES)
    sure = calibration(REFERENCE, np.eye(5)[PREDICTED])
    both = intervals(Joined([labels, sure]), 0.95, seed=0, draws=100)
    assert both["accuracy"] == intervals(labels, 0.95, seed=0, draws=100)["accuracy"]
    assert both["ece"].high == pytest.approx(1 - both["accuracy"].low)  # every prediction is certain
